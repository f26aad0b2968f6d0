"""A training run whose numbers are none ends with an error, and nothing is saved of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.models.checks import check_peaks, diverged, diverging, has_values, not_finite, weights
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.errors import NotFinite


def finite_losses(losses: Mapping[str, Tensor], step: int) -> Mapping[str, Tensor]:
    """The losses of step ``step + 1``, the same on every rank; :class:`NotFinite` if one is NaN or infinite."""
    values = [value for value in losses.values() if has_values(value)]
    if values and not torch.stack(values).isfinite().all().item():
        told = ", ".join(f"{name} is {value.item()}" for name, value in losses.items() if not value.isfinite())
        raise diverged(f"{told} in step {step + 1}")
    return losses


def check_gradients(parameters: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
    """Raise :class:`NotFinite` where a gradient of step ``step + 1`` is NaN or infinite."""
    gradients = ((name, parameter.grad) for name, parameter in parameters)
    if broken := not_finite((name, gradient) for name, gradient in gradients if gradient is not None):
        raise diverged(f"gradients of {len(broken)} tensors are NaN or infinite in step {step + 1}, first {broken[0]}")


def check_trained(module: Any, batch: Mapping[str, Part]) -> None:
    """Raise :class:`NotFinite` where a module's weights, or what they predict on a batch, are no numbers by now.

    What a step did to the weights shows in no loss before the next one, which a run that ends, or a checkpoint, never
    sees. The model's mode and every random state are left as they were; each rank must call it.
    """
    step = module.global_step
    mistake: NotFinite | None = None
    if broken := not_finite(weights(module.model)):
        what = "tensors of weights are NaN, infinite or beyond all measure"
        mistake = diverged(f"{len(broken)} {what} after step {step}, first {broken[0]}")
    part = next(iter(batch.values()))
    try:
        with torch.no_grad(), untouched(module.model), module.trainer.precision_plugin.forward_context():
            answers = module(part)  # all ranks: sharded weights are gathered for it
        with diverging(step):
            check_peaks(answers.peaks)
    except NotFinite as error:
        mistake = mistake or error
    if mistake := next(filter(None, gathered(mistake)), None):
        raise mistake
