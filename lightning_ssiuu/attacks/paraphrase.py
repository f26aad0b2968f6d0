"""Ask the forget set in other words: what only one wording was taught to refuse is still known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_ssiuu.attacks.prompting import Asked, Prompting
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.datamodules.splits import QAExample
from lightning_ssiuu.utils.errors import Given, UserError

_PROBES = ("hop2_test", "same_object")


def other_questions(data: UnlearningDataModule) -> list[Asked]:
    """The questions by variant: paraphrases, and where the data have them two-hop and same-answer questions.

    ``"reworded"`` is every paraphrase of every forget example that has any; ``"hop2_test"`` and ``"same_object"`` are
    ``data.probes("forget", kind)``, where there is such a method and it finds questions.
    """
    forget = data.splits.forget
    variants: list[Asked] = []
    if reworded := [example for example in forget if example.paraphrases]:
        variants.append(Asked("reworded", reworded, _wordings(reworded)))
    probes: Any = getattr(data, "probes", None)
    for kind in _PROBES if callable(probes) else ():
        if asked := probes("forget", kind):
            variants.append(Asked.once(kind, forget, asked))
    if not variants:
        raise UserError("data", Given("a forget set without paraphrases"), "data whose forget examples have some")
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
class Paraphrase(Prompting):
    """Score other questions about what was to be forgotten, see :func:`other_questions`.

    ``"reworded"`` is the mean over an example's paraphrases, then over examples. ``before`` is the score on the base
    questions: of the examples that have paraphrases, or of the whole forget set for the other variants.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> from lightning_ssiuu.attacks.base import Target
        >>> from lightning_ssiuu.training.devices import Devices
        >>> cpu = Devices("cpu")
        >>> (outcome,) = Paraphrase().run([Target("model", "tiny", cpu)], Facts(), "first_token", cpu)
        >>> outcome.variant, outcome.n_scored, outcome.before
        ('reworded', 144, 100.0)
    """

    def asked(self, data: UnlearningDataModule) -> list[Asked]:
        """The other questions there are."""
        return other_questions(data)
