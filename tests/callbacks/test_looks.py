"""A look at the forget set ends early only where its score is certain, and then the run stops at the same step."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader
from toys.training import FewFacts

from lightning_ssiuu.evaluation.metrics.answers import AnswerAccuracy, AnswerProbability
from lightning_ssiuu.evaluation.scorer import Scorer, evaluate, score_above
from lightning_ssiuu.evaluation.scores import SCORES, Score
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model


def test_a_look_ends_when_the_score_is_certain_to_be_above(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []  # examples, per call
    update = Scorer.update

    def counted(self: Scorer, batch: Any) -> None:
        looked.extend(len(part["input_ids"]) for part in batch.values())
        update(self, batch)

    monkeypatch.setattr(Scorer, "update", counted)
    data = FewFacts(eval_batch_size=1)
    model, tokenizer, loader = AnswerModel(load_model("tiny")), data.tokenizer, data.eval_dataloader("forget")
    total = len(data.splits.forget)
    whole = evaluate(model, tokenizer, [loader], ["probability"])["forget"]["probability"]
    each = [evaluate(model, tokenizer, [[batch]], ["probability"])["forget"]["probability"] for batch in loader]
    for level in (0.0, whole / 2, whole * 0.99, whole * 1.01):
        looked.clear()
        value = score_above(level, model, tokenizer, loader, "forget", "probability")
        needed = next((n for n, least in enumerate(accumulate(each), 1) if least / total > level), None)
        assert (value, sum(looked)) == ((None, needed) if needed else (whole, total))
    looked.clear()
    monkeypatch.setattr("lightning_ssiuu.evaluation.scorer.Percentage", type(None))  # another kind of metric
    assert score_above(0.0, model, tokenizer, loader, "forget", "probability") == whole


class Forgetting(AnswerProbability):
    def compute(self) -> Tensor:
        return 100 - super().compute()


FALLING = Score(Forgetting, SCORES["probability"].measure)
TOKENS = Score(partial(AnswerAccuracy, "all_tokens"), lambda e: (e.answers.token_correct,))


@pytest.mark.parametrize("name", ["FALLING", "TOKENS", "rouge_l", "choice_likelihood", "choice_generation"])
def test_no_look_ends_before_it_is_certain(name: str) -> None:
    name = f"{__name__}.{name}" if name.isupper() else name
    data = FewFacts(eval_batch_size=3, choice_template="{question} {options}")
    model, tokenizer, loader = AnswerModel(load_model("tiny")), data.tokenizer, data.eval_dataloader("forget")
    batches = list(loader)
    of_batches: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # its length is theirs
    whole = evaluate(model, tokenizer, [loader], [name])["forget"][name]
    for level in (whole, whole * 1.01 + 1e-9):
        for each in (loader, batches, of_batches):
            assert score_above(level, model, tokenizer, each, "forget", name) == whole
