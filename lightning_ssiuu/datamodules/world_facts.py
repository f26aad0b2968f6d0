"""WorldFacts: real facts that a small language model knows in part, embedded in the package."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from lightning_ssiuu.datamodules.base import QAExample, Splits
from lightning_ssiuu.datamodules.clusters import Cluster, ClusterDataModule, parse_clusters
from lightning_ssiuu.datamodules.embedded import FACTS, WORLD_FACTS
from lightning_ssiuu.utils.errors import UserError, check_at_least

_SAME_ANSWER = 2  # same-answer questions per fact at most
_WRONG = 2  # wrong options per question: with the answer FaithUn's three
_SEED = 0  # of the wrong options, which do not change with the split


class WorldFacts(ClusterDataModule):
    """Capitals, currencies, chemical symbols, authors and other real facts, embedded; needs no network.

    Unlearning can be tried on a pretrained model without fine-tuning it first, which the fictitious :class:`Facts`
    cannot. Every fact has two other wordings, two wrong options of the same kind, two-hop questions where relations
    chain and questions with the same answer (:meth:`probes`). All facts about a subject belong to one set. The benign
    items are those of :class:`Facts`.

    Args:
        forget_fraction: Share of the subjects in the forget set.
        retain_fraction: Share of the subjects in the retain set; the rest are the test set.
        relations: Only these (see :func:`relations`); None: all.
        split_seed: Seeds which subjects are in which set. Apart from ``seed``, so that runs which differ in their
            batches unlearn the same facts.
        n_distractors: Wrong options per question, at most 2.
        **kwargs: See :class:`UnlearningDataModule`.

    Raises:
        UserError: Fractions that leave a set empty, or an unknown relation.

    Example:
        >>> data = WorldFacts(relations=["capital", "language"])
        >>> data.eval_splits
        ['forget', 'retain', 'test']
        >>> {example.group for example in data.splits.forget} & {example.group for example in data.splits.retain}
        set()
    """

    def __init__(
        self,
        forget_fraction: float = 0.1,
        retain_fraction: float = 0.4,
        relations: Sequence[str] | None = None,
        split_seed: int = 0,
        n_distractors: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(n_distractors=n_distractors, **kwargs)
        if not 0 < forget_fraction < 1:
            raise UserError("forget_fraction", forget_fraction, "a fraction in (0, 1)")
        if not 0 < retain_fraction <= 1 - forget_fraction:
            raise UserError("retain_fraction", retain_fraction, f"above 0, at most {1 - forget_fraction:g}")
        check_at_least("split_seed", split_seed, 0)
        known = _relations(_world())
        for relation in relations or ():
            if relation not in known:
                raise UserError("relations", relation, ", ".join(known))
        if n_distractors > _WRONG:
            raise UserError("n_distractors", n_distractors, f"0 to {_WRONG}")
        self.forget_fraction, self.retain_fraction, self.split_seed = forget_fraction, retain_fraction, split_seed
        self.relations = known if relations is None else list(relations)

    def load_clusters(self) -> tuple[list[Cluster], dict[str, list[int]]]:
        clusters = parse_clusters(world_facts(self.relations), "relations")
        subjects = list(dict.fromkeys(cluster.entity for cluster in clusters))
        random.Random(self.split_seed).shuffle(subjects)
        n_forget = round(self.forget_fraction * len(subjects))
        n_retain = min(round(self.retain_fraction * len(subjects)), len(subjects) - n_forget)
        for name, count in (("forget_fraction", n_forget), ("retain_fraction", n_retain)):
            if count < 1:
                raise UserError(name, getattr(self, name), f"at least one of {len(subjects)} subjects")
        split_of = dict.fromkeys(subjects, "test")
        split_of |= dict.fromkeys(subjects[:n_forget], "forget")
        split_of |= dict.fromkeys(subjects[n_forget : n_forget + n_retain], "retain")
        indices: dict[str, list[int]] = {"forget": [], "retain": [], "test": []}
        for number, cluster in enumerate(clusters):
            indices[split_of[cluster.entity]].append(number)
        return clusters, indices

    def load_splits(self) -> Splits:
        splits = super().load_splits()
        benign = json.loads(FACTS.read_text(encoding="utf-8"))["benign"]
        # Above the ids of all probes, so that scored sets may be put together
        first_id = len(self.clusters) * 100
        items = [QAExample(first_id + n, item["question"], item["answer"]) for n, item in enumerate(benign)]
        return Splits(splits.forget, splits.retain, splits.test, items)


def relations() -> list[str]:
    """Names of the relations."""
    return _relations(_world())


def world_facts(only: Sequence[str] | None = None) -> dict[str, dict[str, list]]:
    """All facts in FaithUn's format (:func:`~.clusters.parse_clusters`), probes nested by base question.

    Args:
        only: These relations; None: all. A two-hop question is there if its first hop is.

    Example:
        >>> munich = world_facts(["country"])["Munich"]
        >>> munich["hop1_unlearn"][0]["question"], munich["hop1_unlearn"][0]["answers"]
        ('In which country is the city of Munich?', ['Germany'])
        >>> [hop["answers"] for hop in munich["hop2_test"][0]]
        [['Berlin'], ['euro'], ['Europe']]
    """
    maker = _Maker(_world())
    entities: dict[str, dict[str, list]] = {}
    for relation in _relations(maker.world) if only is None else only:
        for subject in maker.facts(relation):
            entity = entities.setdefault(
                subject, {"hop1_unlearn": [], "hop1_test": [], "hop2_test": [], "same_object": []}
            )
            base, *reworded = maker.ask(relation, subject)
            entity["hop1_unlearn"].append(base)
            entity["hop1_test"].append(reworded)
            entity["hop2_test"].append(maker.two_hop(relation, subject))
            entity["same_object"].append(maker.same_answer(relation, subject))
    return entities


def _world() -> dict[str, Any]:
    return json.loads(WORLD_FACTS.read_text(encoding="utf-8"))


def _relations(world: dict[str, Any]) -> list[str]:
    return list(world["relations"])


class _Maker:
    def __init__(self, world: dict[str, Any]) -> None:
        self.world, self.article = world, frozenset(world["article"])

    def facts(self, relation: str) -> dict[str, str]:
        return self.world["relations"][relation]["facts"]

    def ask(self, relation: str, subject: str) -> list[dict[str, Any]]:
        texts = self.world["relations"][relation]["questions"]
        return [self._record(text, subject, relation, self.facts(relation)[subject], subject) for text in texts]

    def two_hop(self, relation: str, subject: str) -> list[dict[str, Any]]:
        """Questions whose first hop is the fact: onwards from its answer, or from the answer back to the subject."""
        answer, hops = self.facts(relation)[subject], []
        for first, second, text in self.world["chains"]:
            if first == relation and answer in self.facts(second):
                hops.append(self._record(text, subject, second, self.facts(second)[answer], subject))
        for first, second, text in self.world["inverse_chains"]:
            if first == relation and subject in self.facts(second):
                hops.append(self._record(text, answer, second, self.facts(second)[subject], subject))
        return hops

    def same_answer(self, relation: str, subject: str) -> list[dict[str, Any]]:
        answer = self.facts(relation)[subject]
        others = [other for other, value in self.facts(relation).items() if value == answer and other != subject]
        chosen = self._draw(others, f"{relation}:{subject}", _SAME_ANSWER)
        return [self.ask(relation, other)[0] for other in chosen]

    def _record(self, text: str, about: str, relation: str, answer: str, subject: str) -> dict[str, Any]:
        words = f"the {about}" if about in self.article else about
        question = text.replace("{}", words)
        pool = sorted({value for value in self.facts(relation).values() if value != answer})
        wrong = self._draw(pool, f"{relation}:{subject}:wrong", _WRONG)
        return {
            "question": question[:1].upper() + question[1:],
            "answers": [answer],
            "false_answer_options": wrong,
        }

    @staticmethod
    def _draw(pool: Sequence[str], key: str, count: int) -> list[str]:
        # Seeded by the fact, so that a new fact leaves the others' options as they are
        return random.Random(f"{_SEED}:{key}").sample(pool, min(count, len(pool)))
