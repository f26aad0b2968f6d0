"""Scores by name: a metric to accumulate in, and what to update it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from lightning_ssiuu.evaluation.metrics import (
    AnswerAccuracy,
    AnswerProbability,
    ExactMemorization,
    ExtractionStrength,
    LongestCommonRun,
    MemorizedShare,
    RougeL,
    TruthRatio,
)
from lightning_ssiuu.evaluation.metrics.answers import (
    TokenAccuracy,
    answer_accuracy,
    answer_probability,
    generated_choice_accuracy,
    multiple_choice_accuracy,
)
from lightning_ssiuu.evaluation.metrics.rouge import ROUGE, check_stemmer
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.registry import resolve


@dataclass(frozen=True)
class Score:
    """How to get one score: a metric to accumulate in, and what to update it with.

    Args:
        metric: Makes the torchmetrics metric; its ``compute()`` is in percent.
        measure: From an evaluated part to the arguments of ``metric.update``.
        needs: Key a part must have.
        default: Whether it is taken where no scores are named and parts have what it needs.
        generates: Whether it generates text: slow, so only taken where it is named.
    """

    metric: Callable[[], Metric]
    measure: Callable[[Predictions], tuple[Any, ...]]
    needs: str | None = None
    default: bool = True
    generates: bool = False


def _token_correct(e: Predictions) -> tuple[Tensor, Tensor, int]:
    return e.answers.token_correct, e.answers.sequence_index, e.answers.n_sequences


def _accuracy(kind: TokenAccuracy) -> Score:
    return Score(partial(AnswerAccuracy, kind), lambda e: (answer_accuracy(*_token_correct(e), kind),))


def _options(e: Predictions) -> tuple[Tensor, Tensor, int]:
    return e.option_scores, e.option_of, len(e.part["input_ids"])


def _tokens(e: Predictions) -> tuple[list[list[int]], list[list[int]]]:
    return e.generated_tokens, e.reference_tokens


class _Scores(dict[str, Score]):
    """Scores by name; those named by an import path are found where it leads, and not listed."""

    def __missing__(self, name: str) -> Score:
        return find_score(name)


SCORES: dict[str, Score] = _Scores(
    {
        "multiple_choice": Score(
            partial(AnswerAccuracy, "multiple_choice"),
            lambda e: (multiple_choice_accuracy(e.option_scores, e.option_of),),
            needs="options",
        ),
        "choice_likelihood": Score(
            partial(AnswerAccuracy, "choice_likelihood"),
            lambda e: (multiple_choice_accuracy(e.choice_scores, e.choice_of),),
            needs="choices",
        ),
        "choice_generation": Score(
            partial(AnswerAccuracy, "choice_generation"),
            lambda e: (generated_choice_accuracy(e.choice_generations, e.choice_options),),
            needs="choices",
            generates=True,
        ),
        "first_token": _accuracy("first_token"),
        "all_tokens": _accuracy("all_tokens"),
        "probability": Score(
            AnswerProbability,
            lambda e: (answer_probability(e.answers.token_logps, e.answers.sequence_index, e.answers.n_sequences),),
        ),
        **{
            name: Score(partial(RougeL, name), lambda e: (e.generations, e.references), generates=True)
            for name in ROUGE
        },
        "longest_common_run": Score(LongestCommonRun, _tokens, generates=True),
        "memorized_share": Score(MemorizedShare, _tokens, generates=True),
        "extraction_strength": Score(ExtractionStrength, _token_correct, default=False),
        "exact_memorization": Score(ExactMemorization, _token_correct, default=False),
        "truth_ratio_forget": Score(partial(TruthRatio, "forget"), _options, needs="options", default=False),
        "truth_ratio_retain": Score(partial(TruthRatio, "retain"), _options, needs="options", default=False),
    }
)


def register_score(name: str, score: Score) -> None:
    """Make a score of your own available under a name of its own, and as a default one (``score.default``).

    A name is known once the module that registers it has been imported; an import path needs no registration.

    Example:
        >>> from torchmetrics import MeanMetric
        >>> register_score("perplexity", Score(MeanMetric, lambda e: ((-e.answers.mean_logps).exp(),)))
        >>> check_score("perplexity")
        >>> del SCORES["perplexity"]
    """
    SCORES[name] = score


def find_score(name: str, argument: str = "scores") -> Score:
    """The score of a name, or the one at an import path such as ``my_scores.perplexity``."""
    score: object = resolve(name, SCORES, argument)
    check_stemmer(name, argument)
    if not isinstance(score, Score):
        raise UserError(argument, name, f"the import path of a Score, not of a {type(score).__name__}")
    return score


def check_score(name: str, argument: str = "scores") -> None:
    """Raise :class:`UserError` unless ``name`` is a known score, or the import path of one."""
    find_score(name, argument)
