"""Extraction strength and exact memorisation over :mod:`lightning_ssiuu.functional.memorization`."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ssiuu.evaluation.metrics.base import Percentage, sequence_means, widest_float
from lightning_ssiuu.models.answers import sequence_sums


class ExtractionStrength(Percentage):
    """Mean of :func:`lightning_ssiuu.evaluation.metrics.memorization.extraction_strength`, in percent.

    Example:
        >>> import torch
        >>> metric = ExtractionStrength()
        >>> metric.update(torch.tensor([True, False, True, True]), torch.tensor([0, 0, 0, 0]), 1)
        >>> metric.compute()
        tensor(50., dtype=torch.float64)
    """

    def update(self, token_correct: Tensor, sequence_index: Tensor, n_sequences: int) -> None:
        """Add examples.

        Args:
            token_correct: ``[N]`` bool, the most probable token is the label.
            sequence_index: ``[N]`` row of each token, ascending.
            n_sequences: B; a row without tokens makes the result NaN.
        """
        self._add(extraction_strength(token_correct, sequence_index, n_sequences))


class ExactMemorization(Percentage):
    """Mean of :func:`lightning_ssiuu.evaluation.metrics.memorization.exact_memorization`, in percent.

    Example:
        >>> import torch
        >>> metric = ExactMemorization()
        >>> metric.update(torch.tensor([True, False, True, True]), torch.tensor([0, 0, 0, 0]), 1)
        >>> metric.compute()
        tensor(75., dtype=torch.float64)
    """

    def update(self, token_correct: Tensor, sequence_index: Tensor, n_sequences: int) -> None:
        """Add examples; arguments as for :meth:`ExtractionStrength.update`."""
        self._add(exact_memorization(token_correct, sequence_index, n_sequences))


def extraction_strength(token_correct: Tensor, sequence_index: Tensor, n_sequences: int) -> Tensor:
    """Extraction strength ``1 − k/L``: k is how many of its L tokens suffice for greedy decoding to give the rest.

    A prefix suffices when every later token is the most probable one after those before it, so k is the position of
    the last token that is not, and nothing has to be generated. 1: the question alone does; 0: the last token is wrong.

    Args:
        token_correct: ``[N]`` bool, the most probable token is the label.
        sequence_index: ``[N]`` row of each token, ascending.
        n_sequences: B.

    Returns:
        ``[B]`` values in [0, 1], float64; NaN for a row without tokens.

    Source: Carlini et al., arXiv 2012.07805; as a score of unlearning Wang et al., arXiv 2406.09179.

    Example:
        >>> correct = torch.tensor([True, False, True, True, False, True])
        >>> extraction_strength(correct, torch.tensor([0, 0, 0, 0, 1, 1]), 2)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    lengths = sequence_sums(torch.ones_like(sequence_index), sequence_index, n_sequences)
    starts = lengths.cumsum(0) - lengths
    position = torch.arange(1, len(sequence_index) + 1, device=starts.device) - starts[sequence_index]
    needed = torch.zeros_like(lengths).scatter_reduce(0, sequence_index, position * ~token_correct, "amax")
    wide = widest_float(lengths.device)
    return (lengths - needed).to(wide) / lengths.to(wide)


def exact_memorization(token_correct: Tensor, sequence_index: Tensor, n_sequences: int) -> Tensor:
    """Exact memorisation: the share of an answer's tokens that greedy decoding under teacher forcing gives.

    Args:
        token_correct: ``[N]`` bool, the most probable token is the label.
        sequence_index: ``[N]`` row of each token, ascending.
        n_sequences: B.

    Returns:
        ``[B]`` values in [0, 1], float64; NaN for a row without tokens.

    Source: Tirumala et al., arXiv 2205.10770.

    Example:
        >>> correct = torch.tensor([True, False, True, True, False, True])
        >>> exact_memorization(correct, torch.tensor([0, 0, 0, 0, 1, 1]), 2)
        tensor([0.7500, 0.5000], dtype=torch.float64)
    """
    return sequence_means(token_correct, sequence_index, n_sequences)
