"""Accuracy and probability of answers: per example as functions, over all as metrics in percent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ssiuu.evaluation.metrics.base import Percentage, WideMetric, first_of_each, sequence_means
from lightning_ssiuu.models.answers import sequence_sums
from lightning_ssiuu.utils.errors import check_choice

AccuracyKind = Literal["first_token", "all_tokens", "multiple_choice", "choice_likelihood", "choice_generation"]
TokenAccuracy = Literal["first_token", "all_tokens"]


def answer_accuracy(
    token_correct: Tensor, sequence_index: Tensor, n_sequences: int, kind: TokenAccuracy = "all_tokens"
) -> Tensor:
    """Whether each answer is what greedy decoding under teacher forcing gives, ``[B]`` bool.

    From ``[N]`` bool, whether the most probable token is the label, and the ``[N]`` row of each token, ascending. The
    first token of an answer decides, or all tokens do, EOS included; a row without tokens is wrong.
    """
    check_choice("kind", kind, TokenAccuracy)
    if kind == "first_token":
        first = first_of_each(sequence_index)
        token_correct, sequence_index = token_correct[first], sequence_index[first]
    right = sequence_sums(token_correct.long(), sequence_index, n_sequences)
    total = sequence_sums(torch.ones_like(token_correct, dtype=torch.long), sequence_index, n_sequences)
    return (right == total) & (total > 0)


def multiple_choice_accuracy(option_scores: Tensor, option_of: Tensor) -> Tensor:
    """Whether the first option of each row, the true answer, scores strictly higher than all its others, ``[B]`` bool.

    ``option_of`` ``[B*K]`` is the row of each option, ascending; K may differ between rows. A tie is wrong, and so is a
    NaN anywhere among the options.
    """
    _, rows, counts = option_of.unique_consecutive(return_inverse=True, return_counts=True)
    first = first_of_each(option_of)
    best_other = option_scores.new_full((len(counts),), -torch.inf)
    # amax carries a NaN on, and no comparison with NaN is true
    best_other = best_other.scatter_reduce(0, rows[~first], option_scores[~first], "amax")
    return option_scores[first] > best_other


def named_choice(text: str, options: Sequence[str]) -> int | None:
    """The place of the option that a text names first; None: none, or the first one named stands twice among them.

    Compared are whole words (runs of letters, digits and underscores) without case; punctuation does not count. Of
    options that begin at the same word the longest counts, so "Guinea-Bissau" is not taken for "Guinea". What the text
    says about an option is not understood: "not Paris" names Paris.
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
    """Whether each text names the first of its options, the true answer, before any other: ``[B]`` bool."""
    pairs = zip(texts, options, strict=True)
    return torch.tensor([named_choice(text, listed) == 0 for text, listed in pairs], dtype=torch.bool)


class AnswerAccuracy(Percentage):
    """Share of correct answers, in percent, from ``[B]`` bool; anything but booleans is a TypeError.

    Args:
        kind: What "correct" means: :func:`answer_accuracy` says it for ``"first_token"`` and ``"all_tokens"``,
            :func:`multiple_choice_accuracy` for ``"multiple_choice"`` and ``"choice_likelihood"``, and
            :func:`generated_choice_accuracy` for ``"choice_generation"``; else a :class:`UserError`.
        **kwargs: See :class:`torchmetrics.Metric`.

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

    def values(self, correct: Tensor) -> Tensor:
        if correct.dtype != torch.bool:
            raise TypeError(f"correct: expected a bool tensor [B], received {correct.dtype} {list(correct.shape)}")
        return correct


def answer_probability(token_logps: Tensor, sequence_index: Tensor, n_sequences: int) -> Tensor:
    """Probability of each answer, length-normalised as in TOFU (arXiv 2401.06121, §2.2.1): ``P(y|x)^(1/|y|)``.

    ``[B]`` values in [0, 1], float64, from ``[N]`` log-probabilities in nats. A row without tokens, or with a NaN among
    them, is NaN.
    """
    return sequence_means(token_logps, sequence_index, n_sequences).exp().clamp(max=1.0)


class AnswerProbability(Percentage):
    """Mean of :func:`answer_probability`, in percent, from ``[B]`` in [0, 1]; a NaN among them makes the result NaN.

    Example:
        >>> probability = AnswerProbability()
        >>> probability.update(torch.tensor([0.5, 0.25]))
        >>> probability.compute()
        tensor(37.5000, dtype=torch.float64)
    """

    def values(self, probabilities: Tensor) -> Tensor:
        return probabilities


class HighestProbability(WideMetric):
    """The highest :func:`answer_probability`, in percent, from ``[B]`` in [0, 1]; NaN of none, or if one is NaN.

    A mean can be low while one answer is still known.

    Example:
        >>> highest = HighestProbability()
        >>> highest.update(torch.tensor([0.5, 0.25]))
        >>> highest.update(torch.tensor([0.75]))
        >>> highest.compute()
        tensor(75., dtype=torch.float64)
    """

    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 100.0

    highest: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Of no answers: below all, so that a rank without any leaves the others' maximum
        self.add_state("highest", torch.tensor(-1.0, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, probabilities: Tensor) -> None:
        self.highest = torch.cat([self.highest[None], probabilities.detach().to(self.highest)]).amax()  # keeps a NaN

    def compute(self) -> Tensor:
        return torch.where(self.highest >= 0, 100 * self.highest, torch.nan)
