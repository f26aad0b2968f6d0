"""Losses that several objectives share, as means over sequences of token means; others stand with their objective.

Every function works on the labelled positions alone (``N`` of them over ``B`` sequences); none sees a prompt or a
padding token, so none can forget to mask one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_ssiuu.models.answers import Answers, mean_over_answers


def answer_nll(answers: Answers) -> Tensor:
    """Negative log-likelihood: mean over sequences of the mean over answer tokens, in nats.

    Token-weighted means would let long answers, and under data parallelism ranks with long answers, weigh more.

    Example:
        >>> import torch
        >>> answers = Answers(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2)
        >>> round(answer_nll(answers).item(), 4)  # log 4
        1.3863
    """
    return -answers.mean_logps.mean()


def gradient_ascent(answers: Answers) -> Tensor:
    """Loss of gradient ascent on the forget set: minus :func:`answer_nll`, so that descending it forgets.

    Source: gradient ascent of method GA (Jang et al., arXiv 2210.01504, Eq. 1, as a mean instead of a sum).

    Example:
        >>> import torch
        >>> answers = Answers(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(gradient_ascent(answers).item(), 4)
        -1.3863
    """
    return -answer_nll(answers)


def kl_divergence(answers: Answers, reference_logits: Tensor) -> Tensor:
    """``KL(reference ‖ model)`` of the next-token distributions at the labelled positions, in nats.

    Mean over sequences of the mean over answer tokens; zero where the model predicts as the reference does.

    Args:
        answers: The model's.
        reference_logits: ``[N, V]`` at the same positions.

    Source: the retain term of KL minimisation (Maini et al., TOFU, arXiv 2401.06121, Sec. 4).

    Example:
        >>> import torch
        >>> answers = Answers(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(kl_divergence(answers, torch.tensor([[0.0, 100.0]])).item(), 4)  # log 2
        0.6931
    """
    wide = answers.token_logps.dtype
    target = reference_logits.to(wide).log_softmax(-1)
    per_token = F.kl_div(answers.logits.to(wide).log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
    return mean_over_answers(per_token, answers)


def preference(margin: Tensor, beta: float) -> Tensor:
    """``−(2/β) mean log σ(β margin)``, what NPO, SimNPO and DPO make of their margins ``[B]`` (nats).

    Example:
        >>> import torch
        >>> round(preference(torch.zeros(1), beta=1.0).item(), 4)  # 2 log 2
        1.3863
    """
    return -2.0 / beta * F.logsigmoid(beta * margin).mean()


def cross_entropy(answers: Answers, target_logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """Cross-entropy with ``softmax(target_logits)`` at the labelled positions, in nats.

    Args:
        answers: The model's.
        target_logits: ``[N, V]``, constants.
        counted: ``[N]`` bool, which positions count; None for all.

    Example:
        >>> import torch
        >>> answers = Answers(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(cross_entropy(answers, torch.zeros(1, 4)).item(), 4)  # log 4
        1.3863
    """
    logits = answers.logits.to(target_logits.dtype)
    per_token = F.cross_entropy(logits, target_logits.softmax(-1), reduction="none")
    return mean_over_answers(per_token, answers, counted)
