"""Options in a name: ``probability(eos=false)`` is the score ``probability`` with one option set."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.reading import load_yaml, reading

T = TypeVar("T")
_NAMED = re.compile(r"(?P<name>[^()]+)\((?P<options>[^()]*)\)", re.DOTALL)


def split_options(name: str, argument: str = "scores") -> tuple[str, dict[str, Any]]:
    """A name without its options, and these: values in YAML, with commas between them.

    Raises:
        UserError: Brackets that are no options.

    Example:
        >>> split_options("rouge_l(measure=f1, stemmed=true, new_tokens=32)")
        ('rouge_l', {'measure': 'f1', 'stemmed': True, 'new_tokens': 32})
        >>> split_options("probability")
        ('probability', {})
    """
    named = _NAMED.fullmatch(name)
    if named is None:
        return name, {}
    options: dict[str, Any] = {}
    for pair in named["options"].split(","):
        key, sign, value = pair.partition("=")
        if not (sign and key.strip().isidentifier()) or key.strip() in options:
            raise UserError(argument, name, "options as name(option=value, ...), each once")
        with reading(argument, name, "options whose values are YAML"):
            options[key.strip()] = load_yaml(value.strip())
    return named["name"], options


def made_with(make: Callable[..., T] | None, options: dict[str, Any], name: str, argument: str = "scores") -> T:
    """What ``make`` gives with options, checked against its parameters and their types.

    Raises:
        UserError: Options that it does not take, or of another type or range; about ``argument``.
    """
    from jsonargparse import ArgumentParser  # slow to import

    if make is None:
        raise UserError(argument, name, f"{name.partition('(')[0]}, which takes no options")
    known = {key: parameter.default for key, parameter in inspect.signature(make).parameters.items()}
    allowed = f"{name.partition('(')[0]} with any of these options: "
    allowed += ", ".join(f"{key}={_shown(value)}" for key, value in known.items())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(make)
    try:
        return make(**parser.parse_object(options).as_dict())
    except UserError as error:
        raise UserError(argument, name, f"{allowed}; {error.argument}: {error.allowed}") from error
    except Exception as error:  # a name or type that is none of its parameters'
        raise UserError(argument, name, allowed) from error


def _shown(default: Any) -> str:
    return default if isinstance(default, str) else json.dumps(default)
