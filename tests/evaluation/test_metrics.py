"""Scores against numbers worked out by hand, over batches, dtypes and processes."""

from __future__ import annotations

import json
import math
import multiprocessing
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from toys.ranks import ranks

from lightning_ssiuu.evaluation.metrics import (
    AnswerAccuracy,
    AnswerProbability,
    ExactMemorization,
    ExtractionStrength,
    ForgetQuality,
    HighestProbability,
    MembershipAUC,
    ModelUtility,
    PrivLeak,
    RougeL,
    TruthRatio,
)
from lightning_ssiuu.evaluation.metrics.answers import (
    answer_accuracy,
    answer_probability,
    multiple_choice_accuracy,
)
from lightning_ssiuu.utils.errors import UserError

ROWS = torch.tensor([0, 0, 0, 1, 3, 3])  # row 2 has no token
LOGPS = torch.tensor([0.5, 0.25, 0.125, 0.9, 1.0, 0.01], dtype=torch.float64).log()


def test_answer_probability_by_hand() -> None:
    expected = [0.25, 0.9, math.nan, 0.1]  # geometric means: (2^-6)^(1/3), 0.9, none, sqrt(0.01)
    torch.testing.assert_close(answer_probability(LOGPS, ROWS, 4), torch.tensor(expected).double(), equal_nan=True)


def test_answer_probability_at_the_edges() -> None:
    rows = torch.tensor([0, 0, 1, 2])
    values = answer_probability(torch.tensor([-torch.inf, -1.0, 1e-7, torch.nan]), rows, 3)
    assert values[:2].tolist() == [0.0, 1.0]  # never above one, whatever the rounding
    assert values[2].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_answer_probability_sums_in_double(dtype: torch.dtype) -> None:
    logps = torch.full((3000,), -0.5, dtype=dtype)  # the half-precision sum would stop growing
    value = answer_probability(logps, torch.zeros(3000, dtype=torch.long), 1)
    assert value.dtype == torch.float64
    assert value.item() == math.exp(-0.5)


def test_answer_accuracy_by_hand() -> None:
    correct = torch.tensor([True, False, True, True, False, True])
    assert answer_accuracy(correct, ROWS, 4, "first_token").tolist() == [True, True, False, False]
    assert answer_accuracy(correct, ROWS, 4, "all_tokens").tolist() == [False, True, False, False]
    empty = torch.zeros(0, dtype=torch.long)
    assert answer_accuracy(empty.bool(), empty, 2, "first_token").tolist() == [False, False]
    with pytest.raises(UserError, match="kind: got 'some'"):
        answer_accuracy(correct, ROWS, 4, "some")


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("scores", "right"),
    [
        ([-1.0, -2.0, -3.0], True),
        ([-2.0, -1.0, -3.0], False),
        ([-2.0, -3.0, -1.0], False),
        ([-1.0, -1.0, -3.0], False),  # a tie
        ([NAN, -1.0, -2.0], False),
        ([-1.0, NAN, -2.0], False),
        ([-1.0, -2.0, NAN], False),
        ([-INF, -INF, -INF], False),
        ([-1.0, -INF, -INF], True),
        ([-1.0], True),
    ],
)
def test_multiple_choice_by_hand(scores: list[float], right: bool) -> None:
    option_of = torch.zeros(len(scores), dtype=torch.long)
    assert multiple_choice_accuracy(torch.tensor(scores), option_of).tolist() == [right]
    # the same among neighbours, with another number of options
    among = torch.tensor([5.0, 1.0, *scores, 1.0, 5.0, 0.0, 0.0])
    option_of = torch.tensor([0, 0, *[1] * len(scores), 2, 2, 2, 2])
    assert multiple_choice_accuracy(among, option_of).tolist() == [True, right, False]


def test_multiple_choice_in_half_precision() -> None:
    scores = torch.tensor([-1.0, -2.0, -2.0, -1.0], dtype=torch.bfloat16)
    assert multiple_choice_accuracy(scores, torch.tensor([0, 0, 1, 1])).tolist() == [True, False]


# -- classes ----------------------------------------------------------------------------------------------------

N = 23
CORRECT = torch.arange(N) % 3 == 0  # 8 of 23
PROBABILITIES = (torch.arange(N, dtype=torch.float64) + 1) / 32  # sum 276 / 32
PREDICTIONS = [f"it is {n % 4}" for n in range(N)]
REFERENCES = ["it is 0"] * N  # 6 of 23 whole, the others two words of three


