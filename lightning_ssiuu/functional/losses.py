"""Losses on answers, as means over sequences of token means.

Every function works on the labelled positions alone (``N`` of them over ``B`` sequences); none sees a prompt or a
padding token, so none can forget to mask one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_ssiuu.models.answers import Answers, mean_over_answers, sequence_sums


def answer_nll(answers: Answers) -> Tensor:
    """Negative log-likelihood: mean over sequences of the mean over answer tokens, in nats.

    Token-weighted means would let long answers, and under data parallelism ranks with long answers, weigh more.

    Example:
        >>> answers = Answers(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2)
        >>> round(answer_nll(answers).item(), 4)  # log 4
        1.3863
    """
    return -answers.mean_logps.mean()


def gradient_ascent(answers: Answers) -> Tensor:
    """Loss of gradient ascent on the forget set: minus :func:`answer_nll`, so that descending it forgets.

    Source: gradient ascent of method GA (Jang et al., arXiv 2210.01504, Eq. 1, as a mean instead of a sum).

    Example:
        >>> answers = Answers(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(gradient_ascent(answers).item(), 4)
        -1.3863
    """
    return -answer_nll(answers)


def unforgotten_ascent(answers: Answers, only_unforgotten: bool = True) -> Tensor:
    """:func:`gradient_ascent` over the answers that greedy decoding still gives token by token; others count 0.

    The mean is over all sequences, so that the fewer are left the smaller it is, and ranks with equal shares average
    right.

    Source: KLUE's choice of unforgotten samples (Yang et al., arXiv 2502.19207).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # the first answer is given, the second is not
        >>> answers = Answers(logits, torch.tensor([0, 0]), torch.tensor([0, 1]), 2)
        >>> round(unforgotten_ascent(answers).item(), 4)  # −log(1 + e^−2) / 2
        -0.0635
    """
    if not only_unforgotten:
        return gradient_ascent(answers)
    wrong = sequence_sums((~answers.token_correct).float(), answers.sequence_index, answers.n_sequences)
    return answers.mean_logps.where(wrong == 0, 0.0).mean()


def kl_divergence(answers: Answers, reference_logits: Tensor) -> Tensor:
    """``KL(reference ‖ model)`` of the next-token distributions at the labelled positions, in nats.

    Mean over sequences of the mean over answer tokens; zero where the model predicts as the reference does.

    Args:
        answers: The model's.
        reference_logits: ``[N, V]`` at the same positions.

    Source: the retain term of KL minimisation (Maini et al., TOFU, arXiv 2401.06121, Sec. 4).

    Example:
        >>> answers = Answers(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(kl_divergence(answers, torch.tensor([[0.0, 100.0]])).item(), 4)  # log 2
        0.6931
    """
    wide = answers.token_logps.dtype
    target = reference_logits.to(wide).log_softmax(-1)
    per_token = F.kl_div(answers.logits.to(wide).log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
    return mean_over_answers(per_token, answers)
