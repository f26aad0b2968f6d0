"""How benchmarks compare generated texts with true ones, each as its published code does."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_ssiuu.evaluation.metrics.base import Percentage
from lightning_ssiuu.evaluation.metrics.rouge import rouge
from lightning_ssiuu.evaluation.scores import Score

#: A text and the true one, to a fraction.
Compare = Callable[[str, str], float]

_STOPS = ("\n\n", "\nQuestion", "Question:")


class TextScore(Percentage):
    """Mean of a comparison of generated with true texts, in percent; keeps sums only, never text.

    Args:
        compare: From a text and the true one to a fraction.
        **kwargs: See :class:`torchmetrics.Metric`.

    Example:
        >>> score = TextScore(exact_match)
        >>> score.update(["Madera ", "no"], ["madera", "yes"])
        >>> score.compute()
        tensor(50., dtype=torch.float64)
    """

    def __init__(self, compare: Compare, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.compare = compare

    def values(self, predictions: Sequence[str], references: Sequence[str]) -> Tensor:
        return self.total.new_tensor([self.compare(*pair) for pair in zip(predictions, references, strict=True)])


def exact_match(text: str, true: str) -> float:
    """Whether two texts are the same but for case and white space at their ends (LUME, arXiv 2502.15097)."""
    return float(text.strip().lower() == true.strip().lower())


def rouge_l(figure: Literal["recall", "fmeasure"], stemmed: bool, stops: Sequence[str] = ()) -> Compare:
    r"""ROUGE-L over words of ``a–z0–9``, as the package ``rouge_score`` has it.

    Args:
        figure: ``"fmeasure"`` or ``"recall"``.
        stemmed: Whether words are stemmed.
        stops: The generated text ends before the first of these that is in it, one after the other.

    Example:
        >>> rouge_l("fmeasure", False, ["\n\n"])("the cat sat\n\nQuestion", "the cat")
        0.8
    """

    def compare(text: str, true: str) -> float:
        for stop in stops:
            text = text.split(stop)[0]
        return rouge(text, true, figure, "stems" if stemmed else "plain")

    return compare


def word_recall(text: str, true: str) -> float:
    r"""ROUGE-L recall as the package ``rouge`` has it, which RWKU uses (arXiv 2406.10890): of a generated first line.

    Of each sentence of the true text (they end at full stops) and each of the other, the words of a longest common
    subsequence; all such words, each once, over the different words of the true text. Words are what white space
    divides, case and punctuation count. No text counts as ``NOANSWER``.

    Example:
        >>> word_recall("the old mill\nby the river", "the mill of the river")
        0.5
    """
    said = re.split(r"\n", text, maxsplit=1)[0].strip() or "NOANSWER"
    sentences, wanted = ([s.split() for s in each.split(".") if s.split()] for each in (said, true))
    words = {word for sentence in wanted for word in sentence}
    common = {word for one in wanted for other in sentences for word in _common(one, other)}
    return len(common) / len(words) if words else 0.0


def _common(left: Sequence[str], right: Sequence[str]) -> list[str]:
    # A longest common subsequence: of several, the one that is found from the end, the right sequence's words first.
    lengths = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, one in enumerate(left, 1):
        for j, other in enumerate(right, 1):
            lengths[i][j] = lengths[i - 1][j - 1] + 1 if one == other else max(lengths[i - 1][j], lengths[i][j - 1])
    found, i, j = [], len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            found.append(left[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _score(compare: Compare, new_tokens: int) -> Score:
    return Score(lambda: TextScore(compare), lambda e: (e.said(new_tokens), e.references), generates=True)


#: Scores by the names under which suites have them (import paths).
MUSE_VERBMEM = _score(rouge_l("fmeasure", False), 128)
MUSE_VERBMEM_STEMMED = _score(rouge_l("fmeasure", True), 128)
MUSE_KNOWMEM = _score(rouge_l("fmeasure", False, _STOPS), 32)
MUSE_KNOWMEM_STEMMED = _score(rouge_l("fmeasure", True, _STOPS), 32)
RWKU_RECALL = _score(word_recall, 30)
LUME_REGURGITATION = _score(rouge_l("recall", True), 256)
LUME_KNOWLEDGE = _score(exact_match, 256)
