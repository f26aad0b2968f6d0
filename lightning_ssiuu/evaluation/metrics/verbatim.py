"""Verbatim reproduction: how long a run of a text's tokens a model gives back when it goes on from a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from torch import Tensor

from lightning_ssiuu.evaluation.metrics.base import Percentage
from lightning_ssiuu.utils.errors import check_at_least

#: Tokens in a row that count as memorised (Carlini et al., arXiv 2202.07646).
RUN = 50

Tokens = Sequence[int]


def longest_common_run(generated: Tokens, reference: Tokens) -> int:
    """Number of tokens of the longest stretch that stands in both, without a gap.

    Example:
        >>> longest_common_run([7, 1, 2, 3, 9], [1, 2, 3, 4])
        3
    """
    return SequenceMatcher(None, generated, reference, autojunk=False).find_longest_match().size


class LongestCommonRun(Percentage):
    """Mean length of the longest run of tokens that generated and true text share, in percent of the true text's.

    Updated with the token ids of the generated and of the true texts; :func:`longest_common_run` gives tokens. 100: the
    whole text stands in what was generated. A true text without tokens makes the result NaN.

    Example:
        >>> metric = LongestCommonRun()
        >>> metric.update([[7, 1, 2, 3, 9], [5]], [[1, 2, 3, 4], [6, 5]])
        >>> metric.compute()
        tensor(62.5000, dtype=torch.float64)
    """

    def values(self, generated: Sequence[Tokens], references: Sequence[Tokens]) -> Tensor:
        return self.total.new_tensor([share for _, share in _runs(generated, references)])


class MemorizedShare(Percentage):
    """Share of texts that are given back verbatim, in percent: a run of ``least`` tokens, or a shorter text in full.

    Updated as :class:`LongestCommonRun` is. The share that is given back whole, whatever its length, is the score
    ``all_tokens``, which needs no generation.

    Args:
        least: Tokens in a row, ≥ 1; the default is that of Carlini et al., arXiv 2202.07646.
        **kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        UserError: If ``least`` is below 1.

    Example:
        >>> metric = MemorizedShare(least=3)
        >>> metric.update([[7, 1, 2, 3, 9], [5]], [[1, 2, 3, 4], [6, 5]])
        >>> metric.compute()
        tensor(50., dtype=torch.float64)
    """

    def __init__(self, least: int = RUN, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_at_least("least", least, 1)
        self.least = least

    def values(self, generated: Sequence[Tokens], references: Sequence[Tokens]) -> Tensor:
        runs = _runs(generated, references)
        return self.total.new_tensor([run >= self.least or share >= 1 for run, share in runs])


def _runs(generated: Sequence[Tokens], references: Sequence[Tokens]) -> list[tuple[int, float]]:
    # Of every pair the longest run: its tokens, and its share of the true text.
    runs = [longest_common_run(*pair) for pair in zip(generated, references, strict=True)]
    lengths = map(len, references)
    return [(run, run / length if length else float("nan")) for run, length in zip(runs, lengths, strict=True)]
