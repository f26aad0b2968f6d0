"""Small training runs for the tests of the callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from toys.data import Toy
from toys.models import answer_model, bare_trainer, random_model

from lightning_ssiuu.datamodules import Facts
from lightning_ssiuu.datamodules.splits import Splits
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.regularizers import AttributionRegularizer


class FewFacts(Facts):
    """The first facts of every set, to be quick."""

    def __init__(self, n: int = 8, **kwargs: Any) -> None:
        super().__init__(**{"batch_size": 4, "eval_batch_size": 8} | kwargs)
        self.n = n

    def load_splits(self) -> Splits:
        whole = super().load_splits()
        return Splits(whole.forget[: self.n], whole.retain[: 2 * self.n], whole.test[: self.n], whole.benign[: self.n])


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def ssiuu(**kwargs: Any) -> SSIUU:
    regularizer = AttributionRegularizer(0.2, "relative", target="length_normalised")
    return SSIUU(optimizer=adam, regularizer=regularizer, **kwargs)


def fit(module: Any, callbacks: list[Any], folder: Path, steps: int = 4, data: Any = None, **kwargs: Any) -> L.Trainer:
    trainer = bare_trainer(steps, callbacks=callbacks, default_root_dir=folder, check_val_every_n_epoch=10**6, **kwargs)
    trainer.fit(module, data or FewFacts())
    return trainer


def gpt2_with_dropout(folder: Path) -> str:
    """A checkpoint whose training draws random numbers in every step."""
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    random_model("gpt2", torch.float32, vocab_size=1024, **dropout).save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


class Tiny(SSIUU):
    """SSIUU on a random model over bytes that draws random numbers in every step."""

    def configure_model(self) -> None:
        if not self.is_loaded:
            drawing = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
            model = answer_model("gpt2", torch.float32, vocab_size=260, **drawing)
            self.adopt(model.train(), Toy().tokenizer)
