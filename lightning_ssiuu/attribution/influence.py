"""Influence variation: how much positive influence unlearning removed, how much negative influence it added.

Source: arXiv 2509.22263, Eqs. 2, 4 and 5. Decrease of positive influence means *erased*, increase of negative influence
means *hidden*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_ssiuu.attribution.aggregation import NeuronAttribution
from lightning_ssiuu.attribution.weight_change import OwnFlag
from lightning_ssiuu.utils.errors import UserError, check_at_least


@dataclass(frozen=True)
class InfluenceVariation:
    """D⁺ and D⁻ ``[n_neurons]``, both ≥ 0, in units of probability, in the order of ``before.sites``."""

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
    """
    if before.n_examples != after.n_examples or len(before.maximum) != len(after.maximum):
        got = (after.n_examples, len(after.maximum))
        raise UserError("after", got, f"{before.n_examples} examples on {len(before.maximum)} neurons, as before")
    d_plus = (before.mean_maximum - after.mean_positive).clamp(min=0)
    d_minus = (before.mean_minimum - after.mean_minimum).clamp(min=0)
    return InfluenceVariation(d_plus, d_minus, before, after)


def top_sum(values: Tensor, top: int) -> float:
    """Sum of the ``top`` largest values."""
    return values.topk(min(top, values.numel())).values.sum().item()


def cumulative_curve(values: Tensor, points: int = 500_000) -> Tensor:
    """Cumulative sum over neurons sorted by decreasing value, at most ``points`` long (the paper's figure)."""
    return values.sort(descending=True).values[:points].cumsum(0)


def module_layer_means(by_site: Mapping[tuple[int, str], Tensor], top: int = 100) -> dict[tuple[int, str], float]:
    """Mean over the ``top`` largest neurons of every module × layer (the paper's heat map)."""
    return {key: top_sum(v, top) / min(top, v.numel()) for key, v in by_site.items()}


@dataclass(frozen=True)
class SpuriousNeuron:
    """A flagged neuron: one line of ``spurious_neurons.csv``.

    ``attribution_before`` and ``attribution_after`` are mean negative influences (mean over forget examples of
    min_k A); ``z`` says by how many standard deviations of the retain set's D⁻ in the same module its D⁻ lies above
    their mean; ``own_cost`` is the share of the answers' probability, in [0, 1], that its unit's own changed weights
    cost, None where flags are by D⁻.
    """

    module: str
    layer: int
    index: int
    attribution_before: float
    attribution_after: float
    d_minus: float
    d_plus: float
    z: float
    own_cost: float | None = None


def spurious_neurons(
    forget: InfluenceVariation,
    retain: InfluenceVariation,
    alpha: float = 1e-3,
    own: Sequence[OwnFlag] | None = None,
) -> list[SpuriousNeuron]:
    """Flag neurons whose D⁻ on the forget set exceeds what the retain set shows for the same kind of module.

    The retain set was not to be unlearned, so its D⁻ is what training moves anyway: taking its (1 − α) quantile over
    all layers of a kind as the threshold sets the false-positive rate to α instead of guessing a cut-off.

    D⁻ also rises in neurons whose weights nobody touched, upstream and downstream of the one that hides. With ``own``,
    neurons are flagged by what their own changed weights cost instead (alpha is then that of
    :func:`~lightning_ssiuu.attribution.weight_change.own_flags`): precise where a few neurons hide the answer, empty
    where the change is spread over all weights.

    Largest D⁻ first, with ``own`` largest cost. None where nothing moved: the threshold itself does not flag.
    """
    if not 0 < alpha < 1:
        raise UserError("alpha", alpha, "a false-positive rate in (0, 1)")
    sites = forget.before.sites
    retain_by_site = retain.before.by_site(retain.d_minus)
    forget_by_site = forget.before.by_site(forget.d_minus)
    plus = forget.before.by_site(forget.d_plus)
    before = forget.before.by_site(forget.before.mean_minimum)
    after = forget.after.by_site(forget.after.mean_minimum)
    costs = {((flag.layer, kind), flag.index): flag.share for flag in own or () for kind in flag.kinds}
    flagged = []
    for kind in dict.fromkeys(site.kind for site in sites):
        keys = [site.key for site in sites if site.kind == kind]
        usual = torch.cat([retain_by_site[key] for key in keys])
        threshold = usual.quantile(1 - alpha, interpolation="higher")
        # A module the retain set leaves untouched has no spread; any movement is then infinitely unusual.
        mean, spread = usual.mean(), usual.std(correction=0)
        for key in keys:
            above = (forget_by_site[key] > threshold).nonzero().flatten().tolist()
            for index in above if own is None else [i for site, i in costs if site == key]:
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
                        costs.get((key, index)),
                    )
                )
    return sorted(flagged, key=lambda neuron: -(neuron.d_minus if neuron.own_cost is None else neuron.own_cost))


@dataclass(frozen=True)
class Correlation:
    """Pearson ρ with a percentile-bootstrap interval over neurons."""

    rho: float
    low: float
    high: float


def correlation_interval(
    first: Tensor, second: Tensor, confidence: float = 0.95, resamples: int = 400, seed: int = 0
) -> Correlation:
    """Pearson ρ between two models' attributions, with a confidence interval.

    Before and after a harmful attack: the nearer to 1, the less the attack moved (arXiv 2509.22263, Sec. 5). The
    interval is the percentile bootstrap over neurons. Attributions are heavy-tailed, a few neurons carry most of ρ, and
    Fisher's z assumes normal values: its interval would be far too narrow. Neurons are not independent either, so read
    it as the spread that the choice of neurons makes, not that of seeds or examples. 0 where one side does not vary,
    never NaN.
    """
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise UserError("second", tuple(second.shape), f"as many attributions as the first, {tuple(first.shape)}")
    if not 0 < confidence < 1:
        raise UserError("confidence", confidence, "a probability in (0, 1)")
    check_at_least("resamples", resamples, 1)
    x, y = first.double().cpu(), second.double().cpu()
    x, y = x - x.mean(), y - y.mean()
    moments = torch.stack([x, y, x * x, y * y, x * y], 1)
    generator = torch.Generator().manual_seed(seed)
    n = len(x)
    draws = (torch.randint(n, (n,), generator=generator) for _ in range(resamples))
    drawn = torch.stack([torch.bincount(draw, minlength=n).double() @ moments / n for draw in draws])
    tail = (1 - confidence) / 2
    bounds = _pearson(drawn).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Correlation(_pearson(moments.mean(0, keepdim=True)).item(), bounds[0].item(), bounds[1].item())


def _pearson(moments: Tensor) -> Tensor:
    # ρ from rows of mean x, y, x², y², xy; 0 where a variance is 0
    x, y, xx, yy, xy = moments.unbind(1)
    scale = ((xx - x * x).clamp(min=0) * (yy - y * y).clamp(min=0)).sqrt()
    return torch.where(scale > 0, (xy - x * y) / scale.where(scale > 0, 1.0), 0.0).clamp(-1, 1)


CSV_HEADER = tuple(field.name for field in fields(SpuriousNeuron))
