"""Levels that a forget score is to fall to, measured on the model before unlearning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.training import fit

from lightning_ssiuu import ElicitedUnlearning, Facts
from lightning_ssiuu.callbacks import ForgetThresholdStopping
from lightning_ssiuu.datamodules.pairs import alike
from lightning_ssiuu.evaluation.chance import level_of
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.utils.errors import UserError


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
