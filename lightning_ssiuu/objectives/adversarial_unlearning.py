"""Adversarial (meta) unlearning: forget at the weights an adversary who relearns a part would have reached."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ssiuu.attribution.activation_gradient import neuron_attribution
from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.models.architectures import neuron_rows, neuron_sites
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.displaced import DisplacedObjective
from lightning_ssiuu.objectives.floor import Floor, Floored, above_floor
from lightning_ssiuu.objectives.losses import answer_nll
from lightning_ssiuu.training.perturbation import (
    answered_rows,
    displaced,
    gradient_at,
    move,
    rows_of,
    share_of_mean,
)
from lightning_ssiuu.training.shards import cut_like, norm_over_shards
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.errors import UserError, check_at_least, check_choice, check_number

Adversary = Literal["sign", "gradient"]


class AdversarialUnlearning(DisplacedObjective, Floored):  # type: ignore[misc]
    """The backbone's forget gradient after ``steps`` relearning steps on other items, beside the retain gradient at θ.

    In each global micro-batch an adversary gets ``adversary_share`` of the forget items and takes k steps
    ``θ ← θ − ε sign(∇NLL)`` on them. There the backbone's forget loss is taken on the other items, as a mean over those
    above the floor; its gradient is applied at θ. So what is forgotten stays forgotten when related items are relearned
    (the setting of a harmful relearning attack). In the spirit of MUDMAN and of tamper-resistant training
    (arXiv 2506.12484, 2408.00761), which keep one adversary over many steps; here each step starts a new one, and the
    items it learns are never those whose forgetting is measured.

    Which items are the adversary's depends on ``seed``, the optimiser step and the example ids of the global batch
    alone. A batch with one distinct item has no adversary. With adapters, they alone are moved. Dropout is on in all
    passes. A step costs k + 1 passes over parts of the forget items; memory, one more copy of the trained weights and
    two gradients. In bf16-true, steps below the weights' resolution (2⁻⁸ of a weight) are lost.

    Args:
        backbone: Any objective whose losses and weights are used; None takes gradient difference.
        steps: The adversary's steps k; 0 is the backbone (with a floor, if one is given).
        step_size: Their size ε per weight, ≥ 0, or of the step's norm for ``"gradient"``; 0 is as ``steps`` 0.
        floor: Items whose answer is less probable than this (percent, ``exp`` of the mean log-probability per token,
            at the adversary's weights) are left out, so that none is pushed further than to there. ``"threshold"``
            is the forget probability at which the run stops (none where it stops by another score). None: none is.
        adversary: ``"sign"`` moves every weight by ε, ``"gradient"`` all of them along ``∇/‖∇‖₂``.
        adversary_share: Share of the forget items that are the adversary's, in (0, 1); at least one item.
        adversary_neurons: Percent of the neurons, the most positively attributed over the forget set when training
            starts, whose incoming weights (and bias) alone the adversary moves; None for all weights, as with ``lora``.
        seed: Of the choice of items.

    Example:
        >>> AdversarialUnlearning(steps=3, floor=8.0, retain_weight=5.0).steps
        3
    """

    state_attributes = ("_neurons",)  # measured on the original model

    def __init__(
        self,
        backbone: UnlearningModule | None = None,
        steps: int = 2,
        step_size: float = 1e-4,
        floor: Floor = None,
        adversary: Adversary = "sign",
        adversary_share: float = 1 / 3,
        adversary_neurons: float | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        check_at_least("steps", steps, 0)
        check_number("step_size", step_size)
        self.set_floor(floor)
        check_choice("adversary", adversary, Adversary)
        if not 0 < adversary_share < 1:
            raise UserError("adversary_share", adversary_share, "a fraction in (0, 1)")
        if adversary_neurons is not None and not 0 < adversary_neurons <= 100:
            raise UserError("adversary_neurons", adversary_neurons, "a percentage in (0, 100] or null")
        if adversary_neurons is not None and self.lora is not None:
            raise UserError("adversary_neurons", adversary_neurons, "null with lora, which has no weights of a neuron")
        self.steps, self.step_size, self.adversary = steps, step_size, adversary
        self.adversary_share, self.adversary_neurons, self.seed = adversary_share, adversary_neurons, seed
        self._neurons: Tensor | None = None  # [n_neurons] bool, in the order of the sites
        self._masks: dict[nn.Parameter, Tensor] | None = None

    def on_train_start(self) -> None:
        if self.adversary_neurons is not None:
            sites = neuron_sites(self.model.hf)
            if self._neurons is None:
                with self.trainer.precision_plugin.forward_context():
                    parts = self.training_parts("forget")
                    scores = neuron_attribution(self.model, parts, sites, "length_normalised").mean_positive
                n_chosen = max(1, round(self.adversary_neurons / 100 * len(scores)))
                self._neurons = torch.zeros(len(scores), dtype=torch.bool)
                self._neurons[scores.argsort(descending=True, stable=True)[:n_chosen]] = True
            self._masks = {p: cut_like(rows, p) for p, rows in neuron_rows(self.model.hf, sites, self._neurons)}
        super().on_train_start()

    def displaced_gradient(self, batch: Part) -> tuple[list[Tensor], Tensor]:
        learned, rest = self.divided(batch)
        with displaced(self.model) as parameters:
            if self.steps > 0 and self.step_size > 0 and any(gathered(len(learned))):
                chosen, weight = share_of_mean(learned)
                part = rows_of(batch, chosen)
                for _ in range(self.steps):
                    gradients = gradient_at(weight * answer_nll(self(part)), parameters, self.model)
                    self._step(parameters, gradients)
                    del gradients
            with self._step_memory:
                part, weight = above_floor(self, batch, rest, self.floor_level)
                loss = weight * self.forget_loss(part)
                return gradient_at(loss, parameters, self.model), loss.detach()

    def divided(self, batch: Part) -> tuple[Tensor, Tensor]:
        """This rank's rows that are the adversary's, and those whose forgetting is taken at its weights."""
        rows = answered_rows(batch)
        own = batch["example_id"][rows].tolist()
        everyone = sorted({example for ids in gathered(own) for example in ids})
        if self.steps == 0 or self.step_size == 0 or len(everyone) < 2:
            return rows[:0], rows
        key = f"{self.seed} {self.global_step}"
        everyone.sort(key=lambda example: hashlib.sha256(f"{key} {example}".encode()).digest())
        n_learned = min(max(1, round(self.adversary_share * len(everyone))), len(everyone) - 1)
        learned = set(everyone[:n_learned])
        is_learned = torch.tensor([example in learned for example in own], dtype=torch.bool, device=rows.device)
        return rows[is_learned], rows[~is_learned]

    def _step(self, parameters: Sequence[nn.Parameter], gradients: list[Tensor]) -> None:
        if self._masks is not None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                mask = self._masks.get(parameter)
                gradient.zero_() if mask is None else gradient.mul_(mask)
        if self.adversary == "sign":
            for gradient in gradients:
                gradient.sign_()
            move(parameters, gradients, -self.step_size)
        elif (norm := norm_over_shards(gradients, parameters)) > 0:
            move(parameters, gradients, -self.step_size / norm)
