"""MUDMAN: meta-unlearning with disruption masking and normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.displaced import DisplacedObjective
from lightning_ssiuu.objectives.losses import answer_nll
from lightning_ssiuu.training.perturbation import (
    answered_rows,
    displaced,
    gradient_at,
    move,
    place,
    rows_of,
    share_of_mean,
)
from lightning_ssiuu.training.shards import local, norm_over_shards, trained_parameters
from lightning_ssiuu.utils.errors import UserError, check_at_least, check_number


class MUDMAN(DisplacedObjective):
    """``retain_weight · m + forget_weight · [sign g = sign m] ⊙ g/‖g‖₂``, g the forget gradient at an adversary's θ′.

    Sondej et al., arXiv 2506.12484. The adversary starts from the model, relearns the forget batches by gradient
    descent, ``θ′ ← θ′ − adversary_lr · ∇NLL(θ′)``, beside the training, and starts anew every ``fork_every_n_steps``;
    the forget gradient g is taken at θ′ before its step and normalised over all weights before the mask. m is the
    running mean of the retain gradient (momentum β), with what a backbone holds of the forget part: where g would move
    a weight against it, the weight stays. With SGD of learning rate η the paper's unlearning rate is
    ``η · forget_weight``, its retaining rate ``η · retain_weight``; it has 0.1 and 0.001.

    Deviations: the retain and the unlearning update are one optimiser step (the paper's retain update comes first); all
    trained weights are changed (the paper's choice is ``gate_proj``); micro-batches of a step share one adversary. With
    adapters, they alone are moved. A step costs one forward and two backward passes over the forget part; memory, four
    more copies of the trained weights (adversary, m, two gradients) and a fifth within the step.

    Args:
        backbone: Any objective whose losses and weights are used; None takes gradient difference.
        fork_every_n_steps: Optimiser steps an adversary lives, ≥ 1; with 1 every g is taken at θ.
        adversary_lr: Its learning rate, ≥ 0.
        retain_momentum: β in [0, 1).

    Raises:
        UserError: If there is no retain loss to tell what would disrupt.

    Example:
        >>> MUDMAN(forget_weight=100.0).adversary_lr
        0.001
    """

    state_attributes = ("_adversary", "_retain_mean")

    def __init__(
        self,
        backbone: UnlearningModule | None = None,
        fork_every_n_steps: int = 32,
        adversary_lr: float = 1e-3,
        retain_momentum: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        check_at_least("fork_every_n_steps", fork_every_n_steps, 1)
        check_number("adversary_lr", adversary_lr)
        if not 0 <= retain_momentum < 1:
            raise UserError("retain_momentum", retain_momentum, "a fraction in [0, 1)")
        if self.retain_weight == 0:
            raise UserError("retain_weight", 0.0, "a number > 0: without retain gradient every update is masked")
        self.fork_every_n_steps, self.adversary_lr = fork_every_n_steps, adversary_lr
        self.retain_momentum = retain_momentum
        # By parameter name, cut as the parameters are.
        self._adversary: dict[str, Tensor] = {}
        self._retain_mean: dict[str, Tensor] = {}
        self._adversary_gradients: list[Tensor] | None = None  # summed over the micro-batches of this step

    def displaced_gradient(self, batch: Part) -> tuple[list[Tensor], Tensor]:
        rows, weight = share_of_mean(answered_rows(batch))
        part = rows_of(batch, rows)
        with displaced(self.model) as parameters:
            if not self._adversary or self.global_step % self.fork_every_n_steps == 0:
                self._adversary = {name: p.detach().clone() for name, p in trained_parameters(self.model).items()}
            place(parameters, self._like(self._adversary))
            with self._step_memory:
                loss = weight * self.forget_loss(part)
                nll = weight * answer_nll(self.answers(part))
                learning = gradient_at(nll, parameters, self.model, keep_graph=True)
                gradients = gradient_at(loss, parameters, self.model)
        torch._foreach_div_(learning, self.n_micro_batches)
        if self._adversary_gradients is None:
            self._adversary_gradients = learning
        else:
            torch._foreach_add_(self._adversary_gradients, learning)
        return gradients, loss.detach()

    @torch.no_grad()
    def combine(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        named = trained_parameters(self.model)
        self._retain_mean, means = self.running_mean(self._retain_mean, named, 1 - self.retain_momentum)
        norm = norm_over_shards(gradients, parameters)
        for parameter, mean, gradient in zip(parameters, means, gradients, strict=True):
            own = local(parameter.grad)  # type: ignore[arg-type]
            own.copy_(mean)
            if norm > 0:
                agreeing = gradient.sign() == mean.sign()
                own.add_((gradient * agreeing).to(own.dtype), alpha=self.forget_weight / norm)
        learning, self._adversary_gradients = self._adversary_gradients, None
        if learning is not None:
            move(self._like(self._adversary), learning, -self.adversary_lr)

    def _like(self, state: dict[str, Tensor]) -> Any:
        # A resumed run's come from the file to the CPU, wherever the weights are.
        state |= {name: state[name].to(p.device) for name, p in trained_parameters(self.model).items()}
        return [state[name] for name in trained_parameters(self.model)]
