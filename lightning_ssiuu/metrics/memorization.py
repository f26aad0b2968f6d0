"""Extraction strength and exact memorisation over :mod:`lightning_ssiuu.functional.memorization`."""

from __future__ import annotations

from torch import Tensor

from lightning_ssiuu.functional.memorization import exact_memorization, extraction_strength
from lightning_ssiuu.metrics.base import Percentage


class ExtractionStrength(Percentage):
    """Mean of :func:`lightning_ssiuu.functional.memorization.extraction_strength`, in percent.

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
    """Mean of :func:`lightning_ssiuu.functional.memorization.exact_memorization`, in percent.

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
