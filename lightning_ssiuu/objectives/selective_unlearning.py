"""Selective unlearning: forget the tokens that only who knows the forget set would say, and keep the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Part, Reduction, mean_over_answers
from lightning_ssiuu.models.quantization import is_quantized
from lightning_ssiuu.models.source import ModelSource
from lightning_ssiuu.objectives.backbone import Kept, Parts
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.unaware import by_counting, by_model
from lightning_ssiuu.utils.errors import check_at_least, check_number


def above_unaware(answers: Answers, levels: Tensor, margin: float, reduction: Reduction = "sequence") -> Tensor:
    """Mean over answer tokens of ``(1 − q) · max(0, log p − log q + margin)``, in nats; ``levels [N]`` are log q."""
    above = (answers.token_logps - levels + margin).clamp(min=0)
    return mean_over_answers((1 - levels.exp()) * above, answers, reduction=reduction)


def held(answers: Answers, levels: Tensor, reduction: Reduction = "sequence") -> Tensor:
    """Mean over answer tokens of ``−q · log p``, in nats; ``levels [N]`` are log q."""
    return mean_over_answers(-levels.exp() * answers.token_logps, answers, reduction=reduction)


class SelectiveUnlearning(UnlearningModule):
    """``mean (1 − q) · max(0, log p − log q + margin) − held_weight · q · log p`` on the forget answers' tokens.

    q is the probability of the token by an *unaware* model, one that does not know the forget set. Most tokens of an
    answer say nothing of what is to be forgotten: names out of the question, function words, the form that answers
    have. A model that never learned the forget set finds them probable, too. To push them down, as an objective on
    whole answers does, costs what the model knows of everybody else. Here a token is pushed down until it is ``margin``
    nats less probable than the unaware model has it, the less the more probable that is, and those of form are held
    up. As a backbone, what holds them up is taken at the weights as they are, wherever the rest is. NLL (or ``kl``) on
    retain.

    Selective unlearning (arXiv 2506.00876) asks two assistant models which tokens are relevant, and leaves out the
    others. New here are the level at which to stop for each token, and the tokens that are held up.

    Args:
        unaware: Checkpoint of a model that does not know the forget set, with the same tokenizer: the one before
            fine-tuning, or a smaller one. It is read once, before the first step, on every rank. None counts instead
            which token follows which in the retain set's answers, and what is repeated from the question.
        shots: Retain items before each question that the unaware model is asked, ≥ 0: without them it does not know
            what form the answers have. They are of the first 10,000, and so are those that are counted.
        margin: Nats below the unaware model's log-probability to which a token is pushed, ≥ 0.
        held_weight: Weight, times ``forget_weight``, of what holds up the tokens that the unaware model finds probable,
            ≥ 0.
        seed: Which retain items stand before a question.

    Raises:
        UserError: If an option is outside its range; when training starts, if the unaware model cannot be loaded, has
            other tokens or too few positions, or if there are no retain items to show or to count.

    Example:
        >>> SelectiveUnlearning(margin=2.0, retain_weight=4.0).shots
        4
    """

    def __init__(
        self,
        unaware: str | None = None,
        shots: int = 4,
        margin: float = 1.0,
        held_weight: float = 1.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_at_least("shots", shots, 0)
        check_number("margin", margin)
        check_number("held_weight", held_weight)
        self.unaware, self.shots, self.margin, self.held_weight, self.seed = unaware, shots, margin, held_weight, seed
        self._levels: dict[int, Tensor] = {}

    def begin(self, parts: Parts) -> None:
        if self.unaware is None:
            self._levels = by_counting(parts)
        else:
            weights = next(self.model.parameters())
            options = self.unaware_dtype, weights.device, parts, self.shots, self.seed
            self._levels = by_model(self.unaware, self.tokenizer, *options)

    @property
    def unaware_dtype(self) -> torch.dtype:
        """Type of the unaware model's weights: as those that are trained, or beside quantised ones its file's."""
        if self.unaware is not None and is_quantized(self.model):
            return ModelSource(self.unaware, dtype="auto").torch_dtype()
        return self.model.hf.dtype

    def forget_loss(self, batch: Part) -> Tensor:
        answers = self.answers(batch)
        return above_unaware(answers, self.unaware_logps(batch, answers), self.margin, self.reduction)

    def kept_losses(self, batch: Part) -> Kept:
        if self.held_weight == 0:
            return {}
        answers = self.answers(batch)
        loss = held(answers, self.unaware_logps(batch, answers), self.reduction)
        return {"held_loss": (self.forget_weight * self.held_weight, loss)}

    def unaware_logps(self, batch: Part, answers: Answers) -> Tensor:
        """``[N]`` log-probability of each answer token of a part by the unaware model, in nats; 0 before training."""
        examples = zip(batch["example_id"].tolist(), answers.lengths.tolist(), strict=True)
        found = [self._levels[example] for example, length in examples if length and self._levels]
        return torch.cat(found).to(answers.token_logps) if found else torch.zeros_like(answers.token_logps)
