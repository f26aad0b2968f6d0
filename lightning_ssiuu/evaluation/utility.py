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
    """The offline suite for a model: ``"embedded"`` for the tiny model and what was made of it, told by its tokenizer.

    Args:
        data: A data module with the model's tokenizer.
    """
    return "embedded" if data.tokenizer.get_vocab() == Facts().tokenizer.get_vocab() else "world_facts"


def suite_tasks(suite: str, seen: Collection[str] = (), limit: int | None = None) -> Tasks:
    """The items of a suite by task.

    Args:
        suite: ``"embedded"`` or ``"world_facts"``.
        seen: Questions, folded (:attr:`QAExample.folded`), to leave out: what the model was unlearned or trained on.
        limit: At most so many items of each task, drawn at random with a fixed seed.
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
    """Percent by task.

    Args:
        model: The model.
        tasks: Items by task.
        score: Name of the score.
        data: Encodes and batches the items.
    """
    found = {}
    for name, items in tasks.items():
        scores = evaluate(model, data.tokenizer, [data.eval_dataloader("test", items)], [score])
        found[name] = scores["test"][score]
    return found


def encoding_like(suite: str, data: UnlearningDataModule, batch_size: int) -> UnlearningDataModule:
    """The data module of a suite, asking as a run's data module does: its tokenizer, template and longest sequence.

    Args:
        suite: ``"embedded"`` or ``"world_facts"``.
        data: The run's.
        batch_size: Items at a time.
    """
    kind = Facts if suite == "embedded" else WorldFacts
    return kind(
        tokenizer=data.tokenizer, template=data.template, max_length=data.max_length, eval_batch_size=batch_size
    )


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
