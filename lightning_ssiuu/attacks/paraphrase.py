"""Ask the forget set in other words: what only one wording was taught to refuse is still known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.attacks.base import Attack, Outcome, Target
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.datamodules.splits import QAExample
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.distributed import world_size
from lightning_ssiuu.utils.errors import Given, UserError

_PROBES = ("hop2_test", "same_object")


@dataclass(frozen=True)
class Questions:
    """What one variant asks.

    Args:
        base: The questions the model was unlearned by.
        groups: Other questions, with the weight that a group's mean score has.
    """

    base: list[QAExample]
    groups: list[tuple[float, list[QAExample]]]

    def __len__(self) -> int:
        return sum(len(group) for _, group in self.groups)


def other_questions(data: UnlearningDataModule) -> dict[str, Questions]:
    """The questions by variant: paraphrases, and where the data have them two-hop and same-answer questions.

    Args:
        data: The data module.

    Returns:
        ``"reworded"``: every paraphrase of every forget example that has any; ``"hop2_test"``, ``"same_object"``:
        ``data.probes("forget", kind)`` where there is such a method and it finds questions.

    Raises:
        UserError: If there is nothing to ask, or a question is too long.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> {variant: len(questions) for variant, questions in other_questions(Facts()).items()}
        {'reworded': 144}
    """
    forget = data.splits.forget
    found: dict[str, Questions] = {}
    if reworded := [example for example in forget if example.paraphrases]:
        found["reworded"] = Questions(reworded, _wordings(reworded))
    probes: Any = getattr(data, "probes", None)
    for kind in _PROBES if callable(probes) else ():
        if asked := probes("forget", kind):
            found[kind] = Questions(forget, [(float(len(asked)), asked)])
    if not found:
        raise UserError("data", Given("a forget set without paraphrases"), "data whose forget examples have some")
    for questions in found.values():
        for _, group in questions.groups:
            data.encoder.encode(group)  # what is too long is told before a model is loaded
    return found


def _wordings(examples: Sequence[QAExample]) -> list[tuple[float, list[QAExample]]]:
    # Examples with equally many paraphrases, wording by wording: within such a group all questions weigh the same.
    groups = []
    for count in sorted({len(example.paraphrases) for example in examples}):
        alike = [example for example in examples if len(example.paraphrases) == count]
        for number in range(count):
            asked = [replace(one, question=one.paraphrases[number], paraphrases=()) for one in alike]
            groups.append((len(alike) / count, asked))
    return groups


def mean_score(
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    data: UnlearningDataModule,
    score: str,
    examples: Sequence[QAExample],
) -> float:
    """A model's mean score over some examples, percent, also where there are fewer than ranks.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> from lightning_ssiuu.models.loading import load_model
        >>> data = Facts()
        >>> mean_score(AnswerModel(load_model("tiny")), data.tokenizer, data, "first_token", data.splits.forget[:1])
        100.0
    """
    # Every rank needs an example; asking all of them equally often leaves the mean as it is.
    enough = list(examples) * math.ceil(world_size() / len(examples))
    return evaluate(model, tokenizer, [data.eval_dataloader("forget", enough)], [score])["forget"][score]


@dataclass
class Paraphrase(Attack):
    """Score other questions about what was to be forgotten, see :func:`other_questions`.

    ``"reworded"`` is the mean over an example's paraphrases, then over examples. ``before`` is the score on the base
    questions: of the examples that have paraphrases, or of the whole forget set for the other variants.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> here = Devices("cpu")
        >>> (outcome,) = Paraphrase().run([Target("model", "tiny", here)], Facts(), "first_token", here)
        >>> outcome.variant, outcome.n_scored, outcome.before
        ('reworded', 144, 100.0)
    """

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
        other_questions(data)

    def run(
        self, targets: Sequence[Target], data: UnlearningDataModule, score: str, devices: Devices
    ) -> Iterator[Outcome]:
        variants = other_questions(data)
        for target in targets:
            model, tokenizer = target.load()
            known: dict[int, float] = {}  # base questions that several variants share are scored once
            for variant, questions in variants.items():
                n_base = len(questions.base)
                if n_base not in known:
                    known[n_base] = mean_score(model, tokenizer, data, score, questions.base)
                scores = [(w, mean_score(model, tokenizer, data, score, group)) for w, group in questions.groups]
                after = math.fsum(w * value for w, value in scores) / math.fsum(w for w, _ in scores)
                yield self.outcome(target, data, score, known[n_base], after, variant, n_scored=len(questions))
            del model  # before the next one is loaded
