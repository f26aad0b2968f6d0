"""Whatever is named: a registered name or an import path."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import TypeVar

from lightning_ssiuu.utils.errors import UserError

T = TypeVar("T")


def resolve(name: str, known: Mapping[str, T], argument: str) -> T:
    """What a registered name or an import path stands for; modules are looked for in the working directory too.

    Args:
        name: A key of ``known``, or ``package.module.object``.
        known: What is registered.
        argument: Name of the argument as the user wrote it.

    Raises:
        UserError: If it is neither.

    Example:
        >>> resolve("two", {"two": 2}, "number"), resolve("math.e", {"two": 2}, "number") > 2
        (2, True)
    """
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    if not {"", os.getcwd()} & set(sys.path):  # a console script's path has no working directory
        sys.path.append(os.getcwd())
    try:
        return getattr(import_module(module or name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(argument, name, f"one of {sorted(known)}, or an import path ({error})") from error