def slices(sizes: list[int]) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def update(metric: Metric, part: slice) -> None:
    if isinstance(metric, RougeL):
        metric.update(PREDICTIONS[part], REFERENCES[part])
    else:
        metric.update(CORRECT[part] if isinstance(metric, AnswerAccuracy) else PROBABILITIES[part])


CASES = [
    (AnswerAccuracy, 100 * 8 / 23),
    (AnswerProbability, 100 * 276 / 32 / 23),
    (HighestProbability, 100 * 23 / 32),
    (RougeL, 100 * (6 + 17 * 2 / 3) / 23),
]
every_metric = pytest.mark.parametrize(("metric_class", "expected"), CASES)


@every_metric
@pytest.mark.parametrize("sizes", [[23], [8, 8, 7], [16, 7], [1] * 23, [22, 1], [0, 23]])
def test_batches_do_not_matter(metric_class: type[Metric], expected: float, sizes: list[int]) -> None:
    metric = metric_class()
    for part in slices(sizes):
        update(metric, part)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)
    assert metric.compute().shape == ()


@every_metric
def test_reset_clone_pickle_and_nothing_yet(metric_class: type[Metric], expected: float) -> None:
    metric = metric_class()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute().isnan()
    update(metric, slice(0, 5))
    metric.reset()
    update(metric, slice(0, N))
    for copy in (metric, metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert copy.compute().item() == pytest.approx(expected, rel=1e-6)


@every_metric
def test_cast_reset_and_uneven_batches_together(metric_class: type[Metric], expected: float) -> None:
    metric = metric_class()
    update(metric, slice(0, 5))
    metric.reset()
    torch.nn.ModuleList([metric]).to(torch.bfloat16)
    for part in slices([8, 8, 7]):
        update(metric, part)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.set_dtype(torch.half)],
)
def test_a_model_in_half_precision_does_not_round_the_sums(cast: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    holder = torch.nn.Module()
    holder.linear, holder.metric = torch.nn.Linear(1, 1), AnswerProbability()
    holder.set_dtype = lambda dtype: holder.metric.set_dtype(dtype)
    cast(holder)
    for _ in range(1000):
        holder.metric.update(torch.tensor([1.0, 0.5], dtype=torch.bfloat16))
    assert holder.metric.compute().item() == 75.0
    holder.metric.reset()
    cast(holder)
    holder.metric.update(torch.tensor([0.1], dtype=torch.float64))
    assert holder.metric.compute().item() == 10.0


def test_counting_a_million_is_exact() -> None:
    metric = AnswerAccuracy()
    for _ in range(20):
        metric.update(torch.ones(2**20, dtype=torch.bool))
    metric.update(torch.zeros(1, dtype=torch.bool))
    assert metric.compute().item() == 100 * 20 * 2**20 / (20 * 2**20 + 1)


def test_forward_gives_the_value_of_the_batch() -> None:
    metric = AnswerAccuracy()
    assert metric(torch.tensor([True, False])).item() == 50
    assert metric(torch.tensor([True, True])).item() == 100
    assert metric.compute().item() == 75


def test_updates_in_and_out_of_inference_mode() -> None:
    metric = AnswerProbability()
    with torch.inference_mode():
        metric.reset()
        metric.update(torch.tensor([0.5]))
    metric.update(torch.tensor([1.0], requires_grad=True))
    assert metric.compute().item() == 75
    assert not metric.total.requires_grad


def test_groups_of_a_collection_stay_apart() -> None:
    both = MetricCollection({"first": AnswerAccuracy("first_token"), "choice": AnswerAccuracy("multiple_choice")})
    both["first"].update(torch.tensor([True]))
    both["choice"].update(torch.tensor([False]))
    assert {name: value.item() for name, value in both.compute().items()} == {"first": 100, "choice": 0}


def test_mistakes() -> None:
    with pytest.raises(UserError, match="kind: got 'exact'"):
        AnswerAccuracy("exact")
    with pytest.raises(TypeError, match=r"expected a bool tensor \[B\], received torch.float32 \[2\]"):
        AnswerAccuracy().update(torch.tensor([0.1, 0.9]))
    for predictions, references in ((["SECRET"], []), ("SECRET", "SECRET")):
        with pytest.raises(ValueError, match="expected two lists") as error:
            RougeL().update(predictions, references)
        assert "SECRET" not in str(error.value)


def test_the_highest_is_no_number_where_one_is_none() -> None:
    metric = HighestProbability()
    for values in ([0.5], [float("nan"), 0.25], [0.75]):
        metric.update(torch.tensor(values))
    assert metric.compute().isnan()


def test_rouge_keeps_no_text() -> None:
    metric = RougeL()
    metric.update(["SECRET"], ["SECRET"])
    assert b"SECRET" not in pickle.dumps(metric)
    assert all(isinstance(state, Tensor) for state in metric.metric_state.values())


def update_with_one(metric: Metric, n: int) -> None:
    """One example, number ``n``, into a metric that takes more than a value for each example."""
    if isinstance(metric, ExtractionStrength | ExactMemorization):
        metric.update(torch.arange(5) % (n % 4 + 1) == 0, torch.zeros(5, dtype=torch.long), 1)
    elif isinstance(metric, MembershipAUC):
        metric.update(torch.tensor([n * n % 23 + 0.01], dtype=torch.float64), member=n < 14)
    elif isinstance(metric, ModelUtility):
        metric.update("ab"[n % 3 == 0], torch.tensor([(n + 1) / 32]))
    else:
        logps = torch.tensor([0.5, (n + 1) / 32, 0.3], dtype=torch.float64).log()
        metric.update(logps, torch.zeros(3, dtype=torch.long), 1)


def richer_metrics() -> list[Metric]:
    """Of those, one each."""
    others = ForgetQuality([0.2, 0.4, 0.8, 1.2]), ModelUtility(["a", "b"]), MembershipAUC(), PrivLeak(70.0)
    return [ExtractionStrength(), ExactMemorization(), TruthRatio("forget"), TruthRatio("retain"), *others]


def _computed(rank: int, folder: Path) -> list[float]:
    """Every metric's value over the examples of two processes, of which this is one."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    accuracy, probability, rouge, lonely = AnswerAccuracy(), AnswerProbability(), RougeL(), AnswerAccuracy()
    highest, lonely_highest = HighestProbability(), HighestProbability()
    probability.to(torch.bfloat16)
    for n in range(rank, 23, 2):  # 12 examples on the one, 11 on the other
        accuracy.update(torch.tensor([n % 3 == 0]))
        for metric in (probability, highest):
            metric.update(torch.tensor([(n + 1) / 32], dtype=torch.float64))
        rouge.update([f"it is {n % 4}"], ["it is 0"])
    if rank == 0:
        lonely.update(torch.tensor([True, False]))
        lonely_highest.update(torch.tensor([0.125]))
    richer, lonely_auc = richer_metrics(), MembershipAUC()
    for metric in richer:
        update_with_one(metric, 5)
        metric.reset()
        torch.nn.ModuleList([metric]).to(torch.bfloat16)
        for n in range(rank, 23, 2):
            update_with_one(metric, n)
    if rank == 1:  # the other has nothing to send, in the same dtype
        lonely_auc.update(torch.tensor([2.0, 1.0, 0.1], dtype=torch.float64), True)
        lonely_auc.update(torch.tensor([0.1, 0.1 + 1e-12], dtype=torch.float64), False)
    for _ in range(2):  # what was joined comes apart again
        several = (accuracy, probability, highest, rouge, lonely, lonely_highest, lonely_auc, *richer)
        values = [m.compute().item() for m in several]
        for metric in (lonely_auc, *richer):
            metric._computed = None
    dist.destroy_process_group()
    return values


def _two(folder: Path) -> int:
    """In processes of its own: a process group inside pytest would outlive the test."""
    context = multiprocessing.get_context("fork")
    other = context.Process(target=lambda: (folder / "1").write_text(json.dumps(_computed(1, folder))))
    other.start()
    (folder / "0").write_text(json.dumps(_computed(0, folder)))
    other.join()
    return other.exitcode or 0


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    end = ranks(partial(_two, tmp_path), tmp_path / "ranks", 100)
    assert end.status == 0, end.err
    alone = richer_metrics()
    for metric in alone:
        for n in range(23):
            update_with_one(metric, n)
    expected = [*(expected for _, expected in CASES), 50.0, 12.5, 100 * 4.5 / 6, *(m.compute().item() for m in alone)]
    assert all(math.isfinite(value) for value in expected)
    for rank in "01":
        values = json.loads((tmp_path / rank).read_text(encoding="utf-8"))
        assert values == pytest.approx(expected, rel=1e-6)
