"""What an objective expects of its regulariser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_ssiuu.models.answers import Answers


class Regularizer(ABC):
    """What an objective expects of its ``regularizer``: collect per micro-batch, act once per optimiser step.

    Example:
        >>> import torch
        >>> class Halve(Regularizer):
        ...     def collect(self, model, answers, part): ...
        ...     def apply(self, model):
        ...         for parameter in model.parameters():
        ...             parameter.grad.mul_(0.5)
        ...         return {}
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> layer(torch.ones(1, 1)).backward()
        >>> Halve().apply(layer), layer.weight.grad
        ({}, tensor([[0.5000]]))
    """

    #: Whether DeepSpeed's ZeRO will do, which loses changes to the weights and knows of no forward pass but the step's.
    under_zero = True

    def before_forward(self, model: nn.Module, part: Mapping[str, Tensor]) -> None:  # noqa: B027 - optional
        """Be told, in an ordinary training step, of the forget part before any of its forward passes.

        Args:
            model: The model.
            part: As :meth:`collect` will get it.
        """

    def before_backward(self, model: nn.Module, loss: Tensor) -> None:  # noqa: B027 - optional
        """Be told, after :meth:`collect` in an ordinary training step, of the loss that is differentiated next.

        Args:
            model: The model.
            loss: Scalar, as the training step returns it.
        """

    @abstractmethod
    def collect(self, model: nn.Module, answers: Answers, part: Mapping[str, Tensor]) -> None:
        """See a micro-batch's forget part before the loss is differentiated.

        Args:
            model: The model the answers came from.
            answers: Its forward pass on the part, graph attached; shared with the loss.
            part: ``input_ids, attention_mask, labels``, each ``[B, L]``.
        """

    @abstractmethod
    def apply(self, model: nn.Module) -> dict[str, float]:
        """Change the parameters' ``.grad`` before clipping and the optimiser step; returns figures to log."""

    def prepare(self, module: Any) -> None:  # noqa: B027 - optional
        """Look at the model before the first step of a new run (not of a resumed one).

        Args:
            module: The objective: ``module.model``, ``module.training_parts("retain")``.
        """

    def after_step(self, model: nn.Module) -> None:  # noqa: B027 - optional
        """See, or change, the weights right after an optimiser step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values and tensors.

        Under FSDP2 this runs on every rank; tensors that are shards (``DTensor``) have to stand in a dictionary under
        the name of the parameter they are cut like, as ``model.named_parameters()`` has it.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - optional, like state_dict
        """Take up the state of an interrupted run."""
