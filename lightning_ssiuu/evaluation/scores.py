"""Scores by name: a metric to accumulate in, and what to update it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torchmetrics import Metric

from lightning_ssiuu.evaluation.metrics import (
    AnswerAccuracy,
    AnswerProbability,
    ClassProbability,
    ExactMemorization,
    ExtractionStrength,
    HighestProbability,
    LongestCommonRun,
    MemorizedShare,
    NgramEntropy,
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
from lightning_ssiuu.evaluation.metrics.base import Percentage
from lightning_ssiuu.evaluation.metrics.truth_ratio import TruthRatioKind
from lightning_ssiuu.evaluation.metrics.verbatim import RUN
from lightning_ssiuu.evaluation.options import made_with, split_options
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.utils.errors import UserError, check_at_least
from lightning_ssiuu.utils.registry import resolve

#: The classifier that open-unlearning asks whether a text is clean (class 0) or gibberish.
GIBBERISH = "madhurjindal/autonlp-Gibberish-Detector-492513457"


@dataclass(frozen=True)
class Score:
    """How to get one score: a metric to accumulate in, and what to update it with.

    Args:
        metric: Makes the torchmetrics metric; its ``compute()`` is in percent.
        measure: From an evaluated part to the arguments of ``metric.update``.
        needs: Key a part must have.
        default: Whether it is taken where no scores are named and parts have what it needs.
        generates: Whether it generates text: slow, so only taken where it is named.
        options: Makes the score with other options, which are its keyword arguments: ``probability(eos=false)``.
    """

    metric: Callable[[], Metric]
    measure: Callable[[Predictions], tuple[Any, ...]]
    needs: str | None = None
    default: bool = True
    generates: bool = False
    options: Callable[..., Score] | None = None

    def values(self, predictions: Predictions) -> Tensor:
        """Fractions by example, ``[B]``, of which the score is the mean."""
        metric = self.metric().to(predictions.part["labels"].device)
        if not isinstance(metric, Percentage):
            raise UserError("score", type(metric).__name__, "a score that is a mean over examples")
        return metric.values(*self.measure(predictions))


def _token_correct(e: Predictions, eos: bool) -> tuple[Tensor, Tensor, int]:
    answers = e.answers_scored(eos)
    return answers.token_correct, answers.sequence_index, answers.n_sequences


def _options(e: Predictions) -> tuple[Tensor, Tensor, int]:
    return e.truth_scores, e.option_of, len(e.part["input_ids"])


# Makers of scores: their keyword arguments are the options that a name may be given in brackets.


def _accuracy(kind: TokenAccuracy, eos: bool = True) -> Score:
    return Score(partial(AnswerAccuracy, kind), lambda e: (answer_accuracy(*_token_correct(e, eos), kind),))


def _all_tokens(eos: bool = True) -> Score:
    return _accuracy("all_tokens", eos)


def _probability(eos: bool = True) -> Score:
    def measure(e: Predictions) -> tuple[Tensor]:
        answers = e.answers_scored(eos)
        return (answer_probability(answers.token_logps, answers.sequence_index, answers.n_sequences),)

    return Score(AnswerProbability, measure)


def _highest_probability(eos: bool = True) -> Score:
    return replace(_probability(eos), metric=HighestProbability, default=False)


def _rouge_l(
    measure: Literal["recall", "f1"] = "recall", stemmed: bool = False, new_tokens: int | None = None
) -> Score:
    name = {"recall": "rouge_l_recall" if stemmed else "rouge_l", "f1": "rouge_l_f1"}[measure]
    name += "_stemmed" if stemmed else ""
    check_new_tokens(new_tokens)
    return Score(partial(RougeL, name), lambda e: (e.said(new_tokens), e.references), generates=True)


def _longest_common_run(new_tokens: int | None = None) -> Score:
    check_new_tokens(new_tokens)
    return Score(LongestCommonRun, lambda e: (e.generated(new_tokens), e.reference_tokens), generates=True)


def _memorized_share(least: int = RUN, new_tokens: int | None = None) -> Score:
    check_new_tokens(new_tokens)
    check_at_least("least", least, 1)
    metric = partial(MemorizedShare, least)
    return Score(metric, lambda e: (e.generated(new_tokens), e.reference_tokens), generates=True)


def _ngram_entropy(new_tokens: int | None = None) -> Score:
    check_new_tokens(new_tokens)
    return Score(NgramEntropy, lambda e: (e.said(new_tokens),), generates=True)


def _class_probability(
    classifier: str = GIBBERISH, class_id: int = 0, max_length: int = 512, new_tokens: int | None = None
) -> Score:
    check_new_tokens(new_tokens)
    check_at_least("class_id", class_id, 0)
    check_at_least("max_length", max_length, 1)
    metric = partial(ClassProbability, classifier, class_id, max_length)
    return Score(metric, lambda e: (e.said(new_tokens),), generates=True)


def _extraction_strength(eos: bool = True, floor: bool = False) -> Score:
    return Score(partial(ExtractionStrength, floor), lambda e: _token_correct(e, eos), default=False)


def _exact_memorization(eos: bool = True) -> Score:
    return Score(ExactMemorization, lambda e: _token_correct(e, eos), default=False)


def _truth_ratio(aggregate: TruthRatioKind = "forget") -> Score:
    return Score(partial(TruthRatio, aggregate), _options, needs="options", default=False)


def check_new_tokens(new_tokens: int | None) -> None:
    """Refuse a limit of generated text below one token."""
    if new_tokens is not None:
        check_at_least("new_tokens", new_tokens, 1)


def _of(make: Callable[..., Score]) -> Score:
    return replace(make(), options=make)


class _Scores(dict[str, Score]):
    """Scores by name; those with options or named by an import path are found where they are, and not listed."""

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
        "all_tokens": _of(_all_tokens),
        "probability": _of(_probability),
        "highest_probability": _of(_highest_probability),
        "rouge_l": _of(_rouge_l),
        "rouge_l_f1": _rouge_l("f1"),
        "rouge_l_recall_stemmed": _rouge_l(stemmed=True),
        "rouge_l_f1_stemmed": _rouge_l("f1", stemmed=True),
        "longest_common_run": _of(_longest_common_run),
        "memorized_share": _of(_memorized_share),
        "ngram_entropy": _of(_ngram_entropy),
        "class_probability": _of(_class_probability),
        "extraction_strength": _of(_extraction_strength),
        "exact_memorization": _of(_exact_memorization),
        "truth_ratio": _of(_truth_ratio),
        "truth_ratio_forget": _truth_ratio("forget"),
        "truth_ratio_retain": _truth_ratio("retain"),
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
    """The score of a name, or the one at an import path such as ``my_scores.perplexity``.

    Options stand in brackets behind either (:func:`~lightning_ssiuu.evaluation.options.split_options`).

    Example:
        >>> find_score("probability(eos=false)").generates, find_score("rouge_l(measure=f1, new_tokens=32)").generates
        (False, True)
        >>> find_score("probability(end=false)")
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: scores: got 'probability(end=false)', allowed: probability with any of these \
options: eos=true
    """
    plain, options = split_options(name, argument)
    score: object = resolve(plain, SCORES, argument)
    if not isinstance(score, Score):
        raise UserError(argument, name, f"the import path of a Score, not of a {type(score).__name__}")
    return made_with(score.options, options, name, argument) if options else score


def check_score(name: str, argument: str = "scores") -> None:
    """Raise :class:`UserError` unless ``name`` is a known score, or the import path of one, and has all it needs."""
    metric = find_score(name, argument).metric()
    if isinstance(metric, ClassProbability):
        metric.check()
