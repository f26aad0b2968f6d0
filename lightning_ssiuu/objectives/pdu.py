"""PDU: flatten the logits on the forget set under a bound on the retain loss, which a dual variable enforces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Part, Reduction, mean_over_answers
from lightning_ssiuu.models.loading import evaluation_mode
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.training.reference import Observation, reference_logits
from lightning_ssiuu.utils.distributed import mean_over_ranks
from lightning_ssiuu.utils.errors import UserError, check_number


def logit_margin_flattening(answers: Answers, reduction: Reduction = "sequence") -> Tensor:
    """PDU's F: squared distance of the largest logit from the mean logit, of answer tokens; squared logits, ≥ 0."""
    logits = answers.logits.to(answers.token_logps.dtype)
    margins = logits.max(-1).values - logits.mean(-1)
    return mean_over_answers(margins.square(), answers, reduction=reduction)


class PDU(UnlearningModule):
    """``γ F + λ ℓ_retain`` with ``F`` the logit margin and ``λ ← max(0, λ + η (ℓ_retain − ε))`` after each step.

    Entesari et al., arXiv 2506.05314, as in open-unlearning, with two differences: λ moves once per optimiser step by
    the retain loss of the global batch (there: per micro-batch, by each rank's own), and F is taken at the positions
    that predict the answer (there: one later). ``retain_weight`` is λ: what is given is where it starts, and it
    changes. F is a squared logit, usually large: the authors start λ at 50 to 100.

    Args:
        epsilon: Bound ε on the retain loss, in nats, > 0; None takes ``1 + tolerance`` times the original model's
            over the retain set.
        tolerance: See ``epsilon``; ≥ 0.
        dual_step_size: Step η of λ, ≥ 0; 0 keeps it.
        dual_warmup_epochs: So many epochs λ stays where it starts.
        retain_weight: λ at the start, ≥ 0.

    Raises:
        UserError: If there is no ``epsilon`` and ``retain`` is ``"kl"`` (of which the original model's loss is 0).

    Example:
        >>> PDU(epsilon=0.3, retain_weight=50.0).bound
        0.3
    """

    can_be_backbone = False
    state_attributes = ("retain_weight", "bound")

    def __init__(
        self,
        epsilon: float | None = None,
        tolerance: float = 0.1,
        dual_step_size: float = 1.0,
        dual_warmup_epochs: int = 0,
        retain_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(retain_weight=retain_weight, **kwargs)
        if epsilon is not None:
            check_number("epsilon", epsilon, positive=True)
        elif self.retain == "kl":
            raise UserError("epsilon", epsilon, "a finite number > 0 with retain kl")
        check_number("tolerance", tolerance)
        check_number("dual_step_size", dual_step_size)
        check_number("dual_warmup_epochs", dual_warmup_epochs)
        self.tolerance, self.dual_step_size, self.dual_warmup_epochs = tolerance, dual_step_size, dual_warmup_epochs
        self.bound = epsilon  # None until training starts
        self._measured: Tensor | None = None
        self._since_step: list[Tensor] = []

    def references(self) -> dict[str, Observation]:
        # Also while λ is 0: it may rise again.
        return {"retain/logits": reference_logits} if self.retain == "kl" else {}

    def forget_loss(self, batch: Part) -> Tensor:
        return logit_margin_flattening(self.answers(batch), self.reduction)

    def retain_loss(self, batch: Part) -> Tensor:
        loss = super().retain_loss(batch)
        self._measured = loss.detach()
        return loss

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.bound is None:  # the model still is the original one
            self.bound = (1 + self.tolerance) * self._loss_on_retain_set()

    def training_step(self, batch: Mapping[str, Part], batch_idx: int) -> Tensor:
        self._measured = None
        loss = super().training_step(batch, batch_idx)
        if self._measured is None and "retain" in batch:  # where λ is 0
            with torch.no_grad():
                self.retain_loss(batch["retain"])
        if self._measured is not None:
            self._since_step.append(self._measured)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)  # the gradients at hand are still the old λ's
        if not self._since_step:
            return
        loss = mean_over_ranks({"loss": torch.stack(self._since_step).mean()})["loss"].item()
        self._since_step.clear()
        if self.bound is not None and self.current_epoch >= self.dual_warmup_epochs:
            self.retain_weight = max(0.0, self.retain_weight + self.dual_step_size * (loss - self.bound))
        self.log_training({"dual_variable": self.retain_weight})

    def _loss_on_retain_set(self) -> float:
        total, weight = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        with torch.no_grad(), evaluation_mode(self.model), self.trainer.precision_plugin.forward_context():
            for part in self.training_parts("retain"):
                answers = self(part)
                if self.reduction == "token":
                    total, weight = total - answers.logps.sum(), weight + answers.lengths.sum()
                else:
                    total, weight = total - answers.mean_logps.sum(), weight + answers.n_sequences
        # Every rank has gone through the whole set; agreeing to the last bit is what λ needs.
        return mean_over_ranks({"loss": total / weight.clamp(min=1)})["loss"].item()
