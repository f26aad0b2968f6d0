"""What a penalty changes of the optimiser's steps, and not of the gradient alone."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_ssiuu.training.shards import local, over_shards, shard_device, snapshot
from lightning_ssiuu.utils.errors import check_at_least


class UpdateSigns(L.Callback):
    """Logs ``train/update_signs_changed``: the percentage of weights that a regulariser has step the other way.

    In every so many steps a copy of the optimiser takes the step that the objective's gradient alone gives, clipped as
    the Trainer clips it; counted are the trained weights whose change then has another sign (0 is a sign of its own)
    than in the real step. An optimiser that divides each coordinate by its own running size hides a penalty that acts
    on few coordinates: the ratio of the gradients' norms does not show it, this does. Training is not changed. The copy
    holds weights, gradients and the optimiser's state once more, for as long as a step takes.

    Args:
        every_n_steps: Optimiser steps between two looks, ≥ 1.

    Attributes:
        share: The latest figure, in percent; None before the first.

    Example:
        >>> UpdateSigns(every_n_steps=10).share is None
        True
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        check_at_least("every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self.share: float | None = None
        self._parameters: list[Tensor] = []
        self._before: list[Tensor] = []
        self._alone: list[Tensor] = []  # where the weights would be

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        # Before the module's own hook of this name, in which the regulariser acts.
        if pl_module.regularizer is None or trainer.global_step % self.every_n_steps:
            return
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._before = snapshot(self._parameters)
        twin = object.__new__(type(optimizer))  # torch's own copies leave out what a subclass has beside its state
        vars(twin).update(vars(optimizer))
        twin.param_groups, twin.state = copy.deepcopy((optimizer.param_groups, optimizer.state))
        copies = [p for group in twin.param_groups for p in group["params"]]
        for parameter, own in zip(self._parameters, copies, strict=True):
            own.grad = None if parameter.grad is None else parameter.grad.clone()
        if trainer.gradient_clip_val:
            algorithm: Any = trainer.gradient_clip_algorithm or "norm"
            trainer.precision_plugin.clip_gradients(twin, trainer.gradient_clip_val, algorithm)
        type(twin).step(twin)  # not the copy of what a scheduler has put in its place
        self._alone = [local(p.detach()) for p in copies]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._before:
            return
        count = total = 0
        for parameter, before, alone in zip(self._parameters, self._before, self._alone, strict=True):
            count += int(((local(parameter) - before).sign() != (alone - before).sign()).sum())
            total += before.numel()
        shards = shard_device(self._parameters)
        self._parameters, self._before, self._alone = [], [], []
        self.share = 100 * over_shards(count, shards) / max(over_shards(total, shards), 1)
        pl_module.log_training({"update_signs_changed": self.share})
