"""Fluency of generated text without another model: how evenly its n-grams are spread."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from lightning_ssiuu.evaluation.metrics.base import Percentage
from lightning_ssiuu.evaluation.metrics.rouge import words

_WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def ngram_entropy(text: str) -> float:
    """Weighted entropy of a text's bi- and trigrams of words, in bits: low where a text repeats itself.

    ``(2/3·H₂ + 4/3·H₃) / 2``, H the entropy of the distribution of n-grams; 0 for a text of fewer than three words and
    for one word over and over. Units are :func:`~lightning_ssiuu.evaluation.metrics.rouge.words`. A text of L different
    words has about log₂ L: compare texts of like length.

    Source: Zhang et al., arXiv 1809.05972; the weights as in Meng et al., arXiv 2202.05262.

    Example:
        >>> round(ngram_entropy("the cat sat on the mat"), 3), ngram_entropy("no no no no")
        (2.107, 0.0)
    """
    found = words(text)
    grams = {n: [*zip(*(found[start:] for start in range(n)), strict=False)] for n in _WEIGHTS}
    return sum(weight * _entropy(grams[n]) for n, weight in _WEIGHTS.items()) / 2


def _entropy(grams: Sequence[tuple[str, ...]]) -> float:
    shares = [count / len(grams) for count in Counter(grams).values()]
    return -sum(share * math.log2(share) for share in shares) + 0.0


class NgramEntropy(Percentage):
    """Mean of :func:`ngram_entropy` of generated texts, in bits, not percent.

    Example:
        >>> metric = NgramEntropy()
        >>> metric.update(["the cat sat on the mat", "no no no no"])
        >>> round(metric.compute().item(), 3)
        1.053
    """

    higher_is_better = True
    plot_upper_bound = None

    def values(self, texts: Sequence[str]) -> Tensor:
        return self.total.new_tensor([ngram_entropy(text) for text in texts])

    def compute(self) -> Tensor:
        return self.total / self.count
