"""The evaluation loaders of a run, for callbacks that look at the model between training steps."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import lightning as L

from lightning_ssiuu.errors import UserError

Loader = Iterable[Mapping[str, Any]]


def evaluation_loaders(trainer: L.Trainer) -> list[Loader]:
    """The validation loaders (forget, retain, test), set up even where Lightning's own validation never runs.

    Raises:
        UserError: If the run has none.
    """
    if trainer.val_dataloaders is None:
        # Lightning sets them up only before it validates; the default recipe leaves validation to the callbacks.
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        finally:
            trainer.training = True
    loaders = trainer.val_dataloaders
    if not loaders:
        raise UserError("data", None, "validation loaders: a data module, and trainer.limit_val_batches above 0")
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


def split_loader(trainer: L.Trainer, split: str) -> Loader | None:
    """The loader that yields ``{split: part}`` batches, or None."""
    for loader in evaluation_loaders(trainer):
        if split in next(iter(loader), {}):
            return loader
    return None


def first_parts(loader: Loader, split: str, n_examples: int) -> list[Mapping[str, Any]]:
    """The parts of a loader's first ``n_examples`` examples, the last one cut to fit."""
    parts: list[Mapping[str, Any]] = []
    missing = n_examples
    for batch in islice(loader, n_examples):
        part = {name: value[:missing] for name, value in batch[split].items() if not isinstance(value, Mapping)}
        parts.append(part)
        missing -= len(part["input_ids"])
        if missing <= 0:
            break
    return parts


def run_directory(trainer: L.Trainer) -> str:
    """Where the run's results go: ``trainer.default_root_dir``."""
    return os.fspath(trainer.default_root_dir)
