"""Elicited unlearning: forget what an adversary brings back who keeps relearning the other part of the forget set."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssiuu.datamodules.pairs import asked, batch_of, derangement
from lightning_ssiuu.models.answers import Answers, Part
from lightning_ssiuu.objectives.backbone import Kept
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.displaced import DisplacedObjective
from lightning_ssiuu.objectives.floor import Floor, Floored, above_floor
from lightning_ssiuu.objectives.losses import answer_nll
from lightning_ssiuu.training.optimizers import fused_where_possible
from lightning_ssiuu.training.perturbation import answered_rows, displaced, gradient_at, move, rows_of, share_of_mean
from lightning_ssiuu.training.shards import local_state, trained_parameters, wide
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.errors import UserError, check_at_least, check_number

Named = dict[str, Tensor]


class ElicitedUnlearning(DisplacedObjective, Floored):  # type: ignore[misc]
    """The backbone's forget gradient between the model and an adversary, on items the adversary never learned.

    The adversary is a displacement δ of all trained weights. It relearns, step by step beside the training, with Adam
    as a relearning attack has it, what the forget batches hold of its own half of the forget set: the gradient of the
    NLL is taken at θ + δ. On the other half the backbone's forget loss is differentiated at θ + uδ, u drawn uniformly
    from [0, 1] at every step (or 1, with probability ``full_strength``), as a mean over the items above the floor; the
    gradient is applied at θ. So the model forgets at every strength of the attack what relearning related items would
    bring back, its own weights included. Every ``fork_every_n_steps`` a new adversary starts from the model, with
    another half.

    Pushing answers down makes all answers of their kind improbable, those to questions nobody knows included. The last
    term holds them up: ``mismatched_weight`` times the NLL, at θ, of the same half's questions with each other's
    answers (of this rank's micro-batch), beyond the floor's where there is one: no pair is held higher. What is lost is
    then which answer belongs to which question.

    What is new beside MUDMAN (arXiv 2506.12484), whose adversary learns the items that are forgotten, and
    :class:`AdversarialUnlearning`, whose adversary starts anew at each step: the halves, and the range of strengths.
    The halves depend on ``seed``, the optimiser step and the example ids alone, u on the first two. Micro-batches of a
    step share δ and u. With adapters, they alone are moved. A step costs one forward and backward pass over the forget
    part, half of it at each of two places; memory, three more copies of the trained weights, and one more copy and two
    gradients within the step.

    Args:
        backbone: Any objective whose losses and weights are used; None takes gradient difference.
        adversary_lr: Adam's learning rate of the adversary, ≥ 0; 0 leaves the backbone, with half of every batch.
        fork_every_n_steps: Optimiser steps an adversary lives, ≥ 1.
        adversary_share: Share of the forget set that is the adversary's, in (0, 1).
        full_strength: Probability that u is 1, in [0, 1].
        floor: Items whose answer is less probable than this (percent, ``exp`` of the mean log-probability per token,
            at θ + uδ) are left out, so that none is pushed further than to there. ``"threshold"`` is the
            forget probability at which the run stops (none where it stops by another score). None leaves out none.
        mismatched_weight: Weight of the mismatched pairs' loss, ≥ 0.
        seed: Of the halves, of u and of the mismatched pairs.

    Raises:
        UserError: If an option is outside its range.

    Example:
        >>> ElicitedUnlearning(adversary_lr=1e-4, floor=8.0, retain_weight=5.0).fork_every_n_steps
        10
    """

    state_attributes = ("_offset", "_first", "_second", "_n_learned")

    def __init__(
        self,
        backbone: UnlearningModule | None = None,
        adversary_lr: float = 1e-4,
        fork_every_n_steps: int = 10,
        adversary_share: float = 0.5,
        full_strength: float = 0.0,
        floor: Floor = None,
        mismatched_weight: float = 0.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        check_number("adversary_lr", adversary_lr)
        check_at_least("fork_every_n_steps", fork_every_n_steps, 1)
        if not 0 < adversary_share < 1:
            raise UserError("adversary_share", adversary_share, "a fraction in (0, 1)")
        if not 0 <= full_strength <= 1:
            raise UserError("full_strength", full_strength, "a probability in [0, 1]")
        self.set_floor(floor)
        check_number("mismatched_weight", mismatched_weight)
        self.adversary_lr, self.fork_every_n_steps = adversary_lr, fork_every_n_steps
        self.adversary_share, self.full_strength, self.seed = adversary_share, full_strength, seed
        self.mismatched_weight = mismatched_weight
        # By parameter name, cut as the parameters are: δ, Adam's moments; and the steps it has taken
        self._offset: Named = {}
        self._first: Named = {}
        self._second: Named = {}
        self._n_learned = 0
        self._learning: list[Tensor] | None = None  # the adversary's gradients over this step's micro-batches

    def kept_losses(self, batch: Part) -> Kept:
        losses = super().kept_losses(batch)
        if self.mismatched_weight == 0:
            return losses
        pairs = self.mismatched(batch)
        # A rank without two rows to exchange answers takes part all the same, with one that counts nothing.
        part = pairs or rows_of(batch, torch.arange(1))
        held = (pairs is not None) * self._shortfall(self(part))
        return losses | {"mismatched_loss": (self.mismatched_weight, held)}

    def mismatched(self, batch: Part) -> Part | None:
        """The questions of this rank's rows that are forgotten, each with another's answer; None for less than two."""
        _, rest = self.divided(batch)
        if len(rest) < 2:
            return None
        pairs, width = asked(rows_of(batch, rest)), batch["input_ids"].shape[1]
        other = derangement(len(pairs), self.seed + self.global_step)
        # No row gets longer than those of the batch, which the model is known to take.
        mixed = [
            (question, pairs[i][1][: width - len(question)]) for (question, _), i in zip(pairs, other, strict=True)
        ]
        return {name: value.to(rest.device) for name, value in batch_of(mixed, 0).items()}

    def _shortfall(self, answers: Answers) -> Tensor:
        # How far the mismatched pairs lie below the floor, in nats; without one, below certainty.
        ceiling = math.log(self.floor_level / 100) if self.floor_level else 0.0
        return (ceiling - answers.mean_logps).clamp(min=0).mean()

    def displaced_gradient(self, batch: Part) -> tuple[list[Tensor], Tensor]:
        learned, rest = self.divided(batch)
        begins = self._learning is None  # the first micro-batch of the step
        if begins and (not self._offset or self.global_step % self.fork_every_n_steps == 0):
            self._fork()
        offset = self._parts("_offset")
        if self.adversary_lr > 0 and any(gathered(len(learned))):
            chosen, weight = share_of_mean(learned)
            with displaced(self.model) as parameters:
                move(parameters, offset, 1.0)
                nll = weight * answer_nll(self(rows_of(batch, chosen)))
                gradients = gradient_at(nll, parameters, self.model)
            torch._foreach_div_(gradients, self.n_micro_batches)
            if self._learning is None:
                self._learning = gradients
            else:
                torch._foreach_add_(self._learning, gradients)
        with displaced(self.model) as parameters:
            move(parameters, offset, self.strength())
            with self._step_memory:
                part, weight = above_floor(self, batch, rest, self.floor_level)
                loss = weight * self.forget_loss(part)
                return gradient_at(loss, parameters, self.model), loss.detach()

    def combine(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        super().combine(parameters, gradients)
        learning, self._learning = self._learning, None
        if learning is None:
            return
        offset, first, second = (self._parts(name) for name in ("_offset", "_first", "_second"))
        adam = fused_where_possible(torch.optim.Adam(offset, lr=self.adversary_lr))
        for values, gradient, *moments in zip(offset, learning, first, second, strict=True):
            values.grad = gradient
            step = torch.tensor(float(self._n_learned), device=values.device)
            adam.state[values] = {"step": step} | dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))
        adam.step()
        adam.zero_grad()
        self._n_learned += 1

    def strength(self) -> float:
        """Which part of the way to the adversary, u, the forget gradient of the current step is taken at."""
        rng = random.Random(f"strength {self.seed} {self.global_step}")
        return 1.0 if rng.random() < self.full_strength else rng.random()

    def divided(self, batch: Part) -> tuple[Tensor, Tensor]:
        """This rank's rows that are the adversary's, and those that are forgotten at its weights."""
        rows = answered_rows(batch)
        fork = self.global_step // self.fork_every_n_steps
        drawn = [
            random.Random(f"half {self.seed} {fork} {example}").random() for example in batch["example_id"].tolist()
        ]
        is_learned = torch.tensor(drawn, device=rows.device)[rows] < self.adversary_share
        return rows[is_learned], rows[~is_learned]

    def _fork(self) -> None:
        for name in ("_offset", "_first", "_second"):
            # Wide: its steps are small beside the weights.
            zeros = {n: torch.zeros_like(wide(p)) for n, p in trained_parameters(self.model).items()}
            setattr(self, name, zeros)
        self._n_learned = 0

    def _parts(self, name: str) -> list[Tensor]:
        # A resumed run's come from the file to the CPU, wherever the weights are.
        state, parts = local_state(getattr(self, name), trained_parameters(self.model))
        setattr(self, name, state)
        return parts
