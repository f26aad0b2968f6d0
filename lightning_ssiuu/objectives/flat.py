"""FLAT: raise a template answer and lower the true one by the f-divergence between them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Part, sequence_sums
from lightning_ssiuu.objectives.rejection import RejectingModule
from lightning_ssiuu.utils.errors import check_choice

Divergence = Literal["total_variation", "kl", "jensen_shannon", "pearson"]


def mean_probability(answers: Answers) -> Tensor:
    """``[B]`` mean probability of an answer's tokens, in [0, 1]."""
    sums = sequence_sums(answers.token_logps.exp(), answers.sequence_index, answers.n_sequences)
    return sums / answers.lengths.clamp(min=1)


def activation(values: Tensor, divergence: Divergence) -> Tensor:
    """g*(v) of arXiv 2410.11143: takes any number into the domain of the divergence's conjugate f*."""
    if divergence == "total_variation":
        return torch.tanh(values) / 2
    if divergence == "jensen_shannon":
        return math.log(2) - F.softplus(-values)
    return values


def conjugate(values: Tensor, divergence: Divergence) -> Tensor:
    """f*(u), the convex conjugate of the divergence's f."""
    if divergence == "kl":
        return (values - 1).exp()
    if divergence == "pearson":
        return values.square() / 4 + values
    if divergence == "jensen_shannon":
        return -(2 - values.exp()).log()
    return values


class FLAT(RejectingModule):
    """``mean f*(g*(p_answer)) − mean g*(p_rejection)``, p the mean probability of an answer's tokens; NLL on retain.

    Forget data only loss adjustment (Wang et al., arXiv 2410.11143): descending it maximises the variational form
    of an f-divergence between rejections and true answers, so that both are weighed by how likely they still are. Both
    p carry the factor p in their gradients: what has become unlikely is left alone.

    Deviations: the paper has no retain loss (``retain_weight: 0``); its code averages p over a batch before g* and f*,
    here they are taken of each example, as an expectation over examples is.

    Args:
        divergence: ``"total_variation"``, ``"kl"``, ``"jensen_shannon"`` or ``"pearson"``.
        rejections: Template answers; None takes :data:`~lightning_ssiuu.objectives.rejection.REJECTIONS`.

    Raises:
        UserError: If a rejection is empty or does not fit into the model's context.

    Example:
        >>> FLAT(divergence="kl").divergence
        'kl'
    """

    def __init__(
        self, divergence: Divergence = "total_variation", rejections: list[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(rejections=rejections, **kwargs)
        check_choice("divergence", divergence, Divergence)
        self.divergence: Divergence = divergence

    def forget_loss(self, batch: Part) -> Tensor:
        raised = activation(mean_probability(self.answers(self.rejected(batch))), self.divergence)
        lowered = activation(mean_probability(self.answers(batch)), self.divergence)
        return (conjugate(lowered, self.divergence) - raised).mean()
