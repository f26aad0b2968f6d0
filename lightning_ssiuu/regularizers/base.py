"""What an objective expects of its regulariser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_ssiuu.models.answers import Answers
from lightning_ssiuu.training.checkpoints import Stateful
from lightning_ssiuu.training.hyperparameters import Described


class Regularizer(Stateful, Described, ABC):
    """What an objective expects of its ``regularizer``: collect per micro-batch, act once per optimiser step.

    Only :meth:`apply` has to be written. What a resumed run needs is named in ``state_attributes``
    (:class:`~lightning_ssiuu.training.checkpoints.Stateful`). ``part`` is a micro-batch's forget part: ``input_ids,
    attention_mask, labels``, each ``[B, L]``. An option outside the range that its line gives is a UserError.

    Example:
        >>> class Halve(Regularizer):
        ...     def apply(self, model):
        ...         for parameter in model.parameters():
        ...             parameter.grad.mul_(0.5)
        ...         return {}
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> layer.weight.grad = layer.weight.new_ones(1, 1)
        >>> Halve().apply(layer), layer.weight.grad
        ({}, tensor([[0.5000]]))
    """

    @property
    def differentiates(self) -> bool:
        """Whether :meth:`collect` goes back through the forget part's pass, best without the retain part in it."""
        return False

    def check_sharded(self) -> None:
        """Raise a UserError if it cannot act on weights that are cut over the ranks (FSDP2)."""

    def prepare(self, module: Any) -> None:
        """Look at the objective (its ``model``, its ``training_parts("retain")``) before a new run's first step."""

    def before_forward(self, model: nn.Module, part: Mapping[str, Tensor]) -> None:
        """Be told, in an ordinary training step, of the forget part before any of its forward passes."""

    def collect(self, model: nn.Module, answers: Answers, part: Mapping[str, Tensor]) -> None:
        """See a micro-batch's forget part and its forward pass, with the graph, which is shared with the loss."""

    def before_backward(self, model: nn.Module, loss: Tensor) -> None:
        """Be told, after :meth:`collect` in an ordinary training step, of the loss (scalar) differentiated next."""

    @abstractmethod
    def apply(self, model: nn.Module) -> dict[str, float]:
        """Change the parameters' ``.grad`` before clipping and the optimiser step; returns figures to log."""

    def after_step(self, model: nn.Module) -> None:
        """See, or change, the weights right after an optimiser step."""
