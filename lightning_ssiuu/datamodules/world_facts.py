"""WorldFacts: real facts that a small language model knows in part, embedded in the package."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_ssiuu.datamodules.base import Splits
from lightning_ssiuu.datamodules.clusters import PROBES, Cluster, ClusterDataModule, parse_clusters
from lightning_ssiuu.datamodules.embedded import FACTS, WORLD_FACTS
from lightning_ssiuu.datamodules.splits import numbered
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
        known = list(_world()["relations"])
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
        cuts = {"forget": (0, n_forget), "retain": (n_forget, n_forget + n_retain), "test": (n_forget + n_retain, None)}
        members = {name: set(subjects[start:end]) for name, (start, end) in cuts.items()}
        numbers = range(len(clusters))
        return clusters, {name: [n for n in numbers if clusters[n].entity in members[name]] for name in cuts}

    def load_splits(self) -> Splits:
        splits = super().load_splits()
        benign = json.loads(FACTS.read_text(encoding="utf-8"))["benign"]
        # Above the ids of all probes, so that scored sets may be put together
        pairs = ((item["question"], item["answer"]) for item in benign)
        return replace(splits, benign=numbered(len(self.clusters) * 100, pairs))


def relations() -> list[str]:
    """Names of the relations."""
    return list(_world()["relations"])


def world_facts(only: Sequence[str] | None = None) -> dict[str, dict[str, list[Any]]]:
    """Facts of these relations in FaithUn's format (:func:`~.clusters.parse_clusters`), probes nested by base question.

    A two-hop question is there if its first hop is.
    """
    entities: dict[str, dict[str, list[Any]]] = {}
    for relation in relations() if only is None else only:
        for subject in _facts(relation):
            entity = entities.setdefault(subject, {kind: [] for kind in ("hop1_unlearn", *PROBES)})
            base, *reworded = _ask(relation, subject)
            entity["hop1_unlearn"].append(base)
            entity["hop1_test"].append(reworded)
            entity["hop2_test"].append(_two_hop(relation, subject))
            entity["same_object"].append(_same_answer(relation, subject))
    return entities


@functools.cache
def _world() -> dict[str, Any]:
    return json.loads(WORLD_FACTS.read_text(encoding="utf-8"))


def _facts(relation: str) -> dict[str, str]:
    return _world()["relations"][relation]["facts"]


def _ask(relation: str, subject: str) -> list[dict[str, Any]]:
    texts = _world()["relations"][relation]["questions"]
    return [_record(text, subject, relation, _facts(relation)[subject], subject) for text in texts]


def _two_hop(relation: str, subject: str) -> list[dict[str, Any]]:
    # Questions whose first hop is the fact: onwards from its answer, or from the answer back to the subject
    answer, hops = _facts(relation)[subject], []
    for chains, about, middle in (("chains", subject, answer), ("inverse_chains", answer, subject)):
        for first, second, text in _world()[chains]:
            if first == relation and middle in _facts(second):
                hops.append(_record(text, about, second, _facts(second)[middle], subject))
    return hops


def _same_answer(relation: str, subject: str) -> list[dict[str, Any]]:
    facts = _facts(relation)
    others = [other for other, answer in facts.items() if answer == facts[subject] and other != subject]
    return [_ask(relation, other)[0] for other in _draw(others, f"{relation}:{subject}", _SAME_ANSWER)]


def _record(text: str, about: str, relation: str, answer: str, subject: str) -> dict[str, Any]:
    question = text.replace("{}", f"the {about}" if about in _world()["article"] else about)
    pool = sorted({value for value in _facts(relation).values() if value != answer})
    wrong = _draw(pool, f"{relation}:{subject}:wrong", _WRONG)
    return {"question": question[:1].upper() + question[1:], "answers": [answer], "false_answer_options": wrong}


def _draw(pool: Sequence[str], key: str, count: int) -> list[str]:
    # Seeded by the fact, so that a new fact leaves the others' options as they are
    return random.Random(f"{_SEED}:{key}").sample(pool, min(count, len(pool)))
