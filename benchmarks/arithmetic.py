"""g = Σ ∂P/∂φ and SSIUU's penalty in any arithmetic, and how far two of them are apart: for precision.py, gpu_check.py.

Written out here once more, in a few lines and without the regulariser's chunks and scales, so that it is a reference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_ssiuu.models.answers import AnswerModel, target_logps

#: Name of an arithmetic: type of the weights, whether matrix products run under autocast to bfloat16.
ARITHMETICS: dict[str, tuple[torch.dtype, bool]] = {
    "64-true": (torch.float64, False),
    "32-true": (torch.float32, False),
    "bf16-mixed": (torch.float32, True),
    "bf16-true": (torch.bfloat16, False),
}


@dataclass
class ProbabilityGradient:
    """``Σ_b ∂P_b/∂φ = e^scale · values``, one tensor per parameter in its own type, and the weights it was taken at."""

    weights: list[Tensor]
    values: list[Tensor]
    scale: float


def model_in(model: AnswerModel, dtype: torch.dtype) -> AnswerModel:
    """A copy in another type; in float64 the norms, which always compute in float32, are replaced by torch's."""
    changed = copy.deepcopy(model).to(dtype)
    if dtype == torch.float64:
        for module in list(changed.modules()):
            for name, child in list(module.named_children()):
                if hasattr(child, "variance_epsilon"):
                    wide = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, device=child.weight.device)
                    wide.weight = child.weight
                    setattr(module, name, wide)
    return changed


def autocast(device: torch.device, on: bool) -> AbstractContextManager:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if on else nullcontext()


def probability_gradient(model: AnswerModel, part: Mapping[str, Tensor], mixed: bool = False) -> ProbabilityGradient:
    """The gradient g of one part of a batch, target ``length_normalised``.

    Args:
        model: The model; its ``.grad`` fields stay as they are.
        part: On the model's device.
        mixed: Autocast the forward pass to bfloat16.
    """
    parameters = list(model.parameters())
    with autocast(parameters[0].device, mixed):
        answers = model(part["input_ids"], part["attention_mask"], part["labels"])
        logps = target_logps(answers, "length_normalised")
    scale = logps.max().item()
    values = torch.autograd.grad(((logps.detach() - scale).exp() * logps).sum(), parameters)
    return ProbabilityGradient([p.detach().clone() for p in parameters], list(values), scale)


def penalty(now: Iterable[Tensor], then: Iterable[Tensor], gradient: Iterable[Tensor]) -> list[Tensor]:
    """``(A_t − A_{t−1}) g`` where A_t < 0, zero elsewhere."""
    return [torch.where(a < 0, (a - b) * g, 0.0) for a, b, g in zip(now, then, gradient, strict=True)]


def attribution(gradient: ProbabilityGradient, dtype: torch.dtype) -> list[Tensor]:
    """``A = φ g`` multiplied and kept in ``dtype``, in float64, with the gradient's scale."""
    pairs = zip(gradient.weights, gradient.values, strict=True)
    return [(w.to(dtype) * g.to(dtype)).double() * math.exp(gradient.scale) for w, g in pairs]


def relative_error(values: Iterable[Tensor], reference: Iterable[Tensor]) -> float:
    """Norm of the difference over the norm of the reference."""
    off = whole = 0.0
    for value, true in zip(values, reference, strict=True):
        off += (value.double() - true.double()).square().sum().item()
        whole += true.double().square().sum().item()
    return math.sqrt(off / whole) if whole > 0 else 0.0


def flips(values: Iterable[Tensor], reference: Iterable[Tensor]) -> dict[str, float]:
    """How I⁻ = {A < 0} differs from the reference's, in percent.

    Returns:
        ``lost``: share of the reference's I⁻ that is not in this one's; ``gained``: members of this one's that are
        not in the reference's, relative to the reference's size; ``mass``: share of Σ|A| on parameters that change
            side.
    """
    members = lost = gained = 0
    moved = mass = 0.0
    for value, true in zip(values, reference, strict=True):
        inside, was = value < 0, true < 0
        members += int(was.sum())
        lost += int((was & ~inside).sum())
        gained += int((inside & ~was).sum())
        moved += true.abs()[inside != was].double().sum().item()
        mass += true.abs().double().sum().item()
    share = 100 / max(members, 1)
    return {"lost": share * lost, "gained": share * gained, "mass": 100 * moved / mass if mass > 0 else 0.0}
