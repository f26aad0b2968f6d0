"""Measure a suite: read what its figures need off a model, set by set, and make the figures of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device

from lightning_ssiuu.datamodules import QAExample, UnlearningDataModule
from lightning_ssiuu.datamodules.chunks import Chunk
from lightning_ssiuu.datamodules.splits import name_ids
from lightning_ssiuu.evaluation.predictions import Predictions, generating
from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.evaluation.scores import Score, check_score, find_score
from lightning_ssiuu.evaluation.signals import Signal, find_signal
from lightning_ssiuu.evaluation.suites.base import Log, Reading, Suite, Values
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.utils.console import progress
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.errors import Given, UserError

_SERVED = "test"  # the name under which a data module serves whatever it is given


def suite_sets(data: UnlearningDataModule, readings: Iterable[Reading]) -> dict[str, Sequence[QAExample]]:
    """The sets that readings are about, by name; read once.

    Raises:
        UserError: If the data lack a set or the answers that are asked for, or an example has no text.
    """
    sets: dict[str, Sequence[QAExample]] = {}
    for reading in readings:
        if reading.set not in sets:
            sets[reading.set] = _checked(data.named_set(reading.set), reading.set)
        examples = sets[reading.set]
        _, asked, name = reading.of.partition("/")
        if asked and any(not reading.answers(example) for example in examples):
            raise UserError("data", Given(f"examples without {name} answers in the set {reading.set}"), "data with all")
    return sets


def check_readings(
    data: UnlearningDataModule, sets: Mapping[str, Sequence[QAExample]], readings: Iterable[Reading]
) -> None:
    """Check what :func:`measure_suite` will ask and read, as far as it goes without the model.

    Raises:
        UserError: If an example is too long, or a score lacks what it needs, such as its classifier.
    """
    readings = list(readings)
    for reading, kind in _kinds(readings).items():
        if isinstance(kind, Score):
            check_score(reading.score)
    for group in _by_answers(readings).values():
        asked, _, needs_options = _asked(sets[group[0].set], group)
        needs = {kind.needs for kind in _kinds(group).values() if isinstance(kind, Score)}
        if "choices" in needs and data.choice_template is None:
            raise UserError("data.choice_template", None, "one: the options of a question stand in its prompt")
        if needs_options and not all(example.distractors for example in asked):
            raise UserError("data", Given(f"examples without wrong options in the set {group[0].set}"), "data with all")
        data.encoder.encode(asked, needs_options)


def _checked(examples: Sequence[QAExample], name: str) -> Sequence[QAExample]:
    if not examples:
        raise UserError("data", Given(f"no examples in the set {name}"), "at least one example")
    if blank := [e.name for e in examples if e.blank and not isinstance(e, Chunk)]:  # a chunk may be a text alone
        raise UserError("data", Given(f"blank question or answer in {name}, {name_ids(blank)}"), "non-empty text")
    return examples


def measure_suite(
    model: AnswerModel,
    data: UnlearningDataModule,
    sets: Mapping[str, Sequence[QAExample]],
    suite: Suite,
    names: Sequence[str],
    reference: Log | None = None,
) -> dict[str, dict[str, Any]]:
    """Figures of a suite by name, on every rank; each rank must call it and reads its share of the examples.

    Args:
        model: The model.
        data: Encodes and batches the examples.
        sets: :func:`suite_sets`.
        suite: The suite.
        names: Figures, in the suite's order, each after those it is made of.
        reference: The log of a model that did not see the forget set.
    """
    values: dict[Reading, Values] = {}
    for readings in _by_answers(suite.readings(names)).values():
        values |= read(model, data, sets[readings[0].set], readings)
    log: dict[str, dict[str, Any]] = {}
    for name in names:
        log[name] = suite.figures[name].entry(values, log, reference)
    return log


def read(
    model: AnswerModel, data: UnlearningDataModule, examples: Sequence[QAExample], readings: Sequence[Reading]
) -> dict[Reading, Values]:
    """Values by example of readings about the same answers; a list for an example with a list of answers."""
    kinds = _kinds(readings)
    said = {reading: kind for reading, kind in kinds.items() if isinstance(kind, Score) and kind.generates}
    seen = {reading: kind for reading, kind in kinds.items() if reading not in said}
    asked, owners, needs_options = _asked(examples, readings)
    serving = copy.copy(data)
    serving.multiple_choice = needs_options
    found: dict[Reading, dict[int, float]] = {reading: {} for reading in readings}
    device = next(model.parameters()).device
    taking_gradients = any(isinstance(kind, Signal) and kind.gradient for kind in kinds.values())
    waiting: list[Part] = []
    with untouched(model):
        with torch.set_grad_enabled(taking_gradients):
            for batch in progress(serving.eval_dataloader(_SERVED, asked), "reading"):
                predictions = Predictions(model, data.tokenizer, move_data_to_device(batch[_SERVED], device))
                _keep(found, seen, predictions)
                waiting += [predictions.part] if said else []
        with torch.no_grad():
            for predictions in generating(model, data.tokenizer, waiting):
                _keep(found, said, predictions)
    return {reading: _by_owner(_joined(by_id), owners) for reading, by_id in found.items()}


def _by_answers(readings: Iterable[Reading]) -> dict[str, list[Reading]]:
    # Those that are about the same answers are read off one pass.
    groups: dict[str, list[Reading]] = {}
    for reading in readings:
        groups.setdefault(reading.of, []).append(reading)
    return groups


def _kinds(readings: Iterable[Reading]) -> dict[Reading, Score | Signal]:
    return {reading: find_signal(reading.score) or find_score(reading.score) for reading in readings}


def _asked(
    examples: Sequence[QAExample], readings: Sequence[Reading]
) -> tuple[list[QAExample], list[int | tuple[int, ...]], bool]:
    # One example for each answer, numbered in order; the numbers that belong to each example, one or a list; and
    # whether they need options.
    reading = readings[0]
    with_options = any(isinstance(kind, Score) and kind.needs is not None for kind in _kinds(readings).values())
    asked: list[QAExample] = []
    owners: list[int | tuple[int, ...]] = []
    for example in examples:
        answers = reading.answers(example)
        first = len(asked)
        plain = example if with_options else replace(example, distractors=())
        listed = [example.answer] if answers is None else [answers] if isinstance(answers, str) else list(answers)
        asked += [replace(plain, example_id=first + n, answer=answer) for n, answer in enumerate(listed)]
        several = answers is not None and not isinstance(answers, str)
        owners.append(tuple(range(first, len(asked))) if several else first)
    return asked, owners, with_options


def _keep(
    found: Mapping[Reading, dict[int, float]], kinds: Mapping[Reading, Score | Signal], predictions: Predictions
) -> None:
    for reading, kind in kinds.items():
        values = kind.values(predictions).detach().double().tolist()
        found[reading].update(zip(predictions.part["example_id"].tolist(), values, strict=True))


def _joined(by_id: Mapping[int, float]) -> dict[int, float]:
    return {number: value for share in gathered(dict(by_id)) for number, value in share.items()}


def _by_owner(by_id: Mapping[int, float], owners: Sequence[int | tuple[int, ...]]) -> Values:
    return [[by_id[n] for n in own] if isinstance(own, tuple) else by_id[own] for own in owners]
