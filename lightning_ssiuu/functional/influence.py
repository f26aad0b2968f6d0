"""Influence variation: how much positive influence unlearning removed, how much negative influence it added.

Source: arXiv 2509.22263, Eqs. 2, 4 and 5. Decrease of positive influence means *erased*, increase of negative influence
means *hidden*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ssiuu.errors import UserError
from lightning_ssiuu.functional.attribution import NeuronAttribution


@dataclass(frozen=True)
class InfluenceVariation:
    """D⁺ and D⁻ of every neuron, both ≥ 0, in units of probability, in the order of ``before.sites``.

    Args:
        d_plus: ``[n_neurons]`` decrease of positive influence.
        d_minus: ``[n_neurons]`` increase of negative influence.
        before: Attributions of the original model.
        after: Attributions of the unlearned model on the same examples.
    """

    d_plus: Tensor
    d_minus: Tensor
    before: NeuronAttribution
    after: NeuronAttribution

    def summary(self, top: int = 100) -> dict[str, float]:
        """Totals and sums over the ``top`` neurons, by the keys of ``metrics.json``."""
        return {
            "d_plus_total": self.d_plus.sum().item(),
            "d_minus_total": self.d_minus.sum().item(),
            f"d_plus_top{top}": top_sum(self.d_plus, top),
            f"d_minus_top{top}": top_sum(self.d_minus, top),
        }


def influence_variation(before: NeuronAttribution, after: NeuronAttribution) -> InfluenceVariation:
    """D⁺ and D⁻ between two models on the same examples (arXiv 2509.22263, Eqs. 2, 4, 5).

    ``D⁺ = max(0, mean_n[max_k A_before − max(max_k A_after, 0)])``: the inner maximum keeps a positive influence that
    turned negative (over-unlearning) from counting as erasure. ``D⁻ = max(0, mean_n[min_k A_before − min_k A_after])``.

    Args:
        before: The original model's attributions.
        after: The unlearned model's, over the same examples and sites.

    Raises:
        UserError: If the two were not measured on the same number of examples and neurons.

    Example:
        >>> from lightning_ssiuu.sites import NeuronSite
        >>> site = NeuronSite("mlp_up", 0, "up", 2)
        >>> before, after = NeuronAttribution.empty([site]), NeuronAttribution.empty([site])
        >>> before.add({site.key: torch.tensor([[0.5, 0.2]])}, {site.key: torch.tensor([[0.0, -0.1]])})
        >>> after.add({site.key: torch.tensor([[-0.3, 0.2]])}, {site.key: torch.tensor([[-0.3, -0.1]])})
        >>> variation = influence_variation(before, after)
        >>> variation.d_plus, variation.d_minus  # 0.5 − 0, not 0.5 + 0.3
        (tensor([0.5000, 0.0000], dtype=torch.float64), tensor([0.3000, 0.0000], dtype=torch.float64))
    """
    if before.n_examples != after.n_examples or len(before.maximum) != len(after.maximum):
        got = (after.n_examples, len(after.maximum))
        raise UserError("after", got, f"{before.n_examples} examples on {len(before.maximum)} neurons, as before")
    d_plus = (before.mean_maximum - after.mean_positive).clamp(min=0)
    d_minus = (before.mean_minimum - after.mean_minimum).clamp(min=0)
    return InfluenceVariation(d_plus, d_minus, before, after)


def top_sum(values: Tensor, top: int) -> float:
    """Sum of the ``top`` largest values.

    Example:
        >>> top_sum(torch.tensor([3.0, 1.0, 2.0]), 2)
        5.0
    """
    return values.topk(min(top, values.numel())).values.sum().item()


def cumulative_curve(values: Tensor, points: int = 500_000) -> Tensor:
    """Cumulative sum over neurons sorted by decreasing value, at most ``points`` long (the paper's figure).

    Example:
        >>> cumulative_curve(torch.tensor([1.0, 3.0, 2.0]))
        tensor([3., 5., 6.])
    """
    return values.sort(descending=True).values[:points].cumsum(0)


def module_layer_means(by_site: Mapping[tuple[int, str], Tensor], top: int = 100) -> dict[tuple[int, str], float]:
    """Mean over the ``top`` largest neurons of every module × layer (the paper's heat map).

    Example:
        >>> module_layer_means({(0, "mlp_up"): torch.tensor([1.0, 3.0, 0.0])}, top=2)
        {(0, 'mlp_up'): 2.0}
    """
    return {key: top_sum(v, top) / min(top, v.numel()) for key, v in by_site.items()}


@dataclass(frozen=True)
class SpuriousNeuron:
    """A flagged neuron: one line of ``spurious_neurons.csv``.

    ``attribution_before`` and ``attribution_after`` are mean negative influences (mean over forget examples of
    min_k A); ``z`` says by how many standard deviations of the retain set's D⁻ in the same module its D⁻ lies above
    their mean.
    """

    module: str
    layer: int
    index: int
    attribution_before: float
    attribution_after: float
    d_minus: float
    d_plus: float
    z: float


def spurious_neurons(
    forget: InfluenceVariation, retain: InfluenceVariation, alpha: float = 1e-3
) -> list[SpuriousNeuron]:
    """Flag neurons whose D⁻ on the forget set exceeds what the retain set shows for the same kind of module.

    The retain set was not to be unlearned, so its D⁻ is what training moves anyway: taking its (1 − α) quantile over
    all layers of a kind as the threshold sets the false-positive rate to α instead of guessing a cut-off.

    Args:
        forget: Variation on the forget set.
        retain: Variation on the retain set, same models, same sites.
        alpha: Share of retain neurons above the threshold, in (0, 1).

    Returns:
        Flagged neurons, largest D⁻ first. None where nothing moved: the threshold itself does not flag.

    Raises:
        UserError: If alpha is outside (0, 1).

    Example:
        >>> from lightning_ssiuu.sites import NeuronSite
        >>> site = NeuronSite("mlp_up", 0, "up", 3)
        >>> zero = NeuronAttribution.empty([site])
        >>> def variation(values):
        ...     return InfluenceVariation(torch.zeros(3).double(), torch.tensor(values).double(), zero, zero)
        >>> flagged = spurious_neurons(variation([0.0, 0.9, 0.1]), variation([0.1, 0.0, 0.2]), alpha=0.1)
        >>> [(neuron.module, neuron.layer, neuron.index) for neuron in flagged]
        [('mlp_up', 0, 1)]
    """
    if not 0 < alpha < 1:
        raise UserError("alpha", alpha, "a false-positive rate in (0, 1)")
    sites = forget.before.sites
    retain_by_site = retain.before.by_site(retain.d_minus)
    forget_by_site = forget.before.by_site(forget.d_minus)
    plus = forget.before.by_site(forget.d_plus)
    before = forget.before.by_site(forget.before.mean_minimum)
    after = forget.after.by_site(forget.after.mean_minimum)
    flagged = []
    for kind in dict.fromkeys(site.kind for site in sites):
        keys = [site.key for site in sites if site.kind == kind]
        usual = torch.cat([retain_by_site[key] for key in keys])
        threshold = usual.quantile(1 - alpha, interpolation="higher")
        # A module the retain set leaves untouched has no spread; any movement is then infinitely unusual.
        mean, spread = usual.mean(), usual.std(correction=0)
        for key in keys:
            for index in (forget_by_site[key] > threshold).nonzero().flatten().tolist():
                d_minus = forget_by_site[key][index]
                flagged.append(
                    SpuriousNeuron(
                        kind,
                        key[0],
                        index,
                        before[key][index].item(),
                        after[key][index].item(),
                        d_minus.item(),
                        plus[key][index].item(),
                        ((d_minus - mean) / spread).item() if spread > 0 else torch.inf,
                    )
                )
    return sorted(flagged, key=lambda neuron: -neuron.d_minus)
