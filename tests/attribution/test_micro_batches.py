"""Aggregation: batches cut to a memory budget, the estimate behind it, sums that do not underflow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toys.attribution import add
from toys.models import answer_model, part

from lightning_ssiuu.attribution import aggregation, micro_batches
from lightning_ssiuu.attribution.activation_gradient import NeuronAttribution, neuron_attribution
from lightning_ssiuu.attribution.micro_batches import parse_bytes, pass_bytes
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import NeuronSite, neuron_sites
from lightning_ssiuu.models.meta import give_memory
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.simulation import Simulation

# ---- the budget --------------------------------------------------------------------------------------------------

EXAMPLES = [part([(prompt, 2)], prompt) for prompt in (3, 9, 4, 20, 5, 6, 3)]


def batches(model: AnswerModel, parts: Any, budget: int | str | None) -> list[Any]:
    return [(batch, real) for batch, real in micro_batches.micro_batches(model.hf, parts, [], budget)]


def test_batches_hold_all_examples_in_order_and_fit() -> None:
    model = answer_model(dtype=torch.float32)
    budget = pass_bytes(model.hf, [], 2, 15, 4)
    cut = batches(model, EXAMPLES, budget)
    assert all(real for _, real in cut)
    rows = [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for batch, _ in cut
        for ids, mask, labels in zip(*(batch[n] for n in ("input_ids", "attention_mask", "labels")), strict=True)
    ]
    assert rows == [(one["input_ids"][0].tolist(), one["labels"][0].tolist()) for one in EXAMPLES]
    sizes = [tuple(batch["input_ids"].shape) for batch, _ in cut]
    assert 1 < len(sizes) < len(EXAMPLES)
    for (batch, _), (n, length) in zip(cut, sizes, strict=True):
        n_labels = int((batch["labels"] != -100).sum())
        assert pass_bytes(model.hf, [], n, length, n_labels) <= budget
        assert int(batch["attention_mask"].sum(1).max()) == length  # no padding beyond the longest
    taken = 0
    for n, length in sizes[:-1]:  # an example more would not have fitted
        taken += n
        longest = max(length, EXAMPLES[taken]["input_ids"].shape[1])
        assert pass_bytes(model.hf, [], n + 1, longest, 2 * (n + 1)) > budget
    assert [batch for batch, _ in batches(model, EXAMPLES, None)] == EXAMPLES


@pytest.mark.parametrize("examples", [1, 3])
def test_cutting_changes_nothing_but_rounding(examples: int) -> None:
    model = answer_model()
    sites = neuron_sites(model.hf)
    whole = neuron_attribution(model, [part([(6, 2), (3, 4), (9, 1), (2, 2), (5, 5)], 2)], sites)
    budget = pass_bytes(model.hf, sites, examples, 10, 5 * examples)
    cut = neuron_attribution(model, [part([(6, 2), (3, 4), (9, 1), (2, 2), (5, 5)], 2)], sites, memory_budget=budget)
    for field in ("maximum", "positive", "minimum"):
        left, right = getattr(cut, field), getattr(whole, field)
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-9 * right.abs().max().item())
    assert cut.n_examples == 5
    assert cut.log_probabilities == pytest.approx(whole.log_probabilities)


def test_ranks_make_equally_many_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded weights are gathered by all ranks at once; what is repeated for that does not count."""
    model = answer_model(dtype=torch.float32)
    sites = neuron_sites(model.hf)
    alone = neuron_attribution(model, EXAMPLES[:2], sites, memory_budget="1GB")
    monkeypatch.setattr(micro_batches, "world_size", lambda: 2)
    monkeypatch.setattr(micro_batches, "gathered", lambda mine: [mine, 3])
    cut = batches(model, EXAMPLES[:2], "1GB")
    assert [real for _, real in cut] == [True, False, False]
    asked: list[int] = []
    monkeypatch.setattr(micro_batches, "gathered", lambda mine: asked.append(mine) or [mine, 3])
    next(micro_batches.micro_batches(model.hf, EXAMPLES[:2], [], "1GB"))
    assert asked == [1]  # before the first pass, in which weights are gathered
    monkeypatch.setattr(micro_batches, "gathered", lambda mine: [mine, 3])
    together = neuron_attribution(model, EXAMPLES[:2], sites, memory_budget="1GB")
    assert torch.equal(together.maximum, alone.maximum)
    assert together.n_examples == 2


@pytest.mark.parametrize(
    ("size", "expected"), [(7, 7), ("2GB", 2 * 10**9), ("1.5 MiB", 3 << 19), ("12", 12), ("3k", 3000), ("1 tb", 10**12)]
)
def test_sizes(size: Any, expected: int) -> None:
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", [0, -1, "", "GB", "2XB", "1e9", "half", math.nan, "0.1"])
def test_no_sizes(size: Any) -> None:
    with pytest.raises(UserError, match="memory_budget"):
        parse_bytes(size)


def test_a_budget_too_small_for_one_example() -> None:
    model = answer_model()
    with pytest.raises(UserError, match=r"memory_budget: got 1000, allowed: at least [\d,]+ bytes, .* of 22 tokens"):
        neuron_attribution(model, EXAMPLES[3:4], neuron_sites(model.hf), memory_budget="1kB")


