"""Ask the forget set in other words: what only one wording was taught to refuse is still known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

from lightning_ssiuu.attacks.base import Attack, Outcome, Target, forget_score
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.datamodules.splits import QAExample
from lightning_ssiuu.training.devices import Devices, Engine
from lightning_ssiuu.utils.errors import Given, UserError

_PROBES = ("hop2_test", "same_object")


@dataclass(frozen=True)
class Questions:
    """What one variant asks: the questions the model was unlearned by, and groups of others with their weights."""

    base: Sequence[QAExample]
    groups: list[tuple[float, list[QAExample]]]

    def __len__(self) -> int:
        return sum(len(group) for _, group in self.groups)


def other_questions(data: UnlearningDataModule) -> dict[str, Questions]:
    """The questions by variant: paraphrases, and where the data have them two-hop and same-answer questions.

    ``"reworded"`` is every paraphrase of every forget example that has any; ``"hop2_test"`` and ``"same_object"`` are
    ``data.probes("forget", kind)``, where there is such a method and it finds questions.
    """
    forget = data.splits.forget
    variants: dict[str, Questions] = {}
    if reworded := [example for example in forget if example.paraphrases]:
        variants["reworded"] = Questions(reworded, _wordings(reworded))
    probes: Any = getattr(data, "probes", None)
    for kind in _PROBES if callable(probes) else ():
        if asked := probes("forget", kind):
            variants[kind] = Questions(forget, [(float(len(asked)), asked)])
    if not variants:
        raise UserError("data", Given("a forget set without paraphrases"), "data whose forget examples have some")
    for questions in variants.values():
        for _, group in questions.groups:
            data.encoder.encode(group)  # what is too long is told before a model is loaded
    return variants


def _wordings(examples: Sequence[QAExample]) -> list[tuple[float, list[QAExample]]]:
    # Examples with equally many paraphrases, wording by wording: within such a group all questions weigh the same.
    groups = []
    for count in sorted({len(example.paraphrases) for example in examples}):
        alike = [example for example in examples if len(example.paraphrases) == count]
        for number in range(count):
            asked = [replace(base, question=base.paraphrases[number], paraphrases=()) for base in alike]
            groups.append((len(alike) / count, asked))
    return groups


@dataclass
class Paraphrase(Attack):
    """Score other questions about what was to be forgotten, see :func:`other_questions`.

    ``"reworded"`` is the mean over an example's paraphrases, then over examples. ``before`` is the score on the base
    questions: of the examples that have paraphrases, or of the whole forget set for the other variants.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> cpu = Devices("cpu")
        >>> (outcome,) = Paraphrase().run([Target("model", "tiny", cpu)], Facts(), "first_token", cpu)
        >>> outcome.variant, outcome.n_scored, outcome.before
        ('reworded', 144, 100.0)
    """

    engines: ClassVar[tuple[Engine, ...]] = get_args(Engine)

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
        other_questions(data)

    def run(
        self, targets: Sequence[Target], data: UnlearningDataModule, score: str, devices: Devices
    ) -> Iterator[Outcome]:
        variants = other_questions(data)
        for target in targets:
            model, tokenizer = target.load(unchanged=True)
            known: dict[int, float] = {}  # base questions that several variants share are scored once
            for variant, questions in variants.items():
                n_base = len(questions.base)
                if n_base not in known:
                    known[n_base] = forget_score(model, tokenizer, data, score, questions.base)
                scores = [(w, forget_score(model, tokenizer, data, score, group)) for w, group in questions.groups]
                after = math.fsum(w * value for w, value in scores) / math.fsum(w for w, _ in scores)
                yield self.outcome(target, data, score, known[n_base], after, variant, n_scored=len(questions))
            del model  # before the next one is loaded
