"""Truth ratio, forget quality and model utility against loops and numbers worked out by hand."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction
from itertools import combinations

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ssiuu.evaluation.metrics import ForgetQuality, ModelUtility, TruthRatio
from lightning_ssiuu.evaluation.metrics.truth_ratio import forget_quality, truth_ratio
from lightning_ssiuu.evaluation.scorer import Scorer
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.utils.errors import UserError

# Of each example the true answer's probability per token, then the wrong ones': 1 to 4 options, not all alike
PROBABILITIES = [[0.5, 0.25, 0.0625], [0.1, 0.2], [0.3, 0.3, 0.3, 0.3], [0.8, 0.1, 0.4]]
RATIOS = [math.sqrt(0.25 * 0.0625) / 0.5, 2.0, 1.0, 0.2 / 0.8]


def options(examples: list[list[float]]) -> tuple[Tensor, Tensor, int]:
    logps = torch.tensor([p for example in examples for p in example], dtype=torch.float64).log()
    rows = [row for row, example in enumerate(examples) for _ in example]
    return logps, torch.tensor(rows, dtype=torch.long), len(examples)


def test_truth_ratio_by_hand() -> None:
    torch.testing.assert_close(truth_ratio(*options(PROBABILITIES)), torch.tensor(RATIOS).double())


def test_truth_ratio_at_the_edges() -> None:
    ratios = truth_ratio(*options([[0.5], [0.5, math.nan], [0.5, 0.0], [0.0, 0.5], [0.5, 0.5]]))
    assert ratios[:2].isnan().all()
    assert ratios[2:].tolist() == [0.0, math.inf, 1.0]
    assert TruthRatio("forget")._worth(ratios)[2:].tolist() == [0.0, 0.0, 1.0]
    assert TruthRatio("retain")._worth(ratios)[2:].tolist() == [1.0, 0.0, 0.0]
    assert TruthRatio("forget")._worth(ratios)[:2].isnan().all()
    assert TruthRatio("retain")._worth(ratios)[:2].isnan().all()
    with pytest.raises(UserError, match="kind: got 'both'"):
        TruthRatio("both")


def test_truth_ratio_of_bf16_is_worked_out_in_double() -> None:
    logps = torch.tensor([-300.0, -1.0, -2.0, -4.0], dtype=torch.bfloat16)  # their mean, −7/3, is no bf16
    ratios = truth_ratio(logps, torch.tensor([0, 0, 0, 0]), 1)
    assert ratios.item() == pytest.approx(math.exp(300 - 7 / 3), rel=1e-12)


def test_both_means_by_hand() -> None:
    by_hand = {
        "forget": sum(min(ratio, 1 / ratio) for ratio in RATIOS) / 4,
        "retain": sum(max(0.0, 1 - ratio) for ratio in RATIOS) / 4,
    }
    for kind, expected in by_hand.items():
        for sizes in ([4], [3, 1], [1, 1, 2]):
            metric, start = TruthRatio(kind), 0
            metric.update(*options(PROBABILITIES))
            metric.reset()
            for size in sizes:
                metric.update(*options(PROBABILITIES[start : start + size]))
                start += size
            assert metric.compute().item() == pytest.approx(100 * expected, rel=1e-12)


def exact_p_value(first: list[float], second: list[float]) -> float:
    """Share of all ways to split the pooled values (no ties) whose distance is at least the one seen."""

    def distance(ours: set[int]) -> Fraction:
        gap, largest = Fraction(0), Fraction(0)
        for place in range(len(pooled)):
            gap += Fraction(1, len(first)) if place in ours else -Fraction(1, len(second))
            largest = max(largest, abs(gap))
        return largest

    pooled = sorted(first + second)
    seen = distance({pooled.index(value) for value in first})
    splits = [set(split) for split in combinations(range(len(pooled)), len(first))]
    return sum(distance(split) >= seen for split in splits) / len(splits)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]),
        ([0.1, 0.5, 0.3, 0.7], [0.2, 0.6, 0.4, 0.8]),
        ([0.9, 0.8, 0.1], [0.3, 0.5, 0.85, 0.87, 1.2]),
    ],
)
def test_forget_quality_is_the_share_of_orders_that_far_apart(first: list[float], second: list[float]) -> None:
    found = forget_quality(torch.tensor(first).double(), torch.tensor(second).double())
    assert found == pytest.approx(exact_p_value(first, second), rel=1e-9)
    swapped = forget_quality(torch.tensor(second).double(), torch.tensor(first).double())
    assert swapped == pytest.approx(found, rel=1e-9)


def test_forget_quality_edges() -> None:
    ratios = torch.tensor([0.1, 0.2, math.inf])
    assert forget_quality(ratios, ratios.flip(0)) == 1
    assert math.isnan(forget_quality(ratios, torch.tensor([0.1, math.nan])))
    for pair in ((ratios, ratios[:0]), (ratios[:0], ratios)):
        with pytest.raises(UserError, match="ratios: got 0, allowed: at least one example"):
            forget_quality(*pair)
    with pytest.raises(UserError, match="retrained_ratios: got 0"):
        ForgetQuality([])


def test_forget_quality_over_batches() -> None:
    reference = [0.3, 0.35, 1.5, 2.5, 3.0]
    expected = exact_p_value(RATIOS, reference)
    for sizes in ([4], [3, 1], [1, 0, 1, 2]):
        metric, start = ForgetQuality(reference), 0
        metric.update(*options(PROBABILITIES))
        metric.reset()
        for size in sizes:
            metric.update(*options(PROBABILITIES[start : start + size]))
            start += size
        for copy in (metric, metric.clone(), pickle.loads(pickle.dumps(metric))):
            assert copy.compute().item() == pytest.approx(expected, rel=1e-9)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert ForgetQuality(reference).compute().isnan()


def model_utility(values: list[float], dtype: torch.dtype = torch.float64) -> float:
    metric = ModelUtility([f"score {n}" for n in range(len(values))])
    for n, value in enumerate(values):
        metric.update(f"score {n}", torch.tensor([value], dtype=dtype))
    return metric.compute().item() / 100


def test_model_utility_by_hand() -> None:
    assert model_utility([0.5, 0.25, 1.0]) == pytest.approx(3 / (2 + 4 + 1))
    assert model_utility([0.5, 0.25, 1.0], torch.bfloat16) == pytest.approx(3 / 7)
    assert model_utility([0.0, 1.0]) == 0
    assert math.isnan(model_utility([math.nan, 1.0]))
    with pytest.raises(UserError, match="values: got"):
        model_utility([0.5, -0.1])
    with pytest.raises(UserError, match="names: got"):
        model_utility([])


def test_model_utility_takes_means_first() -> None:
    metric = ModelUtility(["probability", "rouge_l", "correct"])
    metric.update("probability", torch.full((1000,), 0.5, dtype=torch.bfloat16))
    metric.update("probability", torch.tensor([1.0]))
    metric.update("rouge_l", torch.tensor([0.25, 0.75]))
    assert metric.compute().isnan()  # nothing said about the third yet
    metric.update("correct", torch.tensor([True, False, False, False]))
    means = [501 / 1001, 0.5, 0.25]
    assert metric.compute().item() == pytest.approx(100 * 3 / sum(1 / mean for mean in means), rel=1e-12)
    with pytest.raises(UserError, match="name: got 'other'"):
        metric.update("other", torch.tensor([1.0]))
    for names in ([], ["a", "a"], "a"):
        with pytest.raises(UserError, match="names: got"):
            ModelUtility(names)


@pytest.mark.parametrize("metric", [TruthRatio("forget"), ForgetQuality([0.5, 1.5]), ModelUtility(["a"])])
def test_states_stay_wide(metric: Metric) -> None:
    holder = torch.nn.ModuleDict({"metric": metric})
    for _ in range(2):  # with and without values
        holder.to(torch.bfloat16)
        metric.update(*(("a", torch.tensor([0.1])) if isinstance(metric, ModelUtility) else options(PROBABILITIES)))
        states = [s for state in metric.metric_state.values() for s in (state if isinstance(state, list) else [state])]
        assert {state.dtype for state in states} <= {torch.float64, torch.long}


def test_scored_by_name_on_data_with_options() -> None:
    model, tokenizer = AnswerModel(load_model("tiny")), load_tokenizer("tiny")
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 10]])
    labels = torch.tensor([[-100, -100, 7, 8], [-100, -100, -100, 10]])
    given = torch.tensor([[5, 6, 7, 8], [5, 6, 11, 12], [5, 6, 7, 13], [5, 6, 9, 10], [5, 6, 9, 14]])
    asked = torch.tensor([[0, 0, 1, 1]] * 3 + [[0, 0, 0, 1]] * 2).bool()
    rows = torch.tensor([0, 0, 0, 1, 1])
    part = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "options": {
            "input_ids": given,
            "attention_mask": torch.ones_like(given),
            "labels": given.where(asked, -100),
            "option_of": rows,
        },
    }
    names = ["truth_ratio_forget", "truth_ratio_retain"]
    scorer = Scorer(model, tokenizer, names)
    scorer.update({"forget": part})
    with torch.no_grad():
        logps = model.hf(given).logits.log_softmax(-1)
    means = []
    for row in range(5):
        places = asked[row].nonzero().flatten().tolist()
        means.append(sum(logps[row, place - 1, given[row, place]].item() for place in places) / len(places))
    ratios = [math.exp((means[1] + means[2]) / 2 - means[0]), math.exp(means[4] - means[3])]
    found = scorer.compute()["forget"]
    assert found[names[0]] == pytest.approx(100 * sum(min(r, 1 / r) for r in ratios) / 2, rel=1e-4)
    assert found[names[1]] == pytest.approx(100 * sum(max(0.0, 1 - r) for r in ratios) / 2, rel=1e-4)
    part.pop("options")
    with pytest.raises(UserError, match="every example needs options"):
        Scorer(model, tokenizer, names).update({"forget": part})
