"""SSIUU: a backbone objective plus the attribution regulariser."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.errors import UserError
from lightning_ssiuu.models import AnswerModel
from lightning_ssiuu.objectives.base import Part, UnlearningModule
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.regularizers import AttributionRegularizer, Regularizer


class SSIUU(UnlearningModule):
    """Suppressing spurious unlearning neurons (Yang et al., ICLR 2026, arXiv 2509.22263, Eqs. 6 and 12 to 14).

    The losses and their weights are the backbone's; the regulariser keeps negative attribution from growing, so that
    the answer is erased and not merely pushed down.

    Args:
        backbone: Any objective; it lends its losses and weights and never loads a model of its own. None takes
            gradient difference, the paper's.
        regularizer: None takes ``AttributionRegularizer()`` with the paper's λ = 1e-3.
        **kwargs: As :class:`UnlearningModule`. ``forget_weight`` and ``retain_weight`` belong to the default backbone;
            with a backbone given, set them there.

    Raises:
        UserError: If the backbone is itself regularised, or weights are given beside a backbone.

    Example:
        >>> module = SSIUU(checkpoint="tiny", regularizer=AttributionRegularizer(weight=0.1, weight_mode="relative"))
        >>> type(module.backbone).__name__, module.regularizer.weight
        ('GradientDifference', 0.1)
    """

    def __init__(
        self,
        backbone: UnlearningModule | None = None,
        regularizer: Regularizer | None = None,
        forget_weight: float | None = None,
        retain_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        weights: dict[str, Any] = {"forget_weight": forget_weight, "retain_weight": retain_weight}
        given = {name: value for name, value in weights.items() if value is not None}
        if backbone is None:
            backbone = GradientDifference(**given)
        for name, value in given.items():
            if value != getattr(backbone, name):
                raise UserError(name, value, "unset beside a backbone: give the weights to the backbone")
        if backbone.regularizer is not None:
            raise UserError("backbone.regularizer", type(backbone.regularizer).__name__, "none: SSIUU brings its own")
        super().__init__(
            regularizer=regularizer if regularizer is not None else AttributionRegularizer(),
            forget_weight=backbone.forget_weight,
            retain_weight=backbone.retain_weight,
            **kwargs,
        )
        # In a tuple, so that torch does not register the backbone: it shares this module's parameters.
        self._backbone = (backbone,)

    @property
    def backbone(self) -> UnlearningModule:
        """The objective whose losses are used."""
        return self._backbone[0]

    def adopt(self, model: AnswerModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the backbone the same model and the same memory of this step's forward passes."""
        super().adopt(model, tokenizer)
        self.backbone.adopt(model, tokenizer)
        self.backbone._step_memory = self._step_memory

    def forget_loss(self, batch: Part) -> Tensor:
        """The backbone's."""
        return self.backbone.forget_loss(batch)

    def retain_loss(self, batch: Part) -> Tensor:
        """The backbone's."""
        return self.backbone.retain_loss(batch)
