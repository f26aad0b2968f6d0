"""Levels that a forget score is to fall to, measured on the model before unlearning."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.training import FewFacts, fit

from lightning_ssiuu import ElicitedUnlearning, Facts, GradientDifference
from lightning_ssiuu.callbacks import ForgetThresholdStopping
from lightning_ssiuu.datamodules.pairs import alike
from lightning_ssiuu.evaluation.chance import level_of, mismatched_level
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.utils.errors import UserError


def test_mismatched_level_by_hand(tmp_path: Path) -> None:
    data = FewFacts(n=3, batch_size=2, eval_batch_size=2)
    data.setup("fit")
    model, tokenizer = AnswerModel(load_model("tiny")), data.tokenizer
    facts = data.splits.forget

    def probability(question: str, answer: str) -> float:
        prompt = tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
        completion = [*tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model.hf(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        each = [logps[len(prompt) - 1 + k, token].item() for k, token in enumerate(completion)]
        return 100 * math.exp(sum(each) / len(each))

    # Three examples have two derangements; the seed may choose either, nothing else.
    deranged = [p for p in permutations(range(3)) if all(i != k for i, k in enumerate(p))]
    expected = [sum(probability(facts[i].question, facts[k].answer) for i, k in enumerate(p)) / 3 for p in deranged]
    got = {
        round(mismatched_level("probability", model, tokenizer, data.eval_dataloader("forget"), s), 5) for s in range(8)
    }
    assert len(got) == 2
    for value in got:
        assert min(abs(value - want) for want in expected) < 1e-3
    for kind in ("first_token", "all_tokens", "rouge_l"):
        assert 0 <= mismatched_level(kind, model, tokenizer, data.eval_dataloader("forget")) < 100
    with pytest.raises(UserError, match=r"stopping\.threshold"):
        mismatched_level("multiple_choice", model, tokenizer, data.eval_dataloader("forget"))
    others = data.eval_dataloader("retain", facts[1:])  # of one row: its question, the answers of the others
    one = mismatched_level("probability", model, tokenizer, data.eval_dataloader("forget", facts[:1]), others=others)
    assert one == pytest.approx(sum(probability(facts[0].question, fact.answer) for fact in facts[1:]) / 2, abs=1e-3)
    callback = ForgetThresholdStopping("probability", "mismatched", seed=3)
    with pytest.warns(UserWarning, match="training ended before"):
        fit(GradientDifference(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)), [callback], tmp_path, 1, data)
    assert callback.level == pytest.approx(
        mismatched_level("probability", model, tokenizer, data.eval_dataloader("forget"), 3), rel=1e-6
    )


def test_levels_of_answers_to_questions_worded_alike_and_of_a_test_set_by_hand(tmp_path: Path) -> None:
    data = Facts(batch_size=12)
    data.setup("validate")
    model, tokenizer, forget = AnswerModel(load_model("tiny")), data.tokenizer, data.splits.forget
    # Every question of the embedded facts is of one of six kinds, of six people: the kinds stay together.
    kinds = [" ".join(word for word in fact.question.split() if word.islower()) for fact in forget]
    places = alike([fact.question for fact in forget], [fact.answer for fact in forget])
    assert sorted(places) == list(range(len(forget)))
    assert all(forget[other].answer != fact.answer for fact, other in zip(forget, places, strict=True))
    together = [kinds[other] == kind for kind, other in zip(kinds, places, strict=True)]
    assert sum(together) >= 0.9 * len(together)
    assert len(set(kinds)) > 3
    repaired = [replace(fact, answer=forget[other].answer) for fact, other in zip(forget, places, strict=True)]

    def score(facts: Any, split: str = "forget") -> float:
        loader = data.eval_dataloader(split, facts)
        return evaluate(model, tokenizer, [loader], ["probability"])[split]["probability"]

    asked: Any = ("probability", model, tokenizer, data.eval_dataloader("forget"), 0, ())
    assert level_of("chance", *asked) == pytest.approx(score(repaired), rel=1e-5)
    assert level_of("test", *asked, data.eval_dataloader("test")) == pytest.approx(score(data.splits.test, "test"))
    choices: Any = ("multiple_choice", *asked[1:])
    assert level_of("chance", *choices) == pytest.approx(100 / 3)
    with pytest.raises(UserError, match=r"stopping\.threshold: got 'test', .* no test set"):
        level_of("test", *asked)
    callback = ForgetThresholdStopping("probability", "chance")
    module = ElicitedUnlearning(floor="threshold", optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    with pytest.warns(UserWarning, match="training ended before"):
        fit(module, [callback], tmp_path / "threshold", 1, data)
    assert module.floor_level == callback.level == pytest.approx(score(repaired), rel=1e-5)
    module = ElicitedUnlearning(floor="threshold", optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    with pytest.warns(UserWarning, match="training ended before"):  # a threshold of another score is no probability
        fit(module, [ForgetThresholdStopping("first_token", 10.0)], tmp_path, 1, data)
    assert module.floor_level is None
