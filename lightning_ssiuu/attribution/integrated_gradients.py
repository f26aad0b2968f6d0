"""Integrated gradients of the answer's probability along the path of a site's activations from zero to what they are.

Source: Sundararajan, Taly, Yan, arXiv 1703.01365 (integrated gradients, completeness), applied to a layer's output with
a zero baseline as in the neuron conductance literature (Dhamdhere, Sundararajan, Yan, arXiv 1805.12233).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_ssiuu.attribution.activation_gradient import captured, extremes, log_factors, streamed
from lightning_ssiuu.attribution.aggregation import NeuronAttribution
from lightning_ssiuu.models.answers import AnswerModel, Target, input_positions, target_logps
from lightning_ssiuu.models.architectures import NeuronSite
from lightning_ssiuu.utils.errors import check_at_least, check_choice

Path = Literal["site", "joint"]


def integrated_gradients(
    model: AnswerModel,
    parts: Iterable[Mapping[str, Tensor]],
    sites: Sequence[NeuronSite],
    target: Target = "sequence",
    memory_budget: int | str | None = None,
    steps: int = 16,
    path: Path = "site",
) -> NeuronAttribution:
    """Attribute the answers' probability by integrated gradients (arXiv 1703.01365, Eq. 1) with a zero baseline.

    ``A[i, k] = h[i, k] ∫₀¹ ∂F/∂h[i, k] dα``, where F is P(y|x) (or log P, see ``target``) with the activations of

    - ``path="site"``: one site at a time, at all tokens, multiplied with α, and all after it computed anew. Complete
      per site: summed over its neurons and tokens, A is F(x) − F(the site set to zero). A forward and a backward pass
      per batch, site and step.
    - ``path="joint"``: all sites multiplied with α at once, h being what a site computes from what reaches it then.
      Complete over all sites together: A sums to F(x) − F(all of them set to zero). A forward and a backward pass per
      batch and step.

    The integral is Gauss and Legendre's sum over ``steps`` values of α, in log space per example as in
    :func:`~lightning_ssiuu.attribution.activation_gradient.neuron_attribution`, whose other options it takes.
    """
    nodes = _nodes(steps)
    groups = _groups(sites, path)

    def attribute(part: Mapping[str, Tensor], result: NeuronAttribution) -> None:
        outside = ~input_positions(part["attention_mask"], part["labels"])
        for group in groups:
            values, logs = _along_path(model, part, group, target, nodes)
            factors = result.factors(logs)
            for site in group:
                result.add_site(site, *extremes(values.pop(site.key), outside), factors)
        with torch.no_grad():
            result.count(target_logps(model(**part), target))

    extra = 2 * max((sum(site.width for site in group) for group in groups), default=0)
    return streamed(model, parts, sites, attribute, memory_budget, extra)


def _groups(sites: Sequence[NeuronSite], path: Path) -> list[list[NeuronSite]]:
    check_choice("path", path, Path)
    return [[site] for site in sites] if path == "site" else [list(sites)]


def _nodes(steps: int) -> list[tuple[float, float]]:
    check_at_least("steps", steps, 1)
    positions, weights = np.polynomial.legendre.leggauss(steps)
    return [((1 + x) / 2, w / 2) for x, w in zip(positions.tolist(), weights.tolist(), strict=True)]


def _along_path(
    model: AnswerModel,
    part: Mapping[str, Tensor],
    sites: Sequence[NeuronSite],
    target: Target,
    nodes: Sequence[tuple[float, float]],
) -> tuple[dict[tuple[int, str], Tensor], Tensor]:
    # ``[B, L, width]`` integrals per site, and the ``[B]`` logarithms of what they are to be multiplied with
    totals: dict[tuple[int, str], Tensor] = {}
    products: dict[tuple[int, str], Tensor] = {}
    highest = torch.tensor(-torch.inf, dtype=torch.float64)

    def keep(site: NeuronSite, product: Tensor) -> None:
        products[site.key] = product

    for alpha, weight in nodes:
        with torch.enable_grad(), captured(model, sites, keep, alpha) as start:
            logps = target_logps(model(**part), target)
            torch.autograd.grad(logps.sum(), start)
        logs = log_factors(logps, target)
        # P differs along the path by orders of magnitude: everything is relative to the largest met so far.
        before, highest = highest, torch.maximum(highest, logs)
        old, new = (before - highest).exp(), weight * (logs - highest).exp()
        for site in sites:
            product = products.pop(site.key)
            product *= new.view(-1, 1, 1).to(product.dtype)
            if site.key in totals:
                product += totals[site.key].mul_(old.view(-1, 1, 1).to(product.dtype))
            totals[site.key] = product
    return totals, highest
