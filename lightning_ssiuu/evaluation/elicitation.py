"""What comes back: a score at the weights an adversary reaches who relearns a part of the forget set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules import RelearnDataModule
from lightning_ssiuu.evaluation.scorer import evaluate, untouched
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.models.loading import evaluation_mode
from lightning_ssiuu.training.optimizers import optimizer_of, refusal
from lightning_ssiuu.training.perturbation import answered_rows, displaced, gradient_at, rows_of, share_of_mean
from lightning_ssiuu.training.shards import shard_like
from lightning_ssiuu.utils.errors import NotFinite, UserError, check_at_least


@dataclass
class Elicitation:
    """An adversary: a harmful relearning attack (arXiv 2509.22263, Sec. 4) of a few steps, as :class:`Harmful` takes.

    Args:
        share: Fraction of the forget set that the adversary relearns, in (0, 1); the others are scored.
        learning_rate: Of AdamW without weight decay, as the attack's.
        steps: Optimiser steps, ≥ 1.
        batch_size: Sequences per step, over all devices.
        optimizer: Takes the parameters, gives another optimiser (with a rate of its own); None for AdamW.

    Raises:
        UserError: If an option is outside its range.

    Example:
        >>> Elicitation(share=0.3, learning_rate=5e-4, steps=20).steps
        20
    """

    share: float = 0.3
    learning_rate: float = 2e-4
    steps: int = 10
    batch_size: int = 8
    optimizer: OptimizerCallable | None = None

    #: Where these options stand, for errors.
    section: ClassVar[str] = "elicited"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"{self.section}.share", self.share, "a fraction in (0, 1)")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"{self.section}.learning_rate", self.learning_rate, "a finite number > 0")
        check_at_least(f"{self.section}.steps", self.steps, 1)
        check_at_least(f"{self.section}.batch_size", self.batch_size, 1)
        if self.optimizer is not None:
            try:
                self.make_optimizer(nn.Linear(2, 2))
            except (TypeError, ValueError) as error:
                raise refusal(f"{self.section}.optimizer", error) from error

    def make_optimizer(self, model: nn.Module) -> Any:
        """A new optimiser of the adversary's, for what trains."""
        if self.optimizer is not None:
            return optimizer_of(model, self.optimizer)
        return optimizer_of(model, partial(torch.optim.AdamW, lr=self.learning_rate, weight_decay=0.0))


def elicited_score(
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    data: RelearnDataModule,
    adversary: Elicitation,
    score: str = "probability",
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """The score of ``data.scored`` after the adversary relearned ``data.attacked``, in percent; each rank must call it.

    Random states and modes stay as they were, and all that :func:`relearned` says. The score is the same on any number
    of ranks, but for rounding.

    Raises:
        NotFinite: If the adversary diverges at its learning rate.
    """
    with untouched(model):
        torch.manual_seed(data.seed)  # what is dropped
        with relearned(model, adversary, data.attacked_batches(), context):
            try:
                return evaluate(model, tokenizer, [data.scored_batches()], [score])["forget"][score]
            except NotFinite as error:
                allowed = "a rate at which the relearned model's numbers stay finite"
                raise NotFinite(f"{adversary.section}.learning_rate", adversary.learning_rate, allowed) from error


@contextmanager
def relearned(
    model: AnswerModel,
    adversary: Elicitation,
    batches: Iterable[Part],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[None]:
    """Inside, the trained weights (with adapters: the adapters) are those after the adversary's steps on the batches.

    After it they are what they were, bit for bit, also after an exception, and every ``.grad`` is. No graph of a
    forward pass may be kept across its beginning or its end. Steps are in training mode: dropout and gradient
    checkpointing are the attack's. Memory: a copy of the trained weights, a gradient and the optimiser's state, which
    is gone inside. ``context`` is that of a training pass (autocast).
    """
    with displaced(model) as parameters:
        with evaluation_mode(model):  # after which modes are what they were
            model.train()
            optimizer = adversary.make_optimizer(model)
            for batch in islice(batches, adversary.steps):
                part = move_data_to_device(batch, parameters[0].device)
                chosen, weight = share_of_mean(answered_rows(part))
                part = rows_of(part, chosen)
                with context():
                    answers = model(part["input_ids"], part["attention_mask"], part["labels"])
                    loss = -weight * answers.mean_logps.mean()
                _step(optimizer, parameters, gradient_at(loss, parameters, model))
                del answers, loss
            del optimizer
        yield


def _step(optimizer: Any, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    # Accumulated gradients, or views of what DDP communicates, are the run's: they stand aside for the step.
    stash = [parameter.grad for parameter in parameters]
    try:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = shard_like(gradient.to(parameter.dtype), parameter)
        optimizer.step()
    finally:
        for parameter, own in zip(parameters, stash, strict=True):
            parameter.grad = own
    torch.clear_autocast_cache()
