"""UNDO: noise an unlearned model's weights, then distil what it said before back into them on the retain set."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import kl_divergence
from lightning_ssiuu.training.reference import Observation, reference_logits
from lightning_ssiuu.training.shards import reshard
from lightning_ssiuu.utils.errors import UserError, check_number


class UNDO(UnlearningModule):
    """Unlearn, noise, distil on outputs (Lee et al., arXiv 2506.06278); this is the second and the third part.

    ``checkpoint`` is a model that was unlearned in a run before, by any objective. At the start its weights become
    ``(1 − α) w + α β n``, n Xavier uniform noise (zero for vectors: norms and biases only shrink, as in the paper's
    code). Training then descends ``KL(teacher ‖ student)`` on the retain answers, the teacher being the checkpoint as
    it was. The forget set is not trained on, and a forget threshold would be met from the start: switch stopping off.

    Deviation: the paper distils on all tokens of large corpora, here on the answer tokens of the retain set, so that
    what is neither forgotten nor in that set is lost with the noise.

    Args:
        alpha: α in [0, 1], how much of the weights goes: robustness against cost of the repair.
        beta: β ≥ 0, how much of the noise comes.
        seed: Of the noise, drawn on the CPU weight by weight: the same on any number of ranks.
        forget_weight: 0, nothing else.

    Raises:
        UserError: If weights are frozen (``lora``), so that there is nothing to noise; if the retain loss is another
            one or has weight 0.

    Example:
        >>> UNDO(alpha=0.3).beta
        0.1
    """

    can_be_backbone = False

    def __init__(
        self, alpha: float = 0.6, beta: float = 0.1, seed: int = 0, forget_weight: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(forget_weight=forget_weight, **kwargs)
        if forget_weight != 0:
            raise UserError("forget_weight", forget_weight, "0: UNDO does not train on the forget set")
        if not 0 <= alpha <= 1:
            raise UserError("alpha", alpha, "a number in [0, 1]")
        check_number("beta", beta)
        if self.lora is not None:
            raise UserError("lora", "adapters", "null: frozen weights would keep what the noise is to destroy")
        if self.retain != "nll":
            raise UserError("retain", self.retain, '"nll", the default: the divergence is UNDO\'s own')
        if self.retain_weight == 0:
            raise UserError("retain_weight", self.retain_weight, "a finite number > 0: there is no other loss")
        self.alpha, self.beta, self.seed = alpha, beta, seed

    def references(self) -> dict[str, Observation]:
        return {"retain/logits": reference_logits}

    def prepare(self) -> None:  # once per run: a resumed one finds the weights noised
        reshard(self.model)
        shrink_and_perturb(self.model, self.alpha, self.beta, self.seed)

    def retain_loss(self, batch: Part) -> Tensor:
        return kl_divergence(self.answers(batch), self.original("retain/logits", batch), self.reduction)


@torch.no_grad()
def shrink_and_perturb(model: torch.nn.Module, alpha: float, beta: float, seed: int) -> None:
    """``w ← (1 − α) w + α β n`` in place, n ``U[−x, x)``, ``x = √(6 / (rows + columns))``, and 0 for vectors.

    The model may be whole or cut over the ranks (then each must call this); tied weights are changed once.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if alpha == 0:
        return  # not a bit, and not the sign of a zero
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.mul_(1 - alpha)
        if parameter.ndim < 2:
            continue
        # In float32 whatever the weights are in, so that the draw does not depend on it.
        noise = torch.rand(parameter.shape, dtype=torch.float32, generator=generator).mul_(2).sub_(1)
        noise = noise.mul_(math.sqrt(6 / (parameter.shape[-2] + parameter.shape[-1]))).to(parameter.device)
        if isinstance(parameter, DTensor):
            noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
        parameter.add_(noise.to(parameter.dtype), alpha=alpha * beta)
