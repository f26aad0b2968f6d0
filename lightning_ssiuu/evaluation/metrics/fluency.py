"""Fluency of generated text: how evenly its n-grams are spread, and what a classifier says of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.evaluation.metrics.base import Percentage
from lightning_ssiuu.evaluation.metrics.rouge import words
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.reading import reading

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
        1.054
    """

    higher_is_better = True
    plot_upper_bound = None

    def values(self, texts: Sequence[str]) -> Tensor:
        return self.total.new_tensor([ngram_entropy(text) for text in texts])

    def compute(self) -> Tensor:
        return self.total / self.count


@lru_cache(maxsize=1)
def classifier_of(name: str) -> tuple[Any, Any]:
    """Tokenizer and model of a sequence classifier of transformers, a directory or hub id; the latest is kept.

    Raises:
        UserError: If it cannot be loaded; about ``classifier``.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with reading("classifier", name, "a classifier of transformers, as a directory or on the hub"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        return tokenizer, AutoModelForSequenceClassification.from_pretrained(name).eval()


class ClassProbability(Percentage):
    """Mean probability that a classifier gives texts of being of one class, in percent.

    Args:
        classifier: A sequence classification model of transformers: directory or hub id; loaded when first asked.
        class_id: The class.
        max_length: Tokens of a text that the classifier reads, at most.
        **kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        UserError: If it cannot be loaded or has no such class, when texts are first added.

    Example:
        >>> ClassProbability("owner/detector", class_id=0).classifier
        'owner/detector'
    """

    def __init__(self, classifier: str, class_id: int = 0, max_length: int = 512, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classifier, self.class_id, self.max_length = classifier, class_id, max_length

    def check(self) -> None:
        """Raise a UserError unless the classifier can be loaded and has the class."""
        if self.class_id >= (n := classifier_of(self.classifier)[1].config.num_labels):
            raise UserError("class_id", self.class_id, f"0 to {n - 1}, the classes of {self.classifier}")

    @torch.no_grad()
    def values(self, texts: Sequence[str]) -> Tensor:
        self.check()
        tokenizer, model = classifier_of(self.classifier)
        model = model.to(self.device)
        options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": self.max_length}
        logits = model(**tokenizer(list(texts), **options).to(self.device)).logits
        return logits.double().softmax(-1)[:, self.class_id]
