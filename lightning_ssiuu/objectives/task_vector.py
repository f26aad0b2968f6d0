"""Task-vector negation: learn the forget set better, and go the other way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.displaced import DisplacedObjective
from lightning_ssiuu.objectives.losses import answer_nll
from lightning_ssiuu.training.perturbation import (
    answered_rows,
    displaced,
    gradient_at,
    place,
    rows_of,
    share_of_mean,
)
from lightning_ssiuu.training.shards import local, local_state, trained_parameters
from lightning_ssiuu.utils.errors import check_number


class TaskVector(DisplacedObjective):
    """``θ₀ − α τ``, τ what fine-tuning on the forget set adds to θ₀ (Ilharco et al., arXiv 2212.04089).

    The fine-tuned model is never there but in passing: in each step the weights θ are mirrored to ``θ₀ + (θ₀ − θ)/α``,
    the gradient of the forget set's negative log-likelihood is taken there, and the optimiser gets it times −α. With
    SGD without weight decay, ``θ₀ − α τ`` is exact after every step; with Adam τ is learned at 1/α of the learning
    rate. So a run can end at any step, at the forget threshold for example, instead of trying how long and how far to
    go.

    Deviation: a retain gradient, where ``retain_weight`` is above 0 (the method has none), is taken at θ and becomes a
    part of −α τ. With adapters, they alone are moved. Memory: two more copies of the trained weights and a gradient.

    Args:
        alpha: α > 0; the fine-tuned model is 1/α as far from θ₀ as the unlearned one.

    Example:
        >>> TaskVector(alpha=0.5, retain_weight=0.0).alpha
        0.5
    """

    state_attributes = ("_start",)

    def __init__(self, alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("alpha", alpha, positive=True)
        self.alpha = alpha
        self._start: dict[str, Tensor] = {}  # by parameter name, cut as the parameters are

    def displaced_gradient(self, batch: Part) -> tuple[list[Tensor], Tensor]:
        rows, weight = share_of_mean(answered_rows(batch))
        with displaced(self.model) as parameters:
            named = trained_parameters(self.model)
            if not self._start:
                self._start = {name: p.detach().clone() for name, p in named.items()}
            self._start, start = local_state(self._start, named)
            now = [local(p.detach()) for p in parameters]
            place(parameters, torch._foreach_add(start, torch._foreach_sub(start, now), alpha=1 / self.alpha))
            with self._step_memory:
                nll = weight * answer_nll(self.answers(rows_of(batch, rows)))
                gradients = gradient_at(nll, parameters, self.model)
        torch._foreach_mul_(gradients, -self.alpha)
        return gradients, -nll.detach()
