"""Forget parts of an optimiser step, run once more when its gradients are complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ssiuu.models.answers import Answers
from lightning_ssiuu.models.loading import evaluation_mode
from lightning_ssiuu.models.packing import BY_POSITION
from lightning_ssiuu.models.quantization import is_quantized


class Reruns:
    """The forget parts of an optimiser step so far, and the autocast they were run under."""

    def __init__(self) -> None:
        self._parts: list[Mapping[str, Tensor]] = []
        self._autocast: tuple[str, torch.dtype, bool] = ("cpu", torch.bfloat16, False)

    def keep(self, answers: Answers, part: Mapping[str, Tensor]) -> None:
        """Remember a part; called in the training step, as gradients are complete outside the Trainer's autocast."""
        device = answers.targets.device.type
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._parts.append(part)

    def take(self) -> list[Mapping[str, Tensor]]:
        """The parts, which are then forgotten."""
        parts, self._parts = self._parts, []
        return parts

    def run(self, model: nn.Module, part: Mapping[str, Tensor]) -> Answers:
        """A forward pass as in the training step."""
        with torch.autocast(*self._autocast):
            answers: Answers = model(part["input_ids"], part["attention_mask"], part["labels"])
        return answers


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for layers that recompute activations, or round less, in training alone."""
    with evaluation_mode(model):
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) or is_quantized(module):
                module.training = True
        yield


@contextmanager
def twice_differentiable(model: Any) -> Iterator[None]:
    """Forward passes inside can be differentiated twice: attention as plain products, and all logits at once.

    Torch's fused attention kernels have no second derivative; what they compute is the same but for rounding.
    """
    before, model.logit_bytes = model.logit_bytes, 1 << 62
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        model.logit_bytes = before


def once_differentiable(model: Any) -> str | None:
    """What of a model has no second derivative and would not say so; None if it has."""
    if any(is_quantized(layer) for layer in model.modules()):
        return "quantised weights"
    attention = getattr(model.hf.config, "_attn_implementation", None)
    return f"attention {attention}" if str(attention).startswith(BY_POSITION) else None
