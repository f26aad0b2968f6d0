"""Choose how many threads a run on a CPU computes with, the same when it is gone on with."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ssiuu.evaluation.loaders import tokens_of_a_pass
from lightning_ssiuu.utils.threads import choose_threads

_KEY = "threads"  # in a checkpoint


class Threads(L.Callback):
    """Sets torch's threads by the work of a pass (:mod:`lightning_ssiuu.utils.threads`); give it before all others.

    Their number is in every checkpoint, and a run that goes on takes it from there: bits of a sum depend on it. Nothing
    happens on other devices, or where the user has set it.
    """

    def __init__(self) -> None:
        self._recorded: int | None = None
        self._is_chosen = False

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._is_chosen or pl_module.device.type != "cpu":
            return
        self._is_chosen = True
        parameters = sum(parameter.numel() for parameter in pl_module.model.parameters())
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        told = choose_threads(parameters, tokens_of_a_pass(data), trainer.num_devices, self._recorded)
        if told is not None:
            rank_zero_info(told)

    on_validation_start = on_test_start = on_train_start

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = torch.get_num_threads()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._recorded = checkpoint.get(_KEY)
