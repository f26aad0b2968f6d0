"""The true answers are the first options: scores that ask for both make one forward pass, and find what two would."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from toys.data import Toy, byte_tokenizer, examples
from toys.models import part, random_model

from lightning_ssiuu.datamodules import Splits
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel

FORCED = ["first_token", "all_tokens", "probability", "extraction_strength"]


@pytest.mark.parametrize("n_distractors", [1, 3])
def test_true_answers_are_read_off_the_options(n_distractors: int) -> None:
    model = AnswerModel(random_model(dtype=torch.float64, vocab_size=260))
    data = Toy(Splits(examples(0, 5, n_distractors), examples(10, 3, n_distractors)), eval_batch_size=2)
    passes: list[int] = []
    model.register_forward_hook(lambda _, __, answers: passes.append(answers.n_sequences))

    def scored(*names: str) -> tuple[dict[str, float], list[int]]:
        passes.clear()
        found = evaluate(model, byte_tokenizer(), [data.eval_dataloader("forget")], names)["forget"]
        return found, passes.copy()

    alone, of_answers = scored(*FORCED)
    choice, of_options = scored("multiple_choice")
    both, shared = scored("multiple_choice", *FORCED)
    assert sorted(of_answers) == [1, 2, 2]
    assert shared == of_options == [n * (1 + n_distractors) for n in of_answers]
    assert both == pytest.approx(choice | alone, rel=1e-12)
    assert 0 < both["probability"] < 100


def test_what_was_read_off_a_part_goes_with_it() -> None:
    model, some = AnswerModel(random_model(dtype=torch.float64)), part([(3, 2), (2, 4)])
    gc.disable()  # no circle waits for it
    try:
        predictions = Predictions(model, byte_tokenizer(), some)
        logits = weakref.ref(predictions.answers.logits)
        del predictions
        assert logits() is None
    finally:
        gc.enable()