# ---- the estimate ------------------------------------------------------------------------------------------------


def simulated_peak(name: str, rows: Any, dtype: torch.dtype, **kwargs: Any) -> int:
    """Bytes beside the weights, found by going through the pass itself on tensors without memory."""
    model, device = answer_model(name, dtype, **kwargs).to("meta"), torch.device("cpu")
    with Simulation(device) as simulation:
        give_memory(model, device)
        simulation.tag_rest("weights")
        with simulation.phase("attribution"):
            neuron_attribution(model, [part(rows)], neuron_sites(model.hf))
    peak = simulation.peak("attribution")
    return peak.total - peak.by_tag["weights"]


@pytest.mark.parametrize(
    ("name", "rows", "options"),
    [
        ("llama", [(20, 4)] * 4, {}),
        ("llama", [(90, 4)] * 2, {"attn_implementation": "eager"}),
        ("llama", [(8, 8)] * 4, {"vocab_size": 5000}),
        ("llama", [(20, 4)] * 2, {"dtype": torch.bfloat16, "num_hidden_layers": 4}),
        ("gpt2", [(20, 4)] * 4, {}),
        ("gpt_neo", [(30, 4)] * 2, {}),
        ("gpt_neox", [(6, 2)], {}),
        ("qwen3", [(20, 4)] * 4, {}),
        ("olmo2", [(20, 4)] * 4, {}),
    ],
)
def test_the_estimate_bounds_what_a_pass_takes(name: str, rows: Any, options: dict[str, Any]) -> None:
    options = {"dtype": torch.float32} | options
    model = answer_model(name, **options)
    labels = sum(answer for _, answer in rows)
    estimate = pass_bytes(model.hf, neuron_sites(model.hf), len(rows), sum(rows[0]), labels)
    peak = simulated_peak(name, rows, **options)
    assert peak <= estimate <= 2 * peak


# ---- sums that do not underflow ----------------------------------------------------------------------------------

SITE = NeuronSite("mlp_up", 0, "up", 2)


def added(*examples: tuple[list[float], float]) -> NeuronAttribution:
    result = NeuronAttribution.empty([SITE])
    for values, log_factor in examples:
        high = torch.tensor([values])
        add(result, {SITE.key: high}, {SITE.key: high - 1}, torch.tensor([log_factor]))
    return result


def test_scale_follows_the_largest_factor() -> None:
    assert added(([1.0, -2.0], -400.0)).log_scale == 0
    tiny = added(([1.0, -2.0], -900.0))
    assert tiny.log_scale == -900
    assert tiny.maximum.tolist() == [1, -2]
    assert tiny.minimum.tolist() == [0, -3]
    assert tiny.mean_maximum.tolist() == [0, 0]
    both = added(([1.0, -2.0], -900.0), ([1.0, 3.0], -899.0))
    assert both.log_scale == -899
    assert both.maximum.tolist() == pytest.approx([1 + math.exp(-1), 3 - 2 * math.exp(-1)])
    assert both.positive.tolist() == pytest.approx([1 + math.exp(-1), 3])
    reverse = added(([1.0, 3.0], -899.0), ([1.0, -2.0], -900.0))
    torch.testing.assert_close(reverse.maximum, both.maximum)
    mixed = added(([1.0, -2.0], -900.0), ([1.0, 3.0], -2.0))
    assert mixed.log_scale == 0
    assert mixed.mean_maximum.tolist() == pytest.approx([math.exp(-2) / 2, 3 * math.exp(-2) / 2])


def test_ranks_with_different_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = added(([1.0, -2.0], -900.0)), added(([1.0, 3.0], -899.0))
    shares = iter([[mine.highest_log, theirs.highest_log], None, [[], []]])

    def gathered(value: Any) -> list[Any]:
        if (share := next(shares)) is not None:
            return share
        scaled = [
            field * math.exp(theirs.log_scale + 899) for field in (theirs.maximum, theirs.positive, theirs.minimum)
        ]
        return [value, (*scaled, theirs.n_examples)]

    monkeypatch.setattr(aggregation, "world_size", lambda: 2)
    monkeypatch.setattr(aggregation, "gathered", gathered)
    total, expected = mine.over_ranks(), added(([1.0, -2.0], -900.0), ([1.0, 3.0], -899.0))
    assert (total.log_scale, total.n_examples) == (-899, 2)
    for field in ("maximum", "positive", "minimum"):
        torch.testing.assert_close(getattr(total, field), getattr(expected, field))


def test_a_very_long_answer_keeps_its_attributions() -> None:
    """P = e^−900 is no float64; relative to it the attributions are those of log P."""
    model, one = answer_model(dtype=torch.float32, max_position_embeddings=512), part([(3, 250)])
    sites = neuron_sites(model.hf)
    result = neuron_attribution(model, [one], sites)
    assert result.log_probabilities[0] < -760
    assert math.exp(result.log_probabilities[0]) == 0
    assert result.log_scale == pytest.approx(result.log_probabilities[0])
    by_token = neuron_attribution(model, [one], sites, "log_probability")
    expected: Tensor = by_token.maximum * 250  # log P / T
    torch.testing.assert_close(result.maximum, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert (result.maximum != 0).double().mean() > 0.99
