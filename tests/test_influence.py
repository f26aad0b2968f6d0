"""Influence variation and the spurious-neuron flag (arXiv 2509.22263, Eqs. 2, 4, 5), worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_ssiuu.errors import UserError
from lightning_ssiuu.functional.attribution import NeuronAttribution
from lightning_ssiuu.functional.influence import (
    InfluenceVariation,
    cumulative_curve,
    influence_variation,
    module_layer_means,
    spurious_neurons,
    top_sum,
)
from lightning_ssiuu.sites import NeuronSite

UP, DOWN = NeuronSite("mlp_up", 0, "up", 3), NeuronSite("mlp_down", 0, "down", 1)


def attribution(maxima: list[list[float]], minima: list[list[float]]) -> NeuronAttribution:
    """Rows are examples; three neurons of one site and one of another."""
    result = NeuronAttribution.empty([UP, DOWN])
    high, low = torch.tensor(maxima), torch.tensor(minima)
    for row in range(len(high)):  # in two batches
        one = slice(row, row + 1)
        result.add({UP.key: high[one, :3], DOWN.key: high[one, 3:]}, {UP.key: low[one, :3], DOWN.key: low[one, 3:]})
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
