"""Influence variation and the spurious-neuron flag (arXiv 2509.22263, Eqs. 2, 4, 5), worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from flag_overlap import flag_overlap
from toys.attribution import add

from lightning_ssiuu.attribution.activation_gradient import NeuronAttribution
from lightning_ssiuu.attribution.influence import (
    InfluenceVariation,
    SpuriousNeuron,
    correlation_interval,
    cumulative_curve,
    influence_variation,
    module_layer_means,
    spurious_neurons,
    top_sum,
)
from lightning_ssiuu.attribution.weight_change import OwnFlag
from lightning_ssiuu.models.architectures import NeuronSite
from lightning_ssiuu.utils.errors import UserError

UP, DOWN = NeuronSite("mlp_up", 0, "up", 3), NeuronSite("mlp_down", 0, "down", 1)


def attribution(maxima: list[list[float]], minima: list[list[float]]) -> NeuronAttribution:
    """Rows are examples; three neurons of one site and one of another."""
    result = NeuronAttribution.empty([UP, DOWN])
    high, low = torch.tensor(maxima), torch.tensor(minima)
    for row in range(len(high)):  # in two batches
        one = slice(row, row + 1)
        add(result, *({UP.key: values[one, :3], DOWN.key: values[one, 3:]} for values in (high, low)))
    return result


BEFORE = attribution([[0.4, 0.2, -0.1, 0.5], [0.2, 0.6, 0.3, 0.5]], [[-0.1, 0.1, -0.2, 0.0], [0.0, -0.3, -0.4, 0.0]])
AFTER = attribution([[-0.2, 0.3, -0.3, 0.1], [0.1, 0.1, 0.1, 0.2]], [[-0.5, 0.1, -0.1, 0.0], [-0.1, -0.3, -0.1, -0.6]])


def test_by_hand() -> None:
    variation = influence_variation(BEFORE, AFTER)
    # Neuron 0: the first example's −0.2 counts as 0 (over-unlearning erases no more than there was): .3 − (0 + .1)/2.
    # Neuron 2: before, the first example's −0.1 counts as it is: (−.1 + .3)/2 − (0 + .1)/2.
    assert variation.d_plus.tolist() == pytest.approx([0.25, 0.2, 0.05, 0.35])
    # Neuron 2 became less negative: 0, not −0.2. The mean is taken before the outer max: neuron 1 is exactly 0.
    assert variation.d_minus.tolist() == pytest.approx([0.25, 0.0, 0.0, 0.3])
    summary = variation.summary(top=2)
    expected = {"d_plus_total": 0.85, "d_minus_total": 0.55, "d_plus_top2": 0.6, "d_minus_top2": 0.55}
    assert summary == pytest.approx(expected)
    assert set(variation.summary()) == {"d_plus_total", "d_minus_total", "d_plus_top100", "d_minus_top100"}


def test_means_are_taken_before_the_outer_maximum() -> None:
    before = attribution([[1.0, 0, 0, 0], [0.0, 0, 0, 0]], [[0.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    after = attribution([[0.0, 0, 0, 0], [1.0, 0, 0, 0]], [[-1.0, 0, 0, 0], [0.0, 0, 0, 0]])
    variation = influence_variation(before, after)
    assert variation.d_plus[0] == variation.d_minus[0] == 0


def test_the_same_model_moves_nothing_unless_its_best_was_negative() -> None:
    variation = influence_variation(BEFORE, BEFORE)
    assert variation.d_plus.sum() == variation.d_minus.sum() == 0


def test_curves_and_sums() -> None:
    values = torch.tensor([0.5, 2.0, 1.0, 0.0])
    assert cumulative_curve(values).tolist() == [2.0, 3.0, 3.5, 3.5]
    assert cumulative_curve(values, points=2).tolist() == [2.0, 3.0]
    assert [top_sum(values, n) for n in (1, 3, 100)] == [2.0, 3.5, 3.5]
    assert module_layer_means({(0, "mlp_up"): values, (3, "attn_q"): values[:1]}, top=2) == {
        (0, "mlp_up"): 1.5,
        (3, "attn_q"): 0.5,
    }


def test_different_examples_or_neurons() -> None:
    with pytest.raises(UserError, match="2 examples on 4 neurons"):
        influence_variation(BEFORE, attribution([[0.0] * 4], [[0.0] * 4]))
    other = NeuronAttribution.empty([UP])
    other.n_examples = 2
    with pytest.raises(UserError, match="after"):
        influence_variation(BEFORE, other)


# ---- the flag ----------------------------------------------------------------------------------------------------


def drawn(values: torch.Tensor, sites: list[NeuronSite]) -> InfluenceVariation:
    zero = NeuronAttribution.empty(sites)
    return InfluenceVariation(torch.zeros_like(values), values, zero, zero)


@pytest.mark.parametrize("alpha", [1e-3, 1e-2, 0.1])
def test_equal_distributions_are_flagged_at_the_rate_alpha(alpha: float) -> None:
    sites = [NeuronSite(kind, layer, f"{kind}{layer}", 20_000) for layer in range(2) for kind in ("mlp_up", "attn_q")]
    generator = torch.Generator().manual_seed(0)

    def random() -> torch.Tensor:
        scale = torch.tensor([1.0, 30.0, 1.0, 30.0]).repeat_interleave(20_000)  # kinds differ, layers do not
        return (torch.randn(80_000, generator=generator).exp() * scale).double()

    flagged = spurious_neurons(drawn(random(), sites), drawn(random(), sites), alpha)
    for kind in ("mlp_up", "attn_q"):
        rate = sum(neuron.module == kind for neuron in flagged) / 40_000
        assert abs(rate - alpha) < 5 * math.sqrt(2 * alpha / 40_000)


def test_nothing_moved_nothing_flagged() -> None:
    assert (
        spurious_neurons(drawn(torch.zeros(4).double(), [UP, DOWN]), drawn(torch.zeros(4).double(), [UP, DOWN])) == []
    )
    same = drawn(torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), [UP, DOWN])
    assert spurious_neurons(same, same, 1e-3) == []


def test_row_of_the_table() -> None:
    forget = influence_variation(BEFORE, AFTER)
    retain = drawn(torch.tensor([0.1, 0.0, 0.2, 0.3]).double(), [UP, DOWN])
    (neuron,) = spurious_neurons(forget, retain, alpha=0.01)
    # mlp_down's 0.3 is not above its threshold of 0.3; mlp_up's 0.25 is above 0.2, three retain values of spread 0.0816
    assert (neuron.module, neuron.layer, neuron.index) == ("mlp_up", 0, 0)
    assert neuron.attribution_before == pytest.approx(-0.05)
    assert neuron.attribution_after == pytest.approx(-0.3)
    assert (neuron.d_minus, neuron.d_plus) == pytest.approx((0.25, 0.25))
    assert neuron.z == pytest.approx((0.25 - 0.1) / math.sqrt(0.02 / 3))


def test_order_and_unmoved_retain() -> None:
    flagged = spurious_neurons(
        drawn(torch.tensor([0.1, 0.3, 0.0, 0.2]).double(), [UP, DOWN]), drawn(torch.zeros(4).double(), [UP, DOWN])
    )
    assert [(n.module, n.index, n.z) for n in flagged] == [
        ("mlp_up", 1, math.inf),
        ("mlp_down", 0, math.inf),
        ("mlp_up", 0, math.inf),
    ]


@pytest.mark.parametrize("alpha", [0, 1, -1, math.nan])
def test_bad_alpha(alpha: float) -> None:
    same = drawn(torch.zeros(4).double(), [UP, DOWN])
    with pytest.raises(UserError, match="alpha"):
        spurious_neurons(same, same, alpha)


# ---- agreement between models ----------------------------------------------------------------------------------------


def test_correlation_by_hand() -> None:
    # Deviations (-1.5, -.5, .5, 1.5) and (-1.5, .5, -.5, 1.5): 2.25 − .25 − .25 + 2.25 = 4 over 5
    found = correlation_interval(torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 30, 20, 40]))
    assert found.rho == pytest.approx(0.8)
    assert -1 <= found.low <= 0.8 <= found.high <= 1
    same = correlation_interval(torch.arange(50.0), 3 * torch.arange(50.0) + 7)
    assert (same.rho, same.low, same.high) == pytest.approx((1, 1, 1))
    flat = correlation_interval(torch.arange(5.0), torch.ones(5))
    assert (flat.rho, flat.low, flat.high) == (0, 0, 0)


def test_interval_covers_the_true_correlation() -> None:
    generator = torch.Generator().manual_seed(0)
    covered, width = 0, 0.0
    for _ in range(60):
        shared, one, two = torch.randn(3, 300, generator=generator)
        found = correlation_interval(shared + one, shared + two, confidence=0.9, resamples=200)  # ρ = 0.5
        covered += found.low <= 0.5 <= found.high
        width += (found.high - found.low) / 60
    assert 0.8 <= covered / 60 <= 0.98
    # Of normal values Fisher's z gives 2 · 1.645 (1 − ρ²) / √n
    assert width == pytest.approx(2 * 1.645 * 0.75 / math.sqrt(300), rel=0.15)


@pytest.mark.parametrize(
    ("second", "options"),
    [(torch.ones(3), {}), (torch.ones(4), {"confidence": 1.0}), (torch.ones(4), {"resamples": 0})],
)
def test_bad_correlation(second: torch.Tensor, options: dict) -> None:
    with pytest.raises(UserError):
        correlation_interval(torch.ones(4), second, **options)


def flags(*places: tuple[str, int]) -> list[SpuriousNeuron]:
    return [SpuriousNeuron(kind, 0, index, 0.0, -1.0, 1.0, 0.0, 9.0) for kind, index in places]


def test_overlap_by_hand() -> None:
    sites = [NeuronSite("mlp_up", 0, "up", 10), NeuronSite("mlp_down", 0, "down", 4)]
    one, two = flags(("mlp_up", 0), ("mlp_up", 1), ("mlp_down", 3)), flags(("mlp_up", 1), ("mlp_down", 3))
    found = flag_overlap([one, two], sites)
    assert found.jaccard == pytest.approx(2 / 3)
    # Expected in both: 2·1/10 + 1·1/4 = 0.45 of 5 − 0.45
    assert found.chance == pytest.approx(0.45 / 4.55)
    three = flag_overlap([one, two, []], sites)
    assert (three.jaccard, three.chance, three.n_pairs) == pytest.approx((2 / 9, 0.45 / 4.55 / 3, 3))
    assert flag_overlap([[], []], sites).jaccard == 0
    with pytest.raises(UserError, match="two runs"):
        flag_overlap([one], sites)


def test_random_flags_overlap_at_the_level_of_chance() -> None:
    sites = [NeuronSite("mlp_up", 0, "up", 1000)]
    generator = torch.Generator().manual_seed(0)
    runs = [flags(*(("mlp_up", i) for i in torch.randperm(1000, generator=generator)[:200].tolist())) for _ in range(8)]
    found = flag_overlap(runs, sites)
    assert found.n_pairs == 28
    assert found.jaccard == pytest.approx(found.chance, rel=0.1)


def test_flags_by_own_change() -> None:
    forget, retain = influence_variation(BEFORE, AFTER), drawn(torch.zeros(4).double(), [UP, DOWN])

    own = [OwnFlag(0, ("mlp_up",), 1, 0.2), OwnFlag(0, ("mlp_down",), 0, 0.7)]
    found = spurious_neurons(forget, retain, own=own)
    assert [(n.module, n.index) for n in found] == [("mlp_down", 0), ("mlp_up", 1)]
    assert [n.own_cost for n in found] == pytest.approx([1 - math.exp(-0.7), 1 - math.exp(-0.2)])
    # The row's other figures are those of D⁻: neuron 3 of the hand-worked example
    assert (found[0].d_minus, found[0].d_plus) == pytest.approx((0.3, 0.35))
    assert spurious_neurons(forget, retain, own=[]) == []
