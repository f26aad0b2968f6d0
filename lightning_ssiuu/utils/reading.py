"""Foreign files: whatever reading one raises is a mistake of the user's, told in one line under its argument."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lightning_ssiuu.utils.errors import UserError, one_line

_MOST_VALUES = 1_000_000


@contextmanager
def reading(argument: str, value: object, allowed: str, quote: bool = True) -> Iterator[None]:
    """Inside, anything that reading what a user named raises is a UserError about ``argument``.

    Libraries raise what they like at a file that is not what they expect, so nothing is picked out here but our own
    errors, which say more. ``quote`` adds the reason in the library's words; False where those may hold data-set text.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # RecursionError, MemoryError, and what Rust raises, which is no Exception
        raise UserError(argument, value, f"{allowed} ({reason(error)})" if quote else allowed) from None


def reason(error: BaseException) -> str:
    """What an exception says, on one line of at most 200 characters; its type's name where it says nothing."""
    kind = type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = one_line(next(iter(str(error).strip().splitlines()), ""))[:200]
    return f"{kind}: {said}" if isinstance(error, (LookupError, AttributeError)) and said else said or kind


def load_yaml(text: Any, load: Callable[[Any], Any] = yaml.safe_load) -> Any:
    """What a text in YAML says; whatever is wrong with it is a ``yaml.YAMLError``.

    Aliases may make a few lines stand for billions of values, or for themselves; what would be larger than a million
    values once it is written out is refused.
    """
    try:
        content = load(text)
        if _size(content, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST_VALUES} values")
    except yaml.YAMLError:
        raise
    except Exception as error:  # too deep, a number of too many digits, a date that is none, ...
        raise yaml.YAMLError(reason(error)) from None
    return content


def _size(content: Any, known: dict[int, float]) -> float:
    # Number of values, those that several aliases stand for counted as often; infinite where one holds itself.
    if not isinstance(content, (dict, list, tuple)):
        return 1
    if id(content) not in known:
        known[id(content)] = math.inf
        inner = [*content, *content.values()] if isinstance(content, dict) else content
        known[id(content)] = 1 + sum(_size(value, known) for value in inner)
    return known[id(content)]


def read_json(
    path: str | os.PathLike[str],
    argument: str,
    kind: type = dict,
    allowed: str | None = None,
    check: Callable[[Any], object] | None = None,
) -> Any:
    """Content of a JSON file that must be a ``kind``; a UserError otherwise, which quotes nothing of the content.

    ``allowed`` is what is told of the file where that is more than valid JSON; what ``check`` raises is told so too.
    """
    allowed = allowed or f"valid JSON in {Path(path).name}, {'an object' if kind is dict else 'a list'}"
    with reading(argument, os.fspath(path), allowed, quote=False):
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        only(kind, content)
        if check is not None:
            check(content)
    return content


def read_yaml(path: str | os.PathLike[str], argument: str, allowed: str | None = None) -> dict[str, Any]:
    """Content of a YAML file that must be a mapping; a UserError otherwise."""
    with reading(argument, os.fspath(path), allowed or f"valid YAML in {Path(path).name}, a mapping", quote=False):
        content = load_yaml(Path(path).read_text(encoding="utf-8-sig"))
        only(dict, content)
    return content


def only(kind: type | tuple[type, ...], *values: object) -> None:
    """Raise a TypeError unless all values are of a kind: for checks of what was read."""
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"expected {kind}, got {type(value)}")
