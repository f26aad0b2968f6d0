"""Runs of the numbered toy examples on a small random float64 model, for objectives that look at the data first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from toys.data import Toy, byte_tokenizer
from toys.models import Recorder, answer_model, bare_trainer

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.objectives.base import UnlearningModule


def toy_model(name: str = "llama", **kwargs: Any) -> AnswerModel:
    """Knows the byte tokenizer's tokens."""
    return answer_model(name, vocab_size=260, **{"max_position_embeddings": 64, **kwargs} if name != "gpt2" else kwargs)


def toy_data(**kwargs: Any) -> Toy:
    """Five forget and seven retain examples of unequal lengths, three batches an epoch."""
    return Toy(tokenizer=byte_tokenizer(), **kwargs)


def toy_run(
    module: UnlearningModule,
    folder: Path,
    steps: int = 1,
    resume: str | None = None,
    model: AnswerModel | None = None,
    **kwargs: Any,
) -> UnlearningModule:
    """Train, keeping a checkpoint of every second step; the module, with its Trainer."""
    torch.manual_seed(0)
    module.adopt((model or toy_model()).train(), byte_tokenizer())
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"default_root_dir": folder, "callbacks": [keep], "enable_checkpointing": True, "log_every_n_steps": 1}
    bare_trainer(steps, **{**options, **kwargs}).fit(module, toy_data(), ckpt_path=resume)
    return module


def first_gradients(module: UnlearningModule, folder: Path, **kwargs: Any) -> dict[str, Tensor]:
    """What the optimiser is about to use in the first step, by name; the weights stay."""
    log: list[list[Tensor]] = []
    module.optimizer = lambda parameters: Recorder(parameters, lr=0.0, log=log)
    toy_run(module, folder, **kwargs)
    names = [name for name, p in module.model.hf.named_parameters() if p.requires_grad]
    return dict(zip(names, log[0], strict=True))


def first_batch(epoch: int = 0) -> dict[str, dict[str, Tensor]]:
    """The batch that the first step sees."""
    data = toy_data()
    data.setup("fit")
    return next(iter(data.train_dataloader()))
