"""Extraction strength and exact memorisation: how much of an answer greedy decoding gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.evaluation.metrics.base import Percentage, sequence_means, widest_float
from lightning_ssiuu.models.answers import sequence_sums


class ExtractionStrength(Percentage):
    """Mean extraction strength ``1 − k/L``, in percent: k of an answer's L tokens suffice to be given the rest.

    Updated with ``[N]`` bool, whether the most probable token is the label, the ``[N]`` row of each token, ascending,
    and the number of rows; a row without tokens makes the result NaN.

    A prefix suffices when every later token is the most probable one after those before it, so k is the position of
    the last token that is not, and nothing has to be generated. 100: the question alone does; 0: the last token is
    wrong.

    Args:
        floor: Whether k is at most L − 1, as in open-unlearning: an answer whose last token is wrong has 1/L, not 0.
        **kwargs: See :class:`torchmetrics.Metric`.

    Source: Carlini et al., arXiv 2012.07805; as a score of unlearning Wang et al., arXiv 2406.09179.

    Example:
        >>> metric = ExtractionStrength()
        >>> metric.update(torch.tensor([True, False, True, True]), torch.tensor([0, 0, 0, 0]), 1)
        >>> metric.compute()
        tensor(50., dtype=torch.float64)
    """

    def __init__(self, floor: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.floor = floor

    def values(self, token_correct: Tensor, sequence_index: Tensor, n_sequences: int) -> Tensor:
        lengths = sequence_sums(torch.ones_like(sequence_index), sequence_index, n_sequences)
        starts = lengths.cumsum(0) - lengths
        position = torch.arange(1, len(sequence_index) + 1, device=starts.device) - starts[sequence_index]
        needed = torch.zeros_like(lengths).scatter_reduce(0, sequence_index, position * ~token_correct, "amax")
        if self.floor:
            needed = torch.minimum(needed, (lengths - 1).clamp(min=0))
        wide = widest_float(lengths.device)
        return (lengths - needed).to(wide) / lengths.to(wide)


class ExactMemorization(Percentage):
    """Mean share of an answer's tokens that greedy decoding under teacher forcing gives, in percent.

    Updated as :class:`ExtractionStrength` is.

    Source: Tirumala et al., arXiv 2205.10770.

    Example:
        >>> metric = ExactMemorization()
        >>> metric.update(torch.tensor([True, False, True, True]), torch.tensor([0, 0, 0, 0]), 1)
        >>> metric.compute()
        tensor(75., dtype=torch.float64)
    """

    def values(self, token_correct: Tensor, sequence_index: Tensor, n_sequences: int) -> Tensor:
        return sequence_means(token_correct, sequence_index, n_sequences)
