"""What of a run's configuration everybody may read: classes, numbers and choices; no path, text or id."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning_ssiuu.evaluation.chance import Level
from lightning_ssiuu.evaluation.scores import SCORES
from lightning_ssiuu.utils.registry import lookup

#: Whose classes are named; those of the user's may be called by what they hold.
_PUBLIC = ("lightning_ssiuu.", "torch.", "lightning.", "transformers.")
#: Of the Trainer's options, those on which the weights depend.
_TRAINER = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val")
_PRECISION = re.compile(r"(bf)?\d\d(-(true|mixed))?")
_NOTHING: Any = object()


def class_name(section: Any) -> str:
    """The class of a configuration's section by its own name; ``own data`` where it is not one of a library.

    Example:
        >>> class_name({"class_path": "lightning_ssiuu.TOFU"}), class_name({"class_path": "patients.Smith"})
        ('TOFU', 'own data')
    """
    path = section.get("class_path") if isinstance(section, Mapping) else None
    return path.rpartition(".")[2] if isinstance(path, str) and path.startswith(_PUBLIC) else "own data"


def shown_settings(config: Mapping[str, Any], base: str | None = None) -> dict[str, Any]:
    """The part of a ``config.yaml`` that tells how a model was made and nothing of whom it was made to forget.

    True and false, numbers where an option's annotation asks for a number, words that it lists as choices, and names of
    libraries' classes stay; what is the class's default, and all else, goes: a number may be an id, where text may
    stand as well.

    Args:
        config: The configuration.
        base: The checkpoint, where it may be named.

    Returns:
        A configuration that ``fit`` takes, in plain values; what it lacks is the user's to give.

    Example:
        >>> options = {"checkpoint": "/data/model", "retain_weight": 5.0, "retain": "kl"}
        >>> shown_settings({"seed_everything": 0, "model": {"class_path": "lightning_ssiuu.NPO", "init_args": options}})
        {'seed_everything': 0, 'model': {'class_path': 'lightning_ssiuu.NPO', 'init_args': {'retain_weight': 5.0, \
'retain': 'kl'}}}
    """
    shown: dict[str, Any] = {}
    if isinstance(seed := config.get("seed_everything"), int):
        shown["seed_everything"] = seed
    for name in ("model", "data"):
        shown[name] = _shown(config.get(name))
    if base is not None and shown["model"] is not _NOTHING:
        shown["model"].setdefault("init_args", {})["checkpoint"] = base
    trainer, stopping = config.get("trainer") or {}, config.get("stopping") or {}
    score = stopping.get("score")
    shown["trainer"] = {name: trainer[name] for name in _TRAINER if isinstance(trainer.get(name), int | float)}
    if _PRECISION.fullmatch(str(trainer.get("precision"))):
        shown["trainer"]["precision"] = trainer["precision"]
    shown["stopping"] = {"score": score} if isinstance(score, str) and score in SCORES else {}
    level = stopping.get("threshold", _NOTHING)
    if level is None or isinstance(level, int | float) or level in get_args(Level):
        shown["stopping"]["threshold"] = level
    return {name: section for name, section in shown.items() if section not in ({}, _NOTHING)}


def _shown(value: Any, hint: Any = None) -> Any:
    kinds = _kinds(hint)
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if _is_of_numbers(kinds) or value in _choices(hint) else _NOTHING
    if isinstance(value, str):
        return value if value in _choices(hint) else _NOTHING
    if isinstance(value, list):
        inner = [[each for part in get_args(kind) for each in _kinds(part)] for kind in kinds]
        listed = all(isinstance(each, int | float) for each in value) and any(map(_is_of_numbers, inner))
        return value if value and listed else _NOTHING
    if not isinstance(value, Mapping):
        return _NOTHING
    if "class_path" not in value:
        record = next((kind for kind in kinds if is_dataclass(kind)), None)
        return _options(value, record) or _NOTHING
    path = value["class_path"]
    if not isinstance(path, str) or not path.startswith(_PUBLIC):
        return _NOTHING
    options = _options(value.get("init_args") or {}, lookup(path))
    return {"class_path": path} | ({"init_args": options} if options else {})


def _options(given: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    # Of a class's options those that may be shown: none that it does not have, whose name may be data.
    options = {}
    for name, (hint, default) in _parameters(kind).items():
        if name in given and given[name] != default and (shown := _shown(given[name], hint)) is not _NOTHING:
            options[name] = shown
    return options


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_of_numbers(kinds: Iterable[Any]) -> bool:
    # What may be text as well may be an id.
    return bool({int, float} & set(kinds)) and str not in kinds


def _choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for part in get_args(hint) for choice in _choices(part))


def _parameters(kind: Any) -> dict[str, tuple[Any, Any]]:
    # Annotation and default of every constructor argument, also of those handed on to a base class.
    found: dict[str, tuple[Any, Any]] = {}
    for base in reversed(inspect.getmro(kind)) if inspect.isclass(kind) else ():
        if (init := vars(base).get("__init__")) is None:
            continue
        hints: dict[str, Any] = {}
        with suppress(Exception):  # names that are only there for type checkers: then no word counts as a choice
            hints = get_type_hints(init)
        for name, parameter in inspect.signature(init).parameters.items():
            found[name] = (hints.get(name), list(d) if isinstance(d := parameter.default, tuple) else d)
    return found
