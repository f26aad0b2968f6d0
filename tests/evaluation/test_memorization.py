"""Extraction strength and exact memorisation against loops, and against generating for real."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric
from toys.training import FewFacts, fit, ssiuu

from lightning_ssiuu.callbacks import ForgetThresholdStopping, RunReport
from lightning_ssiuu.evaluation.chance import mismatched_level
from lightning_ssiuu.evaluation.metrics import ExactMemorization, ExtractionStrength
from lightning_ssiuu.evaluation.metrics.base import sequence_means
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.scorer import Scorer, evaluate
from lightning_ssiuu.evaluation.scores import SCORES
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model, load_tokenizer

NEW = [
    *("highest_probability", "extraction_strength", "exact_memorization"),
    *("truth_ratio", "truth_ratio_forget", "truth_ratio_retain"),
]


def strength_by_loop(correct: list[bool]) -> float:
    for k in range(len(correct) + 1):
        if all(correct[k:]):
            return 1 - k / len(correct)
    raise AssertionError


#: Every pattern of up to five tokens, as one batch with an empty row in between
PATTERNS = [list(p) for length in range(1, 6) for p in itertools.product([False, True], repeat=length)]
WITH_EMPTY = [*PATTERNS[:7], [], *PATTERNS[7:]]


def tokens(patterns: list[list[bool]]) -> tuple[Tensor, Tensor, int]:
    correct = torch.tensor([right for pattern in patterns for right in pattern], dtype=torch.bool)
    rows = torch.tensor([row for row, pattern in enumerate(patterns) for _ in pattern], dtype=torch.long)
    return correct, rows, len(patterns)


def test_every_short_pattern() -> None:
    strength, share = ExtractionStrength().values(*tokens(WITH_EMPTY)), sequence_means(*tokens(WITH_EMPTY))
    for pattern, s, m in zip(WITH_EMPTY, strength.tolist(), share.tolist(), strict=True):
        if not pattern:
            assert math.isnan(s)
            assert math.isnan(m)
            continue
        assert s == pytest.approx(strength_by_loop(pattern), abs=1e-12)
        assert m == pytest.approx(sum(pattern) / len(pattern), abs=1e-12)
        assert s <= m


CASES = [
    (ExtractionStrength, 100 * sum(map(strength_by_loop, PATTERNS)) / len(PATTERNS)),
    (ExactMemorization, 50.0),  # as many patterns as their mirror images
]


@pytest.mark.parametrize(("metric_class", "expected"), CASES)
@pytest.mark.parametrize("size", [62, 61, 7, 1])
def test_batches_do_not_matter(metric_class: type[Metric], expected: float, size: int) -> None:
    metric = metric_class()
    metric.update(*tokens(PATTERNS[:3]))
    metric.reset()
    torch.nn.ModuleList([metric]).to(torch.bfloat16)
    for start in range(0, len(PATTERNS), size):
        metric.update(*tokens(PATTERNS[start : start + size]))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-12)


def test_strength_is_what_generating_gives() -> None:
    """Give ever more of an answer until greedy decoding adds the rest."""
    model = AnswerModel(load_model("tiny")).eval()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(5, 200, (1, 4), generator=generator)
    out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    own = out[0, 4:].tolist()
    for answer in (own, [*own[:2], (own[2] + 1) % 200, 9], [own[0], 7, 8], [(own[0] + 1) % 200]):
        length, needed = len(answer), 0
        for needed in range(length + 1):
            given = torch.tensor([[*prompt[0].tolist(), *answer[:needed]]])
            mask = torch.ones_like(given)
            left = length - needed
            if not left:
                break
            new = model.generate(input_ids=given, attention_mask=mask, max_new_tokens=left, do_sample=False)
            if new[0, given.shape[1] :].tolist() == answer[needed:]:
                break
        ids = torch.tensor([[*prompt[0].tolist(), *answer]])
        labels = ids.clone()
        labels[:, :4] = -100
        part = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        scorer = Scorer(model, load_tokenizer("tiny"), ["extraction_strength"])
        scorer.update({"forget": part})
        assert scorer.compute()["forget"]["extraction_strength"] == pytest.approx(100 * (1 - needed / length))


def test_named_scores_and_those_taken_by_default() -> None:
    model, tokenizer, data = AnswerModel(load_model("tiny")), load_tokenizer("tiny"), FewFacts()
    assert {name for name, score in SCORES.items() if not score.default} == set(NEW)
    data.setup("validate")
    loaders = data.val_dataloader()
    asked, highest = evaluate(model, tokenizer, loaders, NEW), dict[str, float]()
    for scores in asked.values():
        assert list(scores) == NEW
        assert all(0 <= value <= 100 for value in scores.values())
        assert scores["extraction_strength"] <= scores["exact_memorization"]
    for loader in loaders:
        for split, part in ((split, part) for batch in loader for split, part in batch.items()):
            values = SCORES["probability"].values(Predictions(model, tokenizer, part))
            highest[split] = max(highest.get(split, 0.0), 100 * values.max().item())
    assert {split: scores["highest_probability"] for split, scores in asked.items()} == pytest.approx(highest)
    default = evaluate(model, tokenizer, loaders)
    assert all(not set(NEW) & set(scores) and "probability" in scores for scores in default.values())
    also = evaluate(model, tokenizer, loaders, None, [NEW[0], "probability"])
    for split, scores in also.items():
        assert list(scores) == [*default[split], NEW[0]]


@pytest.mark.parametrize("score", ["exact_memorization", "highest_probability"])
def test_stopping_by_a_score_that_is_not_taken_by_default(tmp_path: Path, score: str) -> None:
    """The report shows it beside the default ones, as the score the run was about."""
    stopping = ForgetThresholdStopping(score, 60.0)
    fit(ssiuu(), [stopping, RunReport(print_table=False)], tmp_path, 6)
    content = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert content["score"] == score
    assert content["stopped_by"] == f"{score} <= 60 %"
    assert content["after"]["forget_score"] == stopping.value <= 60 < content["before"]["forget_score"]
    assert {"probability", score} <= set(content["after"]["scores"]["retain"])
    assert "extraction_strength" not in content["after"]["scores"]["retain"]


def test_mismatched_threshold() -> None:
    model, tokenizer, data = AnswerModel(load_model("tiny")), load_tokenizer("tiny"), FewFacts()
    data.setup("validate")
    forget = data.val_dataloader()[0]
    known = evaluate(model, tokenizer, [forget], NEW[:2])["forget"]
    for name in NEW[:2]:
        assert mismatched_level(name, model, tokenizer, forget) < known[name]
