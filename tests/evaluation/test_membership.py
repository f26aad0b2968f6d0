"""Membership scores against loops over tokens, the AUC against a loop over pairs."""

from __future__ import annotations

import math
import pickle
import zlib

import pytest
import torch
from torch import Tensor

from lightning_ssiuu.evaluation.metrics import MembershipAUC, PrivLeak
from lightning_ssiuu.evaluation.metrics.membership import (
    gradient_norm_score,
    loss_score,
    membership_auc,
    min_k,
    min_k_plus_plus,
    privleak,
    reference_score,
    zlib_score,
)
from lightning_ssiuu.models.answers import answer_token_logps
from lightning_ssiuu.utils.errors import UserError

LENGTHS = [5, 1, 0, 10, 2, 3]
ROWS = torch.tensor([row for row, length in enumerate(LENGTHS) for _ in range(length)])
TEXTS = ["abc", "x" * 300, "", "the cat sat on the mat", "é", "long words are long"]


def logits_and_targets(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(len(ROWS), 7, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(7, (len(ROWS),), generator=generator)


def per_row(values: list[float]) -> list[list[float]]:
    taken = iter(values)
    return [[next(taken) for _ in range(length)] for length in LENGTHS]


def lowest_mean(values: list[float], tenths: int) -> float:
    if not values:
        return math.nan
    count = max(1, tenths * len(values) // 10)
    return sum(sorted(values)[:count]) / count


def close(found: Tensor, expected: list[float], rel: float = 1e-9) -> None:
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=rel, nan_ok=True)


def test_loss_reference_and_zlib_by_loop() -> None:
    logps = answer_token_logps(*logits_and_targets())
    other = logps.flip(0)
    mean = [sum(row) / len(row) if row else math.nan for row in per_row(logps.tolist())]
    theirs = [sum(row) / len(row) if row else math.nan for row in per_row(other.tolist())]
    close(loss_score(logps, ROWS, 6), mean)
    close(reference_score(logps, other, ROWS, 6), [m - t for m, t in zip(mean, theirs, strict=True)])
    sizes = [len(zlib.compress(text.encode("utf-8"))) for text in TEXTS]
    close(zlib_score(logps, ROWS, 6, TEXTS), [m / size for m, size in zip(mean, sizes, strict=True)])
    for texts in (TEXTS[:5], "abcdef"):
        with pytest.raises(UserError, match=r"texts: got [56], allowed: a list of 6"):
            zlib_score(logps, ROWS, 6, texts)


@pytest.mark.parametrize("tenths", [1, 2, 4, 5, 7, 10])
def test_min_k_by_loop(tenths: int) -> None:
    logits, targets = logits_and_targets()
    logps = answer_token_logps(logits, targets)
    close(min_k(logps, ROWS, 6, tenths / 10), [lowest_mean(row, tenths) for row in per_row(logps.tolist())])
    standardised = []
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        total = sum(math.exp(z) for z in row)
        p = [math.exp(z) / total for z in row]
        mu = sum(q * math.log(q) for q in p)
        sigma = math.sqrt(sum(q * math.log(q) ** 2 for q in p) - mu**2)
        standardised.append((math.log(p[target]) - mu) / sigma)
    found = min_k_plus_plus(logits, targets, ROWS, 6, tenths / 10)
    close(found, [lowest_mean(row, tenths) for row in per_row(standardised)], rel=1e-7)


def test_min_k_defaults_to_40_percent_and_counts_whole_tokens() -> None:
    logps = -torch.arange(1.0, 101.0)
    rows = torch.zeros(100, dtype=torch.long)
    assert min_k(logps, rows, 1).item() == -(61 + 100) / 2
    assert min_k(logps, rows, 1, 0.29).item() == -(72 + 100) / 2  # 0.29 · 100 = 28.999…
    assert min_k(torch.tensor([-1.0, math.nan, -3.0]), rows[:3], 1).isnan().all()
    for k in (0.0, 1.1, -1.0, math.nan):
        with pytest.raises(UserError, match="k: got"):
            min_k(logps, rows, 1, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_first(dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(dtype)
    logps = answer_token_logps(logits, targets)
    exact = answer_token_logps(logits.double(), targets)
    close(loss_score(logps, ROWS, 6), loss_score(exact, ROWS, 6).tolist(), rel=1e-5)
    close(min_k(logps, ROWS, 6), min_k(exact, ROWS, 6).tolist(), rel=1e-5)
    wide = min_k_plus_plus(logits.double(), targets, ROWS, 6)
    close(min_k_plus_plus(logits, targets, ROWS, 6), wide.tolist(), rel=1e-4)
    many = torch.full((3000,), -0.5, dtype=dtype)  # a half-precision sum would stop growing
    assert loss_score(many, torch.zeros(3000, dtype=torch.long), 1).item() == -0.5


def test_min_k_plus_plus_of_predictions_without_spread() -> None:
    uniform, certain = torch.zeros(1, 4), torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]])
    row = torch.zeros(1, dtype=torch.long)
    assert min_k_plus_plus(uniform, row, row, 1).item() == pytest.approx(0, abs=0.5)
    assert min_k_plus_plus(certain, row, row, 1).item() == 0
    assert min_k_plus_plus(certain, row + 1, row, 1).item() == -math.inf


def test_gradient_norm_against_one_backward_each() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    model[0].bias.requires_grad_(False)
    inputs = torch.randn(5, 3)
    found = gradient_norm_score(model(inputs).squeeze(1), model.parameters())
    assert all(p.grad is None for p in model.parameters())
    for row, score in zip(inputs, found.tolist(), strict=True):
        model.zero_grad()
        model(row).squeeze().backward()
        square = sum(g.square().sum().item() for p in model.parameters() if (g := p.grad) is not None)
        assert score == pytest.approx(-math.sqrt(square), rel=1e-6)
    with pytest.raises(UserError, match="parameters: got 0"):
        gradient_norm_score(found, [model[0].bias])


# ---- the AUC -------------------------------------------------------------------------------------------------------


def auc_by_loop(members: list[float], others: list[float]) -> float:
    wins = sum(1.0 if m > o else 0.5 if m == o else 0.0 for m in members for o in others)
    return wins / (len(members) * len(others))


GENERATOR = torch.Generator().manual_seed(3)
MEMBERS = torch.randint(0, 12, (23,), generator=GENERATOR).double() + 2  # many ties
OTHERS = torch.randint(0, 12, (17,), generator=GENERATOR).double()
EXPECTED = auc_by_loop(MEMBERS.tolist(), OTHERS.tolist())


def test_auc_by_loop() -> None:
    assert 0.5 < EXPECTED < 1
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert membership_auc(MEMBERS.to(dtype), OTHERS) == pytest.approx(EXPECTED, abs=1e-12)
    assert membership_auc(OTHERS, MEMBERS) == pytest.approx(1 - EXPECTED, abs=1e-12)
    assert membership_auc(MEMBERS, MEMBERS) == 0.5
    assert membership_auc(MEMBERS + 100, OTHERS) == 1.0
    assert membership_auc(MEMBERS - 2000, OTHERS - 2000) == pytest.approx(EXPECTED, abs=1e-12)  # e^-2000 is 0
    assert membership_auc(torch.tensor([math.inf, -math.inf]), torch.tensor([0.0, -math.inf])) == 5 / 8
    bad = torch.tensor([1.0, math.nan])
    for pair in ((MEMBERS, bad), (bad, OTHERS), (MEMBERS[:0], OTHERS), (MEMBERS, OTHERS[:0])):
        assert math.isnan(membership_auc(*pair))


def test_privleak_by_hand() -> None:
    assert privleak(0.8, 0.5) == pytest.approx(100 * ((1 - 0.8) - (1 - 0.5)) / (1 - 0.5))
    assert privleak(0.3, 0.6) == pytest.approx(75.0)
    assert privleak(0.6, 0.6) == 0
    for arguments in ((1.2, 0.5), (-0.1, 0.5), (0.5, 1.0), (0.5, math.nan)):
        with pytest.raises(UserError, match="auc: got"):
            privleak(*arguments)
    with pytest.raises(UserError, match=r"reference_auc: got 100.0, allowed: a percentage in \[0, 100\)"):
        PrivLeak(100)


@pytest.mark.parametrize("sizes", [[40], [8, 8, 8, 8, 8], [39, 1], [0, 40]])
def test_batches_do_not_matter(sizes: list[int]) -> None:
    auc, leak = MembershipAUC(), PrivLeak(60.0)
    both = torch.cat([MEMBERS, OTHERS])
    for metric, expected in ((auc, 100 * EXPECTED), (leak, 100 * (0.6 - EXPECTED) / 0.4)):
        metric.update(torch.tensor([5.0]), member=False)
        metric.reset()
        torch.nn.ModuleList([metric]).to(torch.bfloat16)
        start = 0
        for size in sizes:
            batch, edge = both[start : start + size], max(0, min(size, len(MEMBERS) - start))
            metric.update(batch[:edge] / 1000 + 7, member=True)  # would be one and the same in bf16
            torch.nn.ModuleList([metric]).to(torch.bfloat16)
            metric.update(batch[edge:] / 1000 + 7, member=False)
            start += size
        for copy in (metric, metric.clone(), pickle.loads(pickle.dumps(metric))):
            assert copy.compute().item() == pytest.approx(expected, abs=1e-9)


def test_nothing_yet_and_no_graph_kept() -> None:
    auc, leak = MembershipAUC(), PrivLeak(50.0)
    for metric in (auc, leak):
        metric.update(torch.ones(3, requires_grad=True), member=True)
        assert metric.compute().isnan()
        assert not metric.member_scores[0].requires_grad
    given = torch.zeros(2, dtype=torch.float64)
    auc.update(given, member=False)
    given += 5  # the caller's own tensor
    assert auc.compute().item() == 100
