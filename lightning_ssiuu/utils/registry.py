"""The one rule for whatever a user names: a registered name, or an import path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import TypeVar, cast

from lightning_ssiuu.utils.errors import UserError, one_line
from lightning_ssiuu.utils.extras import EXTRAS, installing

T = TypeVar("T")
_LONGEST, _LONGEST_NAME = 300, 100


def resolve(name: str, known: Mapping[str, T], argument: str) -> T:
    """What a name stands for: the entry of that name in ``known``, else what lies at that import path.

    Raises:
        UserError: If it is neither, under the name ``argument``; it says what a module raised while it was imported.

    Example:
        >>> resolve("math.pi", {}, "score")
        3.141592653589793
        >>> resolve("probabilty", {"probability": 1, "rouge_l": 2}, "score")
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: score: got 'probabilty', allowed: one of ['probability', 'rouge_l'], or an import \
path (did you mean 'probability'?)
    """
    if name in known:
        return known[name]
    found, why = _import(name)
    if not why and found is not None:
        return cast(T, found)
    if "." not in name:
        why = nearest(name, known)
    raise UserError(argument, name, f"one of {list(known)}, or an import path" + (f" ({why})" if why else ""))


def lookup(name: str) -> object:
    """What lies at an import path; None where nothing does, or a module raises while it is imported."""
    return _import(name)[0]


def why_not_found(name: str) -> str:
    """Why nothing can be imported from a path, in one line; empty if something can, or if it is no import path."""
    return _import(name)[1]


def _import(name: str) -> tuple[object, str]:
    # What lies at an import path, or why nothing does.
    path, _, attribute = name.rpartition(".")
    if not path or not all(part.isidentifier() for part in name.split(".")):
        return None, ""
    try:
        module = import_module(path)
    except Exception as error:  # the user's module may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
            return None, no_module(str(error.name))
        return None, shortened(f"{path} cannot be imported: {type(error).__name__}: {error}")
    if hasattr(module, attribute):
        return getattr(module, attribute), ""
    public = [other for other in dir(module) if not other.startswith("_")]
    return None, f"{path} has no {attribute}" + (f": {meant}" if (meant := nearest(attribute, public)) else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """Which of the names known was perhaps meant, as a question; empty where none resembles what was given."""
    names = sorted(known)
    if len(name) > _LONGEST_NAME:
        return ""
    folded = {other.casefold(): other for other in names}
    found = get_close_matches(name.casefold(), folded, 1)
    if not found and len(name) > 2:
        found = [other for other in folded if other.startswith(name.casefold())]
    return f"did you mean {folded[found[0]]!r}?" if found else ""


def no_module(name: str) -> str:
    """What to say of a module that is found nowhere."""
    if name in EXTRAS:
        return f"no module {name}: {installing(name)}"
    return f"no module {name}: run where it lies, or set PYTHONPATH"


def shortened(text: str) -> str:
    """Another's message as part of one line: without line breaks and control characters, and not too long."""
    return one_line(text)[:_LONGEST]
