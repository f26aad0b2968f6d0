"""Accuracy, probability and ROUGE-L recall of answers: per example as functions, over all as metrics in percent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.functional.text import rouge_score

from lightning_ssiuu.datamodules.encoding import derangement
from lightning_ssiuu.evaluation.metrics.base import Percentage, first_of_each, widest_float
from lightning_ssiuu.models.answers import sequence_sums
from lightning_ssiuu.utils.errors import UserError, check_choice

AccuracyKind = Literal["first_token", "all_tokens", "multiple_choice", "choice_likelihood", "choice_generation"]
TokenAccuracy = Literal["first_token", "all_tokens"]


def answer_accuracy(
    token_correct: Tensor, sequence_index: Tensor, n_sequences: int, kind: TokenAccuracy = "all_tokens"
) -> Tensor:
    """Whether each answer is what greedy decoding under teacher forcing gives.

    Args:
        token_correct: ``[N]`` bool, the most probable token is the label.
        sequence_index: ``[N]`` row of each token, ascending.
        n_sequences: B.
        kind: ``"first_token"``: the answer's first token decides; ``"all_tokens"``: every one, EOS included.

    Returns:
        ``[B]`` bool; False for a row without tokens.

    Raises:
        UserError: Unknown ``kind``.

    Example:
        >>> correct, rows = torch.tensor([True, False, True]), torch.tensor([0, 0, 1])
        >>> answer_accuracy(correct, rows, 2, "first_token"), answer_accuracy(correct, rows, 2, "all_tokens")
        (tensor([True, True]), tensor([False,  True]))
    """
    check_choice("kind", kind, TokenAccuracy)
    if kind == "first_token":
        first = first_of_each(sequence_index)
        token_correct, sequence_index = token_correct[first], sequence_index[first]
    right = sequence_sums(token_correct.long(), sequence_index, n_sequences)
    total = sequence_sums(torch.ones_like(token_correct, dtype=torch.long), sequence_index, n_sequences)
    return (right == total) & (total > 0)


def multiple_choice_accuracy(option_scores: Tensor, option_of: Tensor) -> Tensor:
    """Whether the first option of each example, the true answer, scores strictly higher than all its others.

    Args:
        option_scores: ``[B*K]`` score of each option, higher is better; K may differ between examples.
        option_of: ``[B*K]`` row each option belongs to, ascending; the options of a row lie next to each other.

    Returns:
        ``[B]`` bool. A tie is wrong, and so is a NaN anywhere among the options.

    Example:
        >>> scores = torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.0, -3.0])
        >>> multiple_choice_accuracy(scores, torch.tensor([0, 0, 0, 1, 1, 1]))
        tensor([ True, False])
    """
    _, rows, counts = option_of.unique_consecutive(return_inverse=True, return_counts=True)
    first = torch.zeros_like(option_of, dtype=torch.bool)
    first[counts.cumsum(0) - counts] = True
    best_other = option_scores.new_full((len(counts),), -torch.inf)
    # amax carries a NaN on, and no comparison with NaN is true
    best_other = best_other.scatter_reduce(0, rows[~first], option_scores[~first], "amax")
    return option_scores[first] > best_other


def named_choice(text: str, options: Sequence[str]) -> int | None:
    """Which option a generated text names first.

    Compared are whole words (runs of letters, digits and underscores) without case; punctuation does not count. Of
    options that begin at the same word the longest counts, so "Guinea-Bissau" is not taken for "Guinea".

    Args:
        text: A model's output. What it says about an option is not understood: "not Paris" names Paris.
        options: The options.

    Returns:
        The option's place, or None: no option is named, or the first one named stands twice among them.

    Example:
        >>> options = ["Guinea", "Guinea-Bissau", "Mali"]
        >>> named_choice("Guinea-Bissau.", options), named_choice("It is MALI, not Guinea", options)
        (1, 2)
        >>> named_choice("Niger", options) is None
        True
    """
    words = _words(text)
    best, place = None, None
    for number, option in enumerate(options):
        wanted = _words(option)
        starts = range(len(words) - len(wanted) + 1) if wanted else ()
        start = next((s for s in starts if words[s : s + len(wanted)] == wanted), None)
        if start is None:
            continue
        rank = (start, -len(wanted))
        if best is None or rank < best:
            best, place = rank, number
        elif rank == best:
            place = None
    return place


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def generated_choice_accuracy(texts: Sequence[str], options: Sequence[Sequence[str]]) -> Tensor:
    """Whether each generated text names the first of its options, the true answer, before any other.

    Args:
        texts: B generated texts.
        options: The options of each, the true answer first.

    Returns:
        ``[B]`` bool; a text that names none is wrong (:func:`named_choice`).

    Raises:
        ValueError: Different numbers of texts and lists of options.

    Example:
        >>> generated_choice_accuracy(["Mali.", "no idea"], [["Mali", "Niger"], ["Mali", "Niger"]])
        tensor([ True, False])
    """
    pairs = zip(texts, options, strict=True)
    return torch.tensor([named_choice(text, listed) == 0 for text, listed in pairs], dtype=torch.bool)


class AnswerAccuracy(Percentage):
    """Share of correct answers, in percent.

    Args:
        kind: What "correct" means: :func:`answer_accuracy` says it for ``"first_token"`` and ``"all_tokens"``,
            :func:`multiple_choice_accuracy` for ``"multiple_choice"`` and ``"choice_likelihood"``, and
            :func:`generated_choice_accuracy` for ``"choice_generation"``.
        **kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        UserError: Unknown ``kind``.

    Example:
        >>> accuracy = AnswerAccuracy("multiple_choice")
        >>> accuracy.update(torch.tensor([True, False]))
        >>> accuracy.update(torch.tensor([True]))
        >>> accuracy.compute()
        tensor(66.6667, dtype=torch.float64)
    """

    def __init__(self, kind: AccuracyKind = "all_tokens", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("kind", kind, AccuracyKind)
        self.kind = kind

    def update(self, correct: Tensor) -> None:
        """Add examples.

        Args:
            correct: ``[B]`` bool.

        Raises:
            TypeError: Anything but booleans, such as scores or token ids.
        """
        if correct.dtype != torch.bool:
            raise TypeError(f"correct: expected a bool tensor [B], received {correct.dtype} {list(correct.shape)}")
        self._add(correct)


def answer_probability(token_logps: Tensor, sequence_index: Tensor, n_sequences: int, normalise: bool = True) -> Tensor:
    """Probability of each answer, length-normalised as in TOFU (arXiv 2401.06121, §2.2.1): ``P(y|x)^(1/|y|)``.

    Args:
        token_logps: ``[N]`` log-probability of each answer token, in nats, any float type.
        sequence_index: ``[N]`` row of each token, ascending.
        n_sequences: B.
        normalise: False: the plain product over the tokens, ``P(y|x)``.

    Returns:
        ``[B]`` values in [0, 1], float64. A row without tokens, or with a NaN among them, is NaN.

    Example:
        >>> logps = torch.tensor([0.5, 0.5, 0.1]).log()
        >>> answer_probability(logps, torch.tensor([0, 0, 1]), 2)
        tensor([0.5000, 0.1000], dtype=torch.float64)
        >>> answer_probability(logps, torch.tensor([0, 0, 1]), 2, normalise=False)
        tensor([0.2500, 0.1000], dtype=torch.float64)
    """
    wide = token_logps.to(widest_float(token_logps.device))
    sums = sequence_sums(wide, sequence_index, n_sequences)
    counts = sequence_sums(torch.ones_like(wide), sequence_index, n_sequences)
    exponent = sums / counts if normalise else sums.masked_fill(counts == 0, torch.nan)
    return exponent.exp().clamp(max=1.0)


class AnswerProbability(Percentage):
    """Mean of :func:`answer_probability`, in percent. A NaN among the values makes the result NaN.

    Example:
        >>> probability = AnswerProbability()
        >>> probability.update(torch.tensor([0.5, 0.25]))
        >>> probability.compute()
        tensor(37.5000, dtype=torch.float64)
    """

    def update(self, probabilities: Tensor) -> None:
        """Add examples.

        Args:
            probabilities: ``[B]`` in [0, 1], any float type.
        """
        self._add(probabilities)


def rouge_l_recall(prediction: str, reference: str) -> float:
    """ROUGE-L recall: the share of the reference's words in its longest common subsequence with the prediction.

    Words are runs of ``a–z0–9`` after lowercasing, without stemming; a text without any (empty, or in another
    alphabet) scores 0. Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries".

    Returns:
        A fraction in [0, 1].

    Example:
        >>> round(rouge_l_recall("the cat lay on the mat", "The cat sat on the mat."), 4)
        0.8333
        >>> rouge_l_recall("", "The cat")
        0.0
    """
    return float(rouge_score(prediction, reference, use_stemmer=False, rouge_keys="rougeL")["rougeL_recall"])


def mismatched_rouge_l(answers: Sequence[str], seed: int = 0) -> float:
    """Mean ROUGE-L recall of answers paired with another question's answer: what an ignorant model scores.

    The threshold at which unlearning stops on TOFU (arXiv 2509.22263; there 19.71). Each answer is scored against
    another one, never its own (:func:`~lightning_ssiuu.datamodules.encoding.derangement`).

    Args:
        answers: The true answers.
        seed: Seeds the pairing.

    Returns:
        Percent.

    Raises:
        UserError: Fewer than two answers.

    Example:
        >>> round(mismatched_rouge_l(["in the north", "in the south"]), 2)  # two of three words agree
        66.67
    """
    if len(answers) < 2:
        raise UserError("answers", len(answers), "at least 2")
    pairs = zip(answers, derangement(len(answers), seed), strict=True)
    scores = [rouge_l_recall(answers[other], own) for own, other in pairs]
    return 100 * sum(scores) / len(scores)


class RougeLRecall(Percentage):
    """Mean :func:`rouge_l_recall` of generated answers, in percent; keeps sums only, never text.

    Example:
        >>> rouge = RougeLRecall()
        >>> rouge.update(["the cat", "a dog"], ["the cat", "the dog"])
        >>> rouge.compute()
        tensor(75., dtype=torch.float64)
    """

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        """Add examples.

        Args:
            predictions: B generated texts.
            references: B true answers.

        Raises:
            ValueError: Different numbers of predictions and references.
        """
        if isinstance(predictions, str) or isinstance(references, str) or len(predictions) != len(references):
            given = " and ".join(f"{type(texts).__name__} of {len(texts)}" for texts in (predictions, references))
            raise ValueError(f"predictions, references: expected two lists of the same length, received {given}")
        pairs = zip(predictions, references, strict=True)
        self._add(self.total.new_tensor([rouge_l_recall(prediction, reference) for prediction, reference in pairs]))
