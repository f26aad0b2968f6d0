"""Suites that are in the package: harmless items that the tiny model was trained on, and real facts."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping

from lightning_ssiuu.datamodules import Facts, UnlearningDataModule, WorldFacts
from lightning_ssiuu.datamodules.splits import QAExample
from lightning_ssiuu.datamodules.world_facts import relations, world_facts
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel

#: Score of each suite: whole answers where the model was trained on them, else the choice among three.
SUITES = {"embedded": "all_tokens", "world_facts": "multiple_choice"}
_KINDS = {
    "Which day": "days",
    "Which number": "numbers",
    "Count down": "numbers",
    "Which letter": "letters",
    "What is the plural": "plurals",
    "What is the opposite": "opposites",
}
Tasks = dict[str, list[QAExample]]


def suite_of(data: UnlearningDataModule) -> str:
    """The offline suite for a model: ``"embedded"`` for the tiny model and its descendants, by their tokenizer."""
    return "embedded" if data.tokenizer.get_vocab() == Facts().tokenizer.get_vocab() else "world_facts"


def suite_tasks(suite: str, seen: Collection[str] = (), limit: int | None = None) -> Tasks:
    """The items of a suite by task, at most ``limit`` of each, drawn at random with a fixed seed.

    ``seen`` are questions, folded (:attr:`QAExample.folded`), to leave out: what the model was unlearned or trained on.
    """
    tasks = _embedded() if suite == "embedded" else _real()
    chosen: Tasks = {}
    for name, items in tasks.items():
        kept = [item for item in items if item.folded not in seen]
        if limit is not None and len(kept) > limit:
            kept = random.Random(0).sample(kept, limit)
        if kept:
            chosen[name] = sorted(kept, key=lambda item: len(item.question))  # of like length together: less padding
    return chosen


def seen_questions(suite: str, data: UnlearningDataModule) -> set[str]:
    """Questions of a suite that a run was unlearned or trained on: a utility score is about everything else."""
    if suite != "world_facts" or not isinstance(data, WorldFacts):
        return set()
    return {example.folded for example in [*data.splits.forget, *data.splits.retain]}


def score_tasks(
    model: AnswerModel, tasks: Mapping[str, list[QAExample]], score: str, data: UnlearningDataModule
) -> dict[str, float]:
    """Percent by task; ``data`` encodes and batches the items."""
    return {
        name: evaluate(model, data.tokenizer, [data.eval_dataloader("test", items)], [score])["test"][score]
        for name, items in tasks.items()
    }


def encoding_like(suite: str, data: UnlearningDataModule, batch_size: int) -> UnlearningDataModule:
    """The data module of a suite, asking as a run's data module does: with its tokenizer and template."""
    kind = Facts if suite == "embedded" else WorldFacts
    return kind(tokenizer=data.tokenizer, eval_batch_size=batch_size, **data.encoding)


def _embedded() -> Tasks:
    tasks: Tasks = {name: [] for name in _KINDS.values()}
    for item in Facts().splits.benign:
        (kind,) = (name for start, name in _KINDS.items() if item.question.startswith(start))
        tasks[kind].append(item)
    return tasks


def _real() -> Tasks:
    relation_of = {
        base["question"]: relation
        for relation in relations()
        for entity in world_facts([relation]).values()
        for base in entity["hop1_unlearn"]
    }
    splits = WorldFacts().splits
    tasks: Tasks = {relation: [] for relation in relations()}
    for example in [*splits.forget, *splits.retain, *splits.test]:
        tasks[relation_of[example.question]].append(example)
    return tasks
