"""The one rule for whatever a user names: a registered name, or an import path."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import TypeVar, cast

from lightning_ssiuu.utils.errors import UserError

T = TypeVar("T")


def resolve(name: str, known: Mapping[str, T], argument: str) -> T:
    """What a name stands for: the entry of that name in ``known``, else what lies at that import path.

    Raises:
        UserError: If it is neither, under the name ``argument``. What an existing module raises while it is imported
            comes through as it is.

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
    path, _, attribute = name.rpartition(".")
    why = ""
    if path and all(part.isidentifier() for part in name.split(".")):
        try:
            module = import_module(path)
        except ModuleNotFoundError as error:
            if not f"{path}.".startswith(f"{error.name}."):
                raise  # a module that this one imports
            why = no_module(str(error.name))
        else:
            if hasattr(module, attribute):
                return cast(T, getattr(module, attribute))
            why = f"{path} has no {attribute}"
    elif nearest := get_close_matches(name, known, 1):
        why = f"did you mean {nearest[0]!r}?"
    raise UserError(argument, name, f"one of {list(known)}, or an import path" + (f" ({why})" if why else ""))


def no_module(name: str) -> str:
    """What to say of a module that is found nowhere."""
    return f"no module {name}: run where it lies, or set PYTHONPATH"
