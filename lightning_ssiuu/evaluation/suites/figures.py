"""Kinds of figures that suites are made of; formulas and signs are open-unlearning's (arXiv 2506.12618)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean, mean
from typing import Any, ClassVar, Literal

import torch

from lightning_ssiuu.evaluation.metrics.membership import membership_auc, privleak
from lightning_ssiuu.evaluation.metrics.truth_ratio import forget_quality
from lightning_ssiuu.evaluation.suites.base import Entry, Figure, Log, Reading, Values, entry_of

#: Added to denominators, as there.
EPSILON = 1e-10


@dataclass(frozen=True)
class Mean(Figure):
    """Mean of a score over a set; of an example with several answers, the mean over these counts.

    Args:
        of: The set (:class:`Reading`).
        score: The score with its options.
        key: What the value of an example is called in the log.
        scale: Times this: 100 for percent.
    """

    of: str
    score: str
    key: str = "score"
    scale: float = 1.0

    @property
    def readings(self) -> Sequence[Reading]:
        return (Reading(self.of, self.score),)

    def entry(self, values: Mapping[Reading, Values], log: Log, reference: Log | None) -> Entry:
        found = [_scaled(value, self.scale) for value in values[self.readings[0]]]
        return {"agg_value": _number(mean(map(_mean, found))), "value_by_index": self._by_index(found)}

    def _by_index(self, found: Values) -> dict[str, Any]:
        return {str(n): {self.key: value} for n, value in enumerate(found)}


def percent(of: str, score: str) -> Mean:
    """Mean of a score over a set, in percent."""
    return Mean(of, score, scale=100.0)


@dataclass(frozen=True)
class Classified(Mean):
    """Mean probability that a classifier gives the generated texts of being of its first class.

    Args:
        new_tokens: Most tokens of a text.
        max_length: Tokens that the classifier reads.
        classifier: Directory or hub id; None: the score's own (:data:`~lightning_ssiuu.evaluation.scores.GIBBERISH`).
    """

    score: str = "class_probability"
    new_tokens: int = 200
    max_length: int = 512
    classifier: str | None = None

    @property
    def readings(self) -> Sequence[Reading]:
        options = f"max_length={self.max_length}, new_tokens={self.new_tokens}"
        options += f", classifier={json.dumps(self.classifier)}" if self.classifier is not None else ""
        return (Reading(self.of, f"{self.score}({options})"),)


@dataclass(frozen=True)
class Probability(Mean):
    """Mean of ``P(y|x)^(1/|y|)``; the log has an example's mean loss per token (nats), too."""

    score: str = "probability"
    key: str = "prob"

    def _by_index(self, found: Values) -> dict[str, Any]:
        return {str(n): {self.key: value, "avg_loss": _each(_loss, value)} for n, value in enumerate(found)}


@dataclass(frozen=True)
class _OfOptions(Figure):
    # What is made of the probabilities of true and wrong answers, two figures of the suite.
    correct: str
    wrong: str

    @property
    def made_of(self) -> Sequence[str]:
        return (self.correct, self.wrong)

    def _pairs(self, log: Log, key: str) -> list[tuple[str, Any, Any]]:
        correct, wrong = (log[name]["value_by_index"] for name in self.made_of)
        return [(index, correct[index][key], wrong[index][key]) for index in correct]


@dataclass(frozen=True)
class NormalisedProbability(_OfOptions):
    """Mean of ``P(true) / (P(true) + sum of P(wrong))``, all length-normalised (TOFU, arXiv 2401.06121, Sec. 2.2.1)."""

    def entry(self, values: Mapping[Reading, Values], log: Log, reference: Log | None) -> Entry:
        shares = {
            index: _mean(right) / (_mean(right) + sum(_listed(wrong)) + EPSILON)
            for index, right, wrong in self._pairs(log, "prob")
        }
        return {"agg_value": mean(shares.values()), "value_by_index": {n: {"prob": v} for n, v in shares.items()}}


#: What a truth ratio T is worth, by the name of its aggregate.
WORTH: dict[str, Callable[[float], float]] = {
    "closer_to_1_better": lambda ratio: min(ratio, 1 / (ratio + EPSILON)),
    "true_better": lambda ratio: max(0.0, 1 - ratio),
    "prob_mean": lambda ratio: ratio,
}


@dataclass(frozen=True)
class TruthRatio(_OfOptions):
    """Mean of what truth ratios are worth (TOFU, arXiv 2401.06121, Eq. 1, with the geometric mean of wrong answers).

    Args:
        correct: Probability of the true answers, or of their paraphrases.
        wrong: Probability of the wrong ones.
        aggregate: ``closer_to_1_better``: ``min(T, 1/T)``; ``true_better``: ``max(0, 1 − T)``; ``prob_mean``: the mean
            of ``P(true) / (P(true) + P(wrong))`` in place of T.
    """

    aggregate: Literal["closer_to_1_better", "true_better", "prob_mean"] = "closer_to_1_better"

    def entry(self, values: Mapping[Reading, Values], log: Log, reference: Log | None) -> Entry:
        ratios = {}
        for index, right, wrong in self._pairs(log, "avg_loss"):
            true, false = math.exp(-_mean(right)), math.exp(-_mean(wrong))
            share = true / (true + false + EPSILON)
            ratios[index] = share if self.aggregate == "prob_mean" else false / (true + EPSILON)
        worth = mean(map(WORTH[self.aggregate], ratios.values()))
        return {"agg_value": worth, "value_by_index": {n: {"score": v} for n, v in ratios.items()}}


