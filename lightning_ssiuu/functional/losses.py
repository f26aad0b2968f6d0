"""Losses on answers, as means over sequences of token means.

Every function works on the labelled positions alone (``N`` of them over ``B`` sequences); none sees a prompt or a
padding token, so none can forget to mask one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


def answer_token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each answer token, in nats.

    Args:
        logits: ``[N, V]``.
        targets: ``[N]`` token ids.

    Returns:
        ``[N]`` values ≤ 0, in float32 or wider whatever the logits' type.

    Example:
        >>> answer_token_logps(torch.zeros(1, 4), torch.tensor([2])).exp()
        tensor([0.2500])
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(wide, targets, reduction="none")


def sequence_sums(values: Tensor, sequence_index: Tensor, n_sequences: int) -> Tensor:
    """Sum per-token values within each sequence.

    Args:
        values: ``[N]`` one value per labelled token.
        sequence_index: ``[N]`` the row of the batch each belongs to.
        n_sequences: B.

    Returns:
        ``[B]``; zero for a sequence without labels.

    Example:
        >>> sequence_sums(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 0, 1]), 2)
        tensor([3., 5.])
    """
    return values.new_zeros(n_sequences).index_add(0, sequence_index, values)


@dataclass(frozen=True)
class Answers:
    """What a forward pass says about the answers of a batch; derived values are computed once, on demand.

    Args:
        logits: ``[N, V]`` at the labelled positions only.
        targets: ``[N]`` the answer tokens.
        sequence_index: ``[N]`` the row of the batch each belongs to, sorted.
        n_sequences: B.

    Example:
        >>> answers = Answers(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2)
        >>> answers.logps.exp(), answers.lengths
        (tensor([0.0625, 0.2500]), tensor([2., 1.]))
    """

    logits: Tensor
    targets: Tensor
    sequence_index: Tensor
    n_sequences: int

    @cached_property
    def token_logps(self) -> Tensor:
        """``[N]`` log-probabilities of the answer tokens (nats)."""
        return answer_token_logps(self.logits, self.targets)

    @cached_property
    def logps(self) -> Tensor:
        """``[B]`` log P(y|x), the sum over the answer's tokens (nats)."""
        return sequence_sums(self.token_logps, self.sequence_index, self.n_sequences)

    @cached_property
    def lengths(self) -> Tensor:
        """``[B]`` number of answer tokens."""
        ones = torch.ones_like(self.token_logps.detach())
        return sequence_sums(ones, self.sequence_index, self.n_sequences)

    @property
    def mean_logps(self) -> Tensor:
        """``[B]`` mean log-probability per answer token (nats)."""
        return self.logps / self.lengths.clamp(min=1)

    @property
    def token_correct(self) -> Tensor:
        """``[N]`` whether greedy decoding picks the answer's token there."""
        return self.logits.argmax(-1) == self.targets


def mean_over_answers(values: Tensor, answers: Answers, counted: Tensor | None = None) -> Tensor:
    """Mean over sequences of the mean over each answer's tokens; a sequence with none of them adds 0 to the sum.

    Args:
        values: ``[N]`` one per labelled token.
        answers: Whose tokens they are.
        counted: ``[N]`` bool, the tokens that count; None for all.

    Example:
        >>> answers = Answers(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2)
        >>> mean_over_answers(torch.tensor([1.0, 2.0, 5.0]), answers)  # (1.5 + 5) / 2
        tensor(3.2500)
    """
    lengths = answers.lengths
    if counted is not None:
        values = values.where(counted, 0.0)
        lengths = sequence_sums(counted.to(lengths.dtype), answers.sequence_index, answers.n_sequences)
    return (sequence_sums(values, answers.sequence_index, answers.n_sequences) / lengths.clamp(min=1)).mean()


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
