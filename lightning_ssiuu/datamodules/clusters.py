"""Clusters of questions around one fact each, as FaithUn publishes them (arXiv 2502.19207): reading and splitting."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.trained_on import trained_on
from lightning_ssiuu.utils.errors import Given, UserError

#: Questions asked about a fact after unlearning: reworded, one step further, another question with the same answer.
PROBES = ("hop1_test", "hop2_test", "same_object")
_BASE = "hop1_unlearn"
_SPLITS = ("forget", "retain", "test")


@dataclass(frozen=True, repr=False)
class Question:
    """A question with its answer (the first of ``answers``) and wrong options."""

    question: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Cluster:
    """One fact: the question it is unlearned by, and the questions of each kind in :data:`PROBES` about it."""

    entity: str
    base: Question
    probes: dict[str, tuple[Question, ...]]


def parse_clusters(entities: Any, argument: str) -> list[Cluster]:
    """Read FaithUn's format: ``{entity: {"hop1_unlearn": [...], "hop1_test": [...], "hop2_test": [...], ...}}``.

    A question is ``{"question", "answers", "false_answer_options"}``; ``answers`` is a text or a list of spellings, the
    first of which is the one trained on. Every base question opens a cluster, entities in their order. The other kinds
    may be missing. They hold one list per base question, or one flat list per entity. From a flat list, a base
    question gets the reworded and same-answer questions that share an answer with it, which is what defines them, and
    all of the entity's two-hop questions. Error messages name ``argument`` and places, never text.
    """
    if not isinstance(entities, dict) or not all(isinstance(entity, dict) for entity in entities.values()):
        raise _other_format(argument, "no object of entities")
    clusters = []
    for number, (name, entity) in enumerate(entities.items()):
        place = f"entity {number}"
        base = [question for _, group in _groups(entity, _BASE, place, argument) for question in group]
        kinds = {kind: _groups(entity, kind, place, argument) for kind in PROBES if kind in entity}
        for position, question in enumerate(base):
            probes = {kind: _about(kinds.get(kind, []), kind, question, position, len(base)) for kind in PROBES}
            clusters.append(Cluster(str(name), question, probes))
    return clusters


def _groups(entity: dict[str, Any], kind: str, place: str, argument: str) -> list[tuple[bool, list[Question]]]:
    # Whether each item of a list is a list itself, and its questions
    place = f"{place}, {kind}"
    if not isinstance(entity.get(kind), list):
        raise _other_format(argument, f"no list {place}")
    return [
        (isinstance(item, list), [_question(record, f"{place} {number}", argument) for record in _listed(item)])
        for number, item in enumerate(entity[kind])
    ]


def _question(record: Any, place: str, argument: str) -> Question:
    if not isinstance(record, dict):
        raise _other_format(argument, f"no object in {place}")
    for key in ("question", "answers", "false_answer_options"):
        if key not in record:
            raise _other_format(argument, f"no {key!r} in {place}")
    answers, options = _listed(record["answers"]), _listed(record["false_answer_options"])
    if not all(isinstance(text, str) for text in (record["question"], *answers, *options)):
        raise _other_format(argument, f"something else than text in {place}")
    if not answers:
        raise _other_format(argument, f"no answer in {place}")
    known = _folded(answers)
    wrong = dict.fromkeys(option for option in options if option.casefold() not in known)
    return Question(record["question"], tuple(answers), tuple(wrong))


def _other_format(argument: str, given: str) -> UserError:
    return UserError(argument, Given(given), "FaithUn's format")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _about(
    groups: Sequence[tuple[bool, list[Question]]], kind: str, base: Question, position: int, n_base: int
) -> tuple[Question, ...]:
    if len(groups) == n_base and all(nested for nested, _ in groups):
        return tuple(groups[position][1])
    flat = tuple(question for _, group in groups for question in group)
    if kind == "hop2_test":
        return flat
    answers = _folded(base.answers)
    return tuple(question for question in flat if answers & _folded(question.answers))


def _folded(answers: Iterable[str]) -> set[str]:
    return {answer.casefold() for answer in answers}


class ClusterDataModule(UnlearningDataModule):
    """A benchmark of clusters: unlearned by base questions, examined by the other questions about the same facts.

    An example's id is the number of its cluster, its group the entity. Reworded questions are its ``paraphrases``.

    Args:
        n_distractors: Wrong options per question at most, in the file's order; with 2 a question has 3 options.
        **kwargs: See :class:`UnlearningDataModule`.
    """

    def __init__(self, n_distractors: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if n_distractors < 0:
            raise UserError("n_distractors", n_distractors, "at least 0")
        self.n_distractors = n_distractors

    @abstractmethod
    def load_clusters(self) -> tuple[list[Cluster], dict[str, list[int]]]:
        """All clusters, and the numbers of those in ``"forget"``, ``"retain"`` and ``"test"``."""

    @property
    def clusters(self) -> list[Cluster]:
        return self._loaded[0]

    def load_splits(self) -> Splits:
        return Splits(**{name: [self._example(index) for index in self._loaded[1][name]] for name in _SPLITS})

    def probes(self, split: str, kind: str) -> list[QAExample]:
        """Other questions about the facts of a set, to be scored by :meth:`eval_dataloader`; with ids of their own.

        A question asked about several facts of the set stands here once; a question that the forget set is trained on
        is left out, as it cannot show what was forgotten along with it.

        Args:
            split: ``"forget"``, ``"retain"`` or ``"test"``.
            kind: ``"hop1_test"`` (reworded), ``"hop2_test"`` (two hops) or ``"same_object"`` (same answer).
        """
        for argument, value, allowed in (("split", split, _SPLITS), ("kind", kind, PROBES)):
            if value not in allowed:
                raise UserError(argument, value, ", ".join(allowed))
        clusters, indices = self._loaded
        members = set(indices[split])
        forgotten = {self._example(index).folded for index in indices["forget"]}
        every = ((n, each, question) for n in range(len(clusters)) for each in PROBES
                 for question in clusters[n].probes[each])  # fmt: skip
        examples: dict[str, QAExample] = {}
        for example_id, (number, each, question) in enumerate(every, len(clusters)):
            if each == kind and number in members:
                example = self._asked(example_id, question, clusters[number].entity)
                if example.folded not in forgotten:
                    examples.setdefault(example.folded, example)
        return list(examples.values())

    def named_set(self, name: str) -> Sequence[QAExample]:
        """The sets of a suite: ``forget_hop1_test`` and so on, the :meth:`probes` of a set and kind; and others.

        What forget or retain set are trained on is left out of probes: it would show what was taught, not its effects.
        """
        split, _, kind = name.partition("_")
        if split not in _SPLITS or kind not in PROBES:
            return super().named_set(name)
        found = self.probes(split, kind)
        taught = set(trained_on([each.question for each in found], chain(self.splits.forget, self.splits.retain)))
        if left := [example for number, example in enumerate(found) if number not in taught]:
            return left
        raise UserError("data", Given(f"{type(self).__name__} without a set {name}"), "data with that set")

    @cached_property
    def _loaded(self) -> tuple[list[Cluster], dict[str, list[int]]]:
        return self.load_clusters()

    def _asked(self, example_id: int, asked: Question, entity: str, paraphrases: tuple[str, ...] = ()) -> QAExample:
        wrong = asked.wrong[: self.n_distractors]
        return QAExample(example_id, asked.question, asked.answers[0], wrong, paraphrases, entity)

    def _example(self, index: int) -> QAExample:
        cluster = self.clusters[index]
        reworded = tuple(question.question for question in cluster.probes["hop1_test"])
        return self._asked(index, cluster.base, cluster.entity, reworded)