@dataclass(frozen=True)
class ForgetQuality(Figure):
    """p-value of the two-sample Kolmogorov–Smirnov test between a model's truth ratios and the reference's."""

    ratios: str
    needs_reference: ClassVar[bool] = True

    @property
    def made_of(self) -> Sequence[str]:
        return (self.ratios,)

    @property
    def of_reference(self) -> Sequence[str]:
        return (self.ratios,)

    def entry(self, values: Mapping[Reading, Values], log: Log, reference: Log | None) -> Entry:
        own, theirs = (_scores(e) for e in (log[self.ratios], entry_of(reference, self.ratios)))
        return {"agg_value": _number(forget_quality(own, theirs))}


@dataclass(frozen=True)
class HarmonicMean(Figure):
    """Harmonic mean of other figures, all ≥ 0; 0 if one of them is 0."""

    figures: tuple[str, ...]

    @property
    def made_of(self) -> Sequence[str]:
        return self.figures

    def entry(self, values: Mapping[Reading, Values], log: Log, reference: Log | None) -> Entry:
        parts = [log[name]["agg_value"] for name in self.figures]
        return {"agg_value": None if None in parts else harmonic_mean(parts)}


@dataclass(frozen=True)
class Membership(Figure):
    """AUC of a membership attack: 1 where each member looks more like one than any non-member does.

    Args:
        signal: Name of a signal with its options (:data:`~lightning_ssiuu.evaluation.signals.SIGNALS`).
        members: The set that was trained on, once.
        others: The set that no model was trained on.
    """

    signal: str
    members: str = "forget"
    others: str = "holdout"

    @property
    def readings(self) -> Sequence[Reading]:
        return (Reading(self.members, self.signal), Reading(self.others, self.signal))

    def entry(self, values: Mapping[Reading, Values], log: Log, reference: Log | None) -> Entry:
        return _attack(*([-value for value in values[reading]] for reading in self.readings))


@dataclass(frozen=True)
class MembershipByReference(Figure):
    """The attack whose statistic is the loss above the reference's; ``loss`` is the attack by loss alone."""

    loss: str
    needs_reference: ClassVar[bool] = True

    @property
    def made_of(self) -> Sequence[str]:
        return (self.loss,)

    @property
    def of_reference(self) -> Sequence[str]:
        return (self.loss,)

    def entry(self, values: Mapping[Reading, Values], log: Log, reference: Log | None) -> Entry:
        own, theirs = log[self.loss], entry_of(reference, self.loss)
        above = []
        for of in ("forget", "holdout"):
            above.append((_scores(own[of]) - _scores(entry_of(theirs, of))).tolist())
        return _attack(*above)


@dataclass(frozen=True)
class PrivLeak(Figure):
    """How far an attack's AUC is from the reference's, ``100·(AUC_ref − AUC)/(1 − AUC_ref)`` (MUSE, arXiv 2407.06460).

    Args:
        attack: A figure.
        alone: The reference's AUC where there is no reference.
    """

    attack: str
    alone: float = 0.5

    @property
    def made_of(self) -> Sequence[str]:
        return (self.attack,)

    @property
    def of_reference(self) -> Sequence[str]:
        return (self.attack,)

    def entry(self, values: Mapping[Reading, Values], log: Log, reference: Log | None) -> Entry:
        theirs = self.alone if reference is None else entry_of(reference, self.attack)["agg_value"]
        own = log[self.attack]["agg_value"]
        return {"agg_value": None if None in (own, theirs) or theirs >= 1 else privleak(own, theirs)}


@dataclass(frozen=True)
class Made(Figure):
    """A number made of other figures: None where one of them is.

    Args:
        figures: Their names.
        number: From their values to this one's.
    """

    figures: tuple[str, ...]
    number: Callable[..., float]

    @property
    def made_of(self) -> Sequence[str]:
        return self.figures

    def entry(self, values: Mapping[Reading, Values], log: Log, reference: Log | None) -> Entry:
        parts = [log[name]["agg_value"] for name in self.figures]
        return {"agg_value": None if None in parts else self.number(*parts)}


@dataclass(frozen=True)
class Alias(Figure):
    """A figure once more, under a second name that other programs look for."""

    figure: str

    @property
    def made_of(self) -> Sequence[str]:
        return (self.figure,)

    def entry(self, values: Mapping[Reading, Values], log: Log, reference: Log | None) -> Entry:
        return log[self.figure]


def _attack(members: Sequence[float], others: Sequence[float]) -> Entry:
    # Statistics are higher for what looks less like a member, as in open-unlearning's logs.
    sets = {"forget": members, "holdout": others}
    auc = _number(membership_auc(*(-torch.tensor(each, dtype=torch.float64) for each in sets.values())))
    entries = {
        name: {
            "agg_value": _number(mean(each)),
            "value_by_index": {str(n): {"score": value} for n, value in enumerate(each)},
        }
        for name, each in sets.items()
    }
    return {**entries, "auc": auc, "agg_value": auc}


def _scores(entry: Entry) -> torch.Tensor:
    by_index = sorted(entry["value_by_index"].items(), key=lambda item: int(item[0]))
    return torch.tensor([each["score"] for _, each in by_index], dtype=torch.float64)


def _listed(value: Any) -> Sequence[float]:
    return value if isinstance(value, (list, tuple)) else [value]


def _mean(value: Any) -> float:
    return mean(_listed(value))


def _each(of: Callable[[float], float], value: Any) -> Any:
    return [of(one) for one in value] if isinstance(value, list) else of(value)


def _scaled(value: Any, scale: float) -> Any:
    return value if scale == 1 else _each(lambda one: one * scale, value)


def _loss(probability: float) -> float:
    return -math.log(probability) if probability > 0 else math.inf


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
