"""What the attribution regularisers have in common at the level of weights and of neurons."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ssiuu.models.answers import Target
from lightning_ssiuu.regularizers.penalty import Penalty, WeightMode
from lightning_ssiuu.training.shards import reduced
from lightning_ssiuu.utils.errors import UserError, check_choice

Anchor = Literal["previous", "original"]


class AttributionPenalty(Penalty):
    """What the penalty has in common at both levels: options, the probability's scale, warnings.

    Args:
        anchor: ``"previous"`` holds A to its value one optimiser step ago (Algorithm 1), ``"original"`` to its value at
            the first step, where the weights are still the original model's. Either is a value on that step's batch;
            the first step has none and hence no penalty.
        target: ``"sequence"`` (P, the paper's), ``"length_normalised"`` (P^{1/T}) or ``"log_probability"``
            (log P / T, without the factor P that makes attributions vanish as the answer is forgotten).
        modules: Restrict to these sites, e.g. ``["mlp_up", "layer3.attn_q"]``; None for no restriction. When training
            starts, an architecture without known sites and modules that name none are refused.
        **kwargs: As :class:`Penalty`; an absolute λ, the paper's, depends on the model's size and P, can be negligible.
    """

    state_attributes = (*Penalty.state_attributes, "_anchor", "_anchor_scale")  # between steps there is nothing else
    _anchor: Any = None  # A / e^anchor_scale, in the subclass's form

    def __init__(
        self,
        weight: float = 1e-3,
        weight_mode: WeightMode = "absolute",
        anchor: Anchor = "previous",
        target: Target = "sequence",
        modules: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(weight, weight_mode, **kwargs)
        check_choice("regularizer.anchor", anchor, Anchor)
        check_choice("regularizer.target", target, Target)
        if modules is not None and not modules:
            raise UserError("regularizer.modules", modules, "null, or at least one module to restrict to")
        self.anchor, self.target, self.modules = anchor, target, modules
        self._scale = self._anchor_scale = -math.inf  # logarithms of what this step's g and the anchor are relative to
        self._warned: set[str] = set()

    def _rescaled(self, logps: Tensor) -> float:
        """The scale, the highest log-probability of this step so far on any rank, with these seen too.

        0 for log-probabilities themselves, whose gradients are of an ordinary size.
        """
        if self.target == "log_probability":
            return 0.0
        text = None
        if logps.mean().exp() > 0.99:
            text = "answers are saturated (mean P > 0.99): ∂P and hence attributions are near 0"
        elif logps.max().exp() < 1e-6 and self.weight_mode == "absolute":
            advice = 'weight_mode "relative" or target "length_normalised" keeps the penalty alive'
            text = f"all answers have P < 1e-6: the absolute penalty has vanished; {advice}"
        if text is not None and text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"{type(self).__name__}: {text}", stacklevel=2)
        return max(self._scale, reduced(logps.max(), dist.ReduceOp.MAX if dist.is_available() else None))

    def _values(self, logps: Tensor) -> Tensor:
        """What is attributed, relative to e^scale, ``[B]``: the largest probability is 1."""
        return logps if self.target == "log_probability" else (logps - self._scale).exp()

    def _factors(self, logps: Tensor) -> Tensor:
        """Derivatives of :meth:`_values` by the log-probabilities, constants ``[B]``."""
        return torch.ones_like(logps) if self.target == "log_probability" else (logps.detach() - self._scale).exp()

    def _scale_figure(self, scale: float) -> dict[str, float]:
        return {} if self.target == "log_probability" else {"max_log_probability": scale}  # nats
