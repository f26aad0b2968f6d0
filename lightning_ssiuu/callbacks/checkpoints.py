"""Keep the run's newest checkpoint, so that an interrupted run can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lightning_ssiuu.evaluation.loaders import run_directory
from lightning_ssiuu.evaluation.results import check_folder
from lightning_ssiuu.utils.errors import UserError


class KeepCheckpoints(Checkpoint):
    """Writes ``<trainer.default_root_dir>/<folder>/step=<n>.ckpt`` every so many steps and keeps the newest.

    The one before is removed when the new one is whole. No checkpoint is written at the step a run ends with: what is
    left to do then, writing the results, needs the training to end again. A new run removes those of an earlier one.

    Args:
        every_n_steps: Optimiser steps between two checkpoints; None keeps none.
        folder: Name below ``trainer.default_root_dir``.

    Raises:
        UserError: If ``every_n_steps`` is below 1, or ``folder`` no plain name or that of a result.

    Example:
        >>> KeepCheckpoints(every_n_steps=100).folder
        'checkpoints'
    """

    # Lightning puts a Checkpoint behind all other callbacks: what they do after a step is in that step's checkpoint.

    def __init__(self, every_n_steps: int | None = None, folder: str = "checkpoints") -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError("checkpoints.every_n_steps", every_n_steps, "a number ≥ 1, or null")
        check_folder("checkpoints.folder", folder)
        self.every_n_steps, self.folder = every_n_steps, folder
        self._saved_step = 0
        self._begins = self._is_due = self._is_fresh = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_step = trainer.global_step
        self._begins = trainer.ckpt_path is None and self.every_n_steps is not None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._begins:
            self._begins = False
            self._remove(trainer, but=None)
        self._is_fresh, step = False, trainer.global_step
        if self.every_n_steps is None or step == self._saved_step or step % self.every_n_steps or _ends(trainer):
            return
        if trainer.is_last_batch:  # a validation and whatever else ends an epoch are part of it
            self._is_due = True
        else:
            self._write(trainer)
            self._is_fresh = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Going on from a checkpoint written before it would validate again: right, but not for nothing.
        if self._is_fresh:
            self._write(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_due and not _ends(trainer):
            self._write(trainer)
        self._is_due = False

    def _write(self, trainer: L.Trainer) -> None:
        self._saved_step = step = trainer.global_step
        path = Path(run_directory(trainer)) / self.folder / f"step={step}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        self._remove(trainer, but=path)

    def _remove(self, trainer: L.Trainer, but: Path | None) -> None:
        if trainer.is_global_zero:
            for path in set(Path(run_directory(trainer), self.folder).glob("step=*.ckpt")) - {but}:
                trainer.strategy.remove_checkpoint(path)


def _ends(trainer: L.Trainer) -> bool:
    steps, epochs = trainer.max_steps, trainer.max_epochs
    last_epoch = epochs not in (None, -1) and trainer.current_epoch + 1 >= (epochs or 0)
    return trainer.should_stop or 0 < steps <= trainer.global_step or (trainer.is_last_batch and last_epoch)
