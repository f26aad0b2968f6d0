"""Losses that several objectives share; others stand with their objective.

Every function works on the labelled positions alone (``N`` of them over ``B`` sequences); none sees a prompt or a
padding token, so none can forget to mask one. ``reduction`` is ``"sequence"``, the mean over sequences of token means,
or ``"token"``, the mean over all tokens of all ranks (:func:`~lightning_ssiuu.models.answers.mean_of_sums`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Reduction, mean_of_sums, mean_over_answers


def answer_nll(answers: Answers, reduction: Reduction = "sequence") -> Tensor:
    """Negative log-likelihood per answer token, in nats; a mean over all tokens lets long answers weigh more."""
    return -mean_of_sums(answers.logps, answers.lengths, reduction)


def gradient_ascent(answers: Answers, reduction: Reduction = "sequence") -> Tensor:
    """Minus :func:`answer_nll`, unbounded below (method GA of Jang et al., arXiv 2210.01504, Eq. 1, there a sum)."""
    return -answer_nll(answers, reduction)


def kl_divergence(answers: Answers, reference_logits: Tensor, reduction: Reduction = "sequence") -> Tensor:
    """``KL(reference ‖ model)`` at the labelled positions (``reference_logits`` ``[N, V]``), in nats.

    The retain term of KL minimisation (Maini et al., TOFU, arXiv 2401.06121, Sec. 4), zero where both predict alike.
    """
    wide = answers.token_logps.dtype
    target = reference_logits.to(wide).log_softmax(-1)
    per_token = F.kl_div(answers.logits.to(wide).log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
    return mean_over_answers(per_token, answers, reduction=reduction)


def preference(margin: Tensor, beta: float) -> Tensor:
    """``−(2/β) mean log σ(β margin)``, what NPO, SimNPO and DPO make of their margins ``[B]`` (nats)."""
    return -2.0 / beta * F.logsigmoid(beta * margin).mean()


def cross_entropy(
    answers: Answers, target_logits: Tensor, counted: Tensor | None = None, reduction: Reduction = "sequence"
) -> Tensor:
    """Cross-entropy with the constants ``softmax(target_logits)`` ``[N, V]`` at the labelled positions, in nats.

    ``counted`` ``[N]`` bool says which positions count; None for all.
    """
    logits = answers.logits.to(target_logits.dtype)
    per_token = F.cross_entropy(logits, target_logits.softmax(-1), reduction="none")
    return mean_over_answers(per_token, answers, counted, reduction)
