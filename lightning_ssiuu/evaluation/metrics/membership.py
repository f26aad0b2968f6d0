"""Membership inference: what attacks make of an answer, and how well that tells members from others.

A score takes the log-probability of each answer token ``[N]`` (nats, any float type), the row of each token ``[N]`` and
the number of rows B. It gives ``[B]`` float64 values, higher for likelier members, NaN for a row without tokens.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.evaluation.metrics.base import KeptValues, sequence_means, widest_float
from lightning_ssiuu.models.answers import sequence_sums
from lightning_ssiuu.utils.errors import UserError


def loss_score(token_logps: Tensor, sequence_index: Tensor, n_sequences: int) -> Tensor:
    """Minus the loss: mean log-probability per token, in nats (Yeom et al., arXiv 1709.01604)."""
    return sequence_means(token_logps, sequence_index, n_sequences)


def min_k(token_logps: Tensor, sequence_index: Tensor, n_sequences: int, k: float = 0.4) -> Tensor:
    """Min-K %: mean of the share ``k`` of an answer's token log-probabilities that are lowest, in nats.

    Of L tokens ⌊k·L⌋ count, at least one; ``k`` is in (0, 1], else a :class:`UserError` (Shi et al., arXiv 2310.16789).

    Example:
        >>> logps, rows = torch.tensor([-1.0, -4.0, -2.0, -3.0, -5.0]), torch.tensor([0, 0, 0, 0, 1])
        >>> min_k(logps, rows, 2, k=0.5)  # (4 + 3) / 2; one token at least
        tensor([-3.5000, -5.0000], dtype=torch.float64)
    """
    if not 0 < k <= 1:
        raise UserError("k", k, "a fraction in (0, 1]")
    order = token_logps.where(~token_logps.isnan(), -torch.inf).argsort()  # a NaN is to be among those that count
    order = order[sequence_index[order].argsort(stable=True)]
    values, rows = token_logps[order], sequence_index[order]
    lengths = sequence_sums(torch.ones_like(rows), rows, n_sequences)
    place = torch.arange(len(rows), device=rows.device) - (lengths.cumsum(0) - lengths)[rows]
    # 0.29 · 100 is 28.999… in floating point, and means 29
    counted = (lengths.to(widest_float(rows.device)) * k + 1e-6).floor().clamp(min=1)
    wide = values.to(widest_float(values.device)).where(place < counted[rows], 0.0)
    return sequence_sums(wide, rows, n_sequences) / counted.where(lengths > 0, torch.nan)


def min_k_plus_plus(
    logits: Tensor,
    targets: Tensor,
    sequence_index: Tensor,
    n_sequences: int,
    k: float = 0.4,
    least_deviation: float = 1e-6,
) -> Tensor:
    """Min-K %++: :func:`min_k` of token log-probabilities standardised by the prediction they come from.

    ``(log p(y) − μ) / σ`` with μ and σ the mean and standard deviation of ``log p(v)``, v drawn from the prediction, of
    ``logits`` ``[N, V]`` (any float type; works in float32 or wider) at the answer tokens ``targets`` ``[N]``. σ counts
    as ``least_deviation`` where it is smaller: a uniform prediction gives 0 within rounding, a certain one that is
    wrong a very low value. In standard deviations (Zhang et al., arXiv 2404.02936).
    """
    logps = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    probabilities = logps.exp()
    finite = logps.where(probabilities > 0, 0.0)  # 0 · −∞ is 0 here
    mean = (probabilities * finite).sum(-1)
    deviation = (probabilities * (finite - mean.unsqueeze(-1)).square()).sum(-1).sqrt().clamp(min=least_deviation)
    standardised = (logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - mean) / deviation
    return min_k(standardised, sequence_index, n_sequences, k)


def zlib_score(token_logps: Tensor, sequence_index: Tensor, n_sequences: int, texts: Sequence[str]) -> Tensor:
    """Mean log-probability per token over the size of the compressed answer, in nats per byte.

    Repetitive text is probable to every model; its few bytes make up for that (Carlini et al., arXiv 2012.07805). Size
    of the UTF-8 text compressed by zlib at its default level.
    """
    if isinstance(texts, str) or len(texts) != n_sequences:
        raise UserError("texts", len(texts), f"a list of {n_sequences}, one for each answer")
    means = sequence_means(token_logps, sequence_index, n_sequences)
    return means / means.new_tensor([len(zlib.compress(text.encode())) for text in texts])


def reference_score(
    token_logps: Tensor, reference_token_logps: Tensor, sequence_index: Tensor, n_sequences: int
) -> Tensor:
    """Mean log-probability per token above that of a model that did not see the answers, in nats.

    Source: Carlini et al., arXiv 2012.07805.
    """
    wide = widest_float(token_logps.device)
    return sequence_means(token_logps.to(wide) - reference_token_logps.to(wide), sequence_index, n_sequences)


def gradient_norm_score(losses: Tensor, parameters: Iterable[Tensor], each: bool = False) -> Tensor:
    """Minus the Euclidean norm of each answer's gradient: what was trained on has little left to learn from.

    ``each``: the mean of the norms of every parameter's own gradient, as in open-unlearning, in place of that of all.
    One backward pass for each of the ``[B]`` losses. Not for sharded models, whose ranks hold parts of the gradient.

    Source: Wang et al., "Pandora's White-Box", arXiv 2402.17012.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise UserError("parameters", 0, "at least one that needs a gradient")
    wide, scores = widest_float(losses.device), []
    for loss in losses:
        gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=wide) for g in gradients if g is not None])
        scores.append(-(norms.mean() if each else torch.linalg.vector_norm(norms)))
    return torch.stack(scores) if scores else losses.new_zeros(0, dtype=wide)


