"""A user's script as type checkers see it: what a name of the package is must be known, and not ``Any``.

It is never run. ``mypy`` checks it strictly (setup.cfg); outside the checkout ``mypy --strict`` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import lightning as L
from torch import Tensor

import lightning_ssiuu as ls
from lightning_ssiuu import (
    ARCHITECTURES,
    SSIUU,
    Architecture,
    Attack,
    AttributionRegularizer,
    CustomData,
    ElicitedStop,
    Facts,
    ForgetThresholdStopping,
    Harmful,
    NeuronAttributionCallback,
    Regularizer,
    Result,
    UnlearningDataModule,
    UnlearningModule,
    UserError,
    Verdict,
)
from lightning_ssiuu.datamodules import QAExample, Splits
from lightning_ssiuu.models.answers import AnswerModel, Answers, Part


class Hinge(SSIUU):
    """An objective of one's own."""

    def __init__(self, limit: float = 5.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.limit = limit

    def forget_loss(self, batch: Part) -> Tensor:
        answers = assert_type(self.answers(batch), Answers)
        return (self.limit + assert_type(answers.mean_logps, Tensor)).clamp(min=0).mean()


class Riddles(UnlearningDataModule):
    """A data module of one's own."""

    def load_splits(self) -> Splits:
        riddle = QAExample(0, "What has keys and opens no door?", "a piano")
        return Splits(forget=[riddle], retain=[riddle], test=[])


def train(output: Path) -> dict[str, float]:
    module = Hinge(limit=4.0, regularizer=AttributionRegularizer(weight=0.1))
    assert_type(module.regularizer, Regularizer | None)
    assert_type(module.retain_weight, float)
    assert_type(module.model, AnswerModel)
    watch = NeuronAttributionCallback(target="length_normalised", write=False)
    callbacks: list[L.Callback] = [watch, ForgetThresholdStopping(threshold=15.0, elicited=ElicitedStop())]
    trainer = L.Trainer(max_steps=2, callbacks=callbacks, logger=False)
    data = Facts(batch_size=4)
    assert_type(data.splits, Splits)
    assert_type(data.splits.forget[0].question, str)
    trainer.fit(module, datamodule=data)
    trainer.fit(module, datamodule=CustomData(forget="forget.csv", retain="retain.csv"))
    return assert_type(watch.influence(), dict[str, float])


def judge(model: str) -> str:
    how: Attack = Harmful(p=[0.3], learning_rates=[1e-4])
    found = assert_type(ls.attack(model, attack=how), Result)
    verdict = assert_type(ls.audit("tiny", model), Verdict)
    assert_type(ls.utility(model), Result)
    assert_type(ls.erase(output="runs/request", trials=1).erased, bool)
    assert_type(ARCHITECTURES["llama"], Architecture)
    assert_type(ls.__version__, str)
    try:
        return assert_type(verdict.label, str) + assert_type(found.title, str)
    except UserError as mistake:
        return str(mistake)


OBJECTIVES: list[type[UnlearningModule]] = [Hinge, ls.NPO, ls.GradientDifference]
