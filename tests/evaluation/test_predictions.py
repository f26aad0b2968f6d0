"""Texts of a whole set: generated once, together, and given back where they belong."""

from __future__ import annotations

import gc
import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch
from toys.data import Toy, byte_tokenizer
from toys.models import random_model

from lightning_ssiuu.datamodules import QAExample, Splits
from lightning_ssiuu.evaluation import predictions
from lightning_ssiuu.evaluation.metrics import rouge
from lightning_ssiuu.evaluation.predictions import Predictions, grouped
from lightning_ssiuu.evaluation.scorer import Scorer, evaluate
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.utils.errors import NotFinite

SCORES = ["rouge_l", "choice_generation", "probability"]


@pytest.fixture(scope="module")
def model() -> AnswerModel:
    return AnswerModel(random_model("llama", torch.float64, vocab_size=260, max_position_embeddings=512)).eval()


def data(eval_batch_size: int) -> Toy:
    """Short and long ones by turns."""

    def examples(first: int) -> list[QAExample]:
        answers = ["ab"[n % 2] * (1 + 9 * (n % 3 == 0)) for n in range(6)]
        return [
            QAExample(first + n, f"Q{first + n}" + "?" * n, answer, ("xyz", "z" * (n + 1)))
            for n, answer in enumerate(answers)
        ]

    splits = Splits(examples(0), examples(10))
    return Toy(splits, byte_tokenizer(), eval_batch_size=eval_batch_size, choice_template="instruction", max_length=400)


def parts(eval_batch_size: int) -> list[Any]:
    return [batch["forget"] for batch in data(eval_batch_size).eval_dataloader("forget")]


@pytest.mark.parametrize("kind", ["generations", "choice_generations"])
def test_texts_are_those_of_each_example_alone(kind: str, model: AnswerModel) -> None:
    tokenizer = byte_tokenizer()
    alone = [getattr(Predictions(model, tokenizer, part), kind)[0] for part in parts(1)]
    assert len(set(alone)) >= 4
    for size in (2, 4, 6):
        assert [text for each in grouped(model, tokenizer, parts(size)) for text in getattr(each, kind)] == alone


@pytest.mark.parametrize("together", [False, True])
def test_what_is_let_go_holds_no_logits(model: AnswerModel, together: bool) -> None:
    """Without a collection of garbage, which may be long in coming."""
    tokenizer = byte_tokenizer()
    made = grouped(model, tokenizer, parts(2)) if together else [Predictions(model, tokenizer, parts(2)[0])]
    assert made[0].generations
    answers = weakref.ref(made[0].answers)
    gc.disable()
    try:
        del made
        assert answers() is None
    finally:
        gc.enable()


def test_a_group_is_generated_once_and_in_no_part_s_batches(model: AnswerModel) -> None:
    with patch.object(predictions, "continued", wraps=predictions.continued) as continued:
        group = grouped(model, byte_tokenizer(), parts(2))
        assert not continued.called
        texts = [group[1].generations, group[0].generations, group[2].generations, group[1].generations]
    (call,) = continued.call_args_list
    assert len(call.args[1]) == 6
    assert call.args[3] == 2
    assert texts[0] == texts[3] != texts[1]


def test_scores_are_those_of_any_batches_and_texts_are_made_once_for_each_split(
    model: AnswerModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measure itself is replaced by one that tells any two texts apart."""
    monkeypatch.setitem(rouge.ROUGE, "rouge_l", lambda text, answer: sum(map(ord, text + answer)) / 1e6)
    found: list[Any] = []
    for size in (1, 4, 6):
        with patch.object(predictions, "continued", wraps=predictions.continued) as continued:
            found.append(evaluate(model, byte_tokenizer(), data(size).val_dataloader(), SCORES))
        # Both kinds of text of both splits.
        assert sorted(len(call.args[1]) for call in continued.call_args_list) == [6] * 4
    for one in found[1:]:
        assert {split: pytest.approx(scores, rel=1e-12) for split, scores in one.items()} == found[0]
    assert list(found[0]["forget"]) == SCORES
    assert found[0]["forget"]["rouge_l"] != found[0]["retain"]["rouge_l"]


def test_a_scorer_forgets_what_it_has_not_generated_for(model: AnswerModel) -> None:
    scorer = Scorer(model, byte_tokenizer(), ["rouge_l"])
    with patch.object(predictions, "continued", wraps=predictions.continued) as continued:
        for part in parts(3):
            scorer.update({"forget": part})
        assert not continued.called
        scorer.reset()
        scorer.update({"forget": parts(3)[0]})
        scorer.compute()
        assert scorer.compute()["forget"].keys() == {"rouge_l"}
    (call,) = continued.call_args_list
    assert len(call.args[1]) == 3


def test_a_run_that_diverged_is_told_as_one_where_texts_show_it() -> None:
    broken = AnswerModel(random_model("llama", torch.float32, vocab_size=260)).eval()
    broken.hf.get_output_embeddings().weight.data[3] = torch.nan
    for step, argument in ((0, "checkpoint"), (7, "model.optimizer")):
        scorer = Scorer(broken, byte_tokenizer(), ["rouge_l"])
        scorer.update({"forget": parts(3)[0]})
        with pytest.raises(NotFinite, match=argument):
            scorer.compute(step)