def membership_auc(member_scores: Tensor, nonmember_scores: Tensor) -> float:
    """Area under the ROC curve: the probability that a member scores higher than a non-member, ties counting half.

    In [0, 1]; 0.5: nothing tells them apart. NaN if one sample is empty or has a NaN. Exact for scores of any size;
    torchmetrics' ``binary_auroc`` puts them through a sigmoid first, where all below −745 are ties.
    """
    members, others = (scores.detach().flatten() for scores in (member_scores, nonmember_scores))
    if not (members.numel() and others.numel()) or members.isnan().any() or others.isnan().any():
        return math.nan
    others = others.to(torch.promote_types(members.dtype, others.dtype)).sort().values
    members = members.to(others)
    below, not_above = (torch.searchsorted(others, members, right=right).sum().item() for right in (False, True))
    return (below + not_above) / 2 / (members.numel() * others.numel())


def privleak(auc: float, reference_auc: float) -> float:
    """Privacy leakage: how far an unlearned model's AUC is from that of a model retrained without the forget set.

    ``100·[(1 − AUC) − (1 − AUC_ref)] / (1 − AUC_ref)`` percent, the AUC being :func:`membership_auc` of the forget set
    against a held-out set: 0 leaks nothing; below 0 the forget set still looks learned, above 0 it looks suspiciously
    unknown. To a reference of 1 nothing can be related.

    Source: Shi et al., MUSE, arXiv 2407.06460; with 1 − AUC as in open-unlearning.
    """
    if auc < 0 or auc > 1:
        raise UserError("auc", auc, "a fraction in [0, 1]")
    if not 0 <= reference_auc < 1:
        raise UserError("reference_auc", reference_auc, "a fraction in [0, 1)")
    return 100 * (reference_auc - auc) / (1 - reference_auc)


class MembershipAUC(KeptValues):
    """:func:`membership_auc` in percent; 50: members and others look alike, NaN: no members, or no others.

    Updated with ``[B]`` scores, higher for what looks like a member, and whether they are members, such as the forget
    set.

    Example:
        >>> auc = MembershipAUC()
        >>> auc.update(torch.tensor([3.0, 2.0]), member=True)
        >>> auc.update(torch.tensor([1.0, 2.0]), member=False)
        >>> auc.compute()
        tensor(87.5000, dtype=torch.float64)
    """

    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 100.0
    member_scores: list[Tensor]
    nonmember_scores: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("member_scores", "nonmember_scores", **kwargs)

    def update(self, scores: Tensor, member: bool) -> None:
        self._keep("member_scores" if member else "nonmember_scores", scores)

    def compute(self) -> Tensor:
        members = self._kept("member_scores")
        return members.new_tensor(100 * membership_auc(members, self._kept("nonmember_scores")))


class PrivLeak(MembershipAUC):
    """:func:`privleak` against a retrained model; updated as :class:`MembershipAUC` is.

    Args:
        reference_auc: ``MembershipAUC().compute()`` of the retrained model on the same sets, in percent, below 100.
        **kwargs: See :class:`torchmetrics.Metric`.

    Example:
        >>> leak = PrivLeak(reference_auc=50.0)
        >>> leak.update(torch.tensor([3.0, 2.0]), member=True)
        >>> leak.update(torch.tensor([1.0, 2.0]), member=False)
        >>> leak.compute()
        tensor(-75., dtype=torch.float64)
    """

    plot_lower_bound, plot_upper_bound = None, None

    def __init__(self, reference_auc: float | Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reference_auc = float(reference_auc)
        if not 0 <= self.reference_auc < 100:
            raise UserError("reference_auc", self.reference_auc, "a percentage in [0, 100)")

    def compute(self) -> Tensor:
        auc = super().compute()
        return auc.new_tensor(privleak(auc.item() / 100, self.reference_auc / 100))
