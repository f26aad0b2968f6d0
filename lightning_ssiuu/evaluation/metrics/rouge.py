"""ROUGE-L of generated answers: recall and F-measure in any script, and stemmed English forms, as for TOFU."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal

from torch import Tensor

from lightning_ssiuu.evaluation.metrics.base import Percentage
from lightning_ssiuu.utils.errors import UserError

#: What is compared; see :func:`rouge`.
Units = Literal["words", "plain", "stems"]
#: Beginnings of the Unicode names of characters of scripts that put no spaces between words.
_UNSPACED = (
    "CJK ",
    "IDEOGRAPHIC ",
    "HIRAGANA ",
    "KATAKANA",
    "THAI ",
    "LAO ",
    "KHMER ",
    "MYANMAR ",
    "JAVANESE ",
    "TAI ",
)


def words(text: str) -> list[str]:
    """The units ROUGE compares: runs of letters and digits in any script, without case.

    Of scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a unit.
    Marks belong to the letter before them; compatible forms of a character (NFKC) are one.

    Example:
        >>> words("It's 1912, Müller-Straße 5")
        ['it', 's', '1912', 'müller', 'strasse', '5']
        >>> words("東京 is हिन्दी")
        ['東', '京', 'is', 'हिन्दी']
    """
    if text.isascii():
        return re.findall(r"[a-z0-9]+", text.lower())
    units: list[str] = []
    inside, alone = False, False  # whether the last character was of a unit, and of one that takes no second letter
    for character in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(character)
        if kind[0] in "LN":
            before, alone = alone, unicodedata.name(character, "").startswith(_UNSPACED)
            if inside and not before and not alone:
                units[-1] += character
            else:
                units.append(character)
            inside = True
        elif kind[0] == "M" and inside:
            units[-1] += character
        elif kind != "Cf":  # joiners stand within words
            inside = False
    return units


def rouge_l_recall(prediction: str, reference: str) -> float:
    """ROUGE-L recall, in [0, 1]: share of the reference's words in its longest common subsequence with the prediction.

    :func:`words` are compared, without stemming; a text without any scores 0. Lin (2004), "ROUGE: A Package for
    Automatic Evaluation of Summaries".
    """
    return rouge(prediction, reference, "recall", "words")


def rouge_l_f1(prediction: str, reference: str) -> float:
    """The F-measure beside :func:`rouge_l_recall`: it falls, too, where the prediction says more than the reference.

    Example:
        >>> rouge_l_f1("the cat sat on a mat", "the cat sat")
        0.6666666666666666
    """
    return rouge(prediction, reference, "fmeasure", "words")


def rouge_l_recall_stemmed(prediction: str, reference: str) -> float:
    """ROUGE-L recall of English texts, in [0, 1], as TOFU (arXiv 2401.06121) has it.

    As the package ``rouge_score`` with ``use_stemmer=True``: words are runs of ``a–z0–9`` after lowercasing, those of
    more than three letters stemmed (Porter, with NLTK's changes).
    """
    return rouge(prediction, reference, "recall", "stems")


def rouge_l_f1_stemmed(prediction: str, reference: str) -> float:
    """The F-measure beside :func:`rouge_l_recall_stemmed`, as open-unlearning (arXiv 2506.12618) takes it for MUSE."""
    return rouge(prediction, reference, "fmeasure", "stems")


#: By name of the score.
ROUGE: dict[str, Callable[[str, str], float]] = {
    "rouge_l": rouge_l_recall,
    "rouge_l_f1": rouge_l_f1,
    "rouge_l_recall_stemmed": rouge_l_recall_stemmed,
    "rouge_l_f1_stemmed": rouge_l_f1_stemmed,
}


def rouge(prediction: str, reference: str, figure: Literal["recall", "fmeasure"], units: Units) -> float:
    """One figure of ROUGE-L, in [0, 1], by the package ``rouge_score``.

    ``units``: ``"words"`` are those of :func:`words`; ``"plain"`` and ``"stems"`` the package's own without and with
    its stemmer, runs of ``a–z0–9`` after lowercasing.
    """
    return float(getattr(_scorer(units).score(reference, prediction)["rougeL"], figure))


@cache
def _scorer(units: Units) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # with it comes nltk: a second
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = SimpleNamespace(tokenize=words) if units == "words" else DefaultTokenizer(units == "stems")
    return RougeScorer(["rougeL"], tokenizer=tokenizer)


class RougeL(Percentage):
    """Mean ROUGE-L of generated answers against the true ones, in percent; keeps sums only, never text.

    Args:
        score: ``"rouge_l"``, :func:`rouge_l_recall`, or ``"rouge_l_f1"``, in any script; for English alone
            ``"rouge_l_recall_stemmed"`` or ``"rouge_l_f1_stemmed"``.
        **kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        UserError: If the score is unknown.

    Example:
        >>> rouge = RougeL()
        >>> rouge.update(["the cat", "a dog"], ["the cat", "the dog"])
        >>> rouge.compute()
        tensor(75., dtype=torch.float64)
    """

    def __init__(self, score: str = "rouge_l", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if score not in ROUGE:
            raise UserError("score", score, f"one of {list(ROUGE)}")
        self.score = score

    def values(self, predictions: Sequence[str], references: Sequence[str]) -> Tensor:
        if isinstance(predictions, str) or isinstance(references, str) or len(predictions) != len(references):
            given = " and ".join(f"{type(texts).__name__} of {len(texts)}" for texts in (predictions, references))
            raise ValueError(f"predictions, references: expected two lists of the same length, received {given}")
        pairs = zip(predictions, references, strict=True)
        return self.total.new_tensor([ROUGE[self.score](*pair) for pair in pairs])
