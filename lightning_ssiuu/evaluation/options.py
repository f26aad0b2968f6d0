"""Options in a name: ``probability(eos=false)`` is the score ``probability`` with one option set."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.reading import load_yaml, reading

T = TypeVar("T")
_NAMED = re.compile(r"(?P<name>[^()]+)\((?P<options>.*)\)", re.DOTALL)
_OPTION = re.compile(r'\s*(?P<key>\w+)\s*=\s*(?P<value>"(?:[^"\\]|\\.)*"|[^,()"]+?)\s*(?:,|$)', re.DOTALL)
_FORM = "options as name(option=value, ...), each once, and in a list the whole in quotes"


def split_options(name: str, argument: str = "scores") -> tuple[str, dict[str, Any]]:
    """A name without its options, and these: values in YAML, in double quotes where they have commas or brackets.

    Raises:
        UserError: Brackets that are no options.

    Example:
        >>> split_options("rouge_l(measure=f1, stemmed=true, new_tokens=32)")
        ('rouge_l', {'measure': 'f1', 'stemmed': True, 'new_tokens': 32})
        >>> split_options("probability")
        ('probability', {})
    """
    if not {"(", ")"} & set(name):
        return name, {}
    named, options = _NAMED.fullmatch(name), dict[str, Any]()
    rest = "" if named is None else named["options"]
    while rest:
        option = _OPTION.match(rest)
        if option is None or option["key"] in options:
            break
        with reading(argument, name, "options whose values are YAML"):
            options[option["key"]] = load_yaml(option["value"])
        rest = rest[option.end() :]
    if named is None or rest or not options:
        raise UserError(argument, name, _FORM)
    return named["name"], options


def made_with(make: Callable[..., T] | None, options: dict[str, Any], name: str, argument: str = "scores") -> T:
    """What ``make`` gives with options, checked against its parameters and their types.

    Raises:
        UserError: Options that it does not take, or of another type or range; about ``argument``.
    """
    from jsonargparse import ArgumentParser  # slow to import

    if make is None:
        raise UserError(argument, name, f"{name.partition('(')[0]}, which takes no options")
    known, hints = inspect.signature(make).parameters, get_type_hints(make)
    allowed = f"{name.partition('(')[0]} with any of these options: "
    allowed += ", ".join(f"{key}={_shown(parameter.default, hints[key])}" for key, parameter in known.items())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(make)
    try:
        return make(**parser.parse_object(options).as_dict())
    except UserError as error:
        raise UserError(argument, name, f"{allowed}; {error.argument}: {error.allowed}") from error
    except Exception as error:  # a name or type that is none of its parameters'
        raise UserError(argument, name, allowed) from error


def _shown(default: Any, kind: Any) -> str:
    others = [choice for choice in get_args(kind) if get_origin(kind) is Literal and choice != default]
    return " or ".join([default if isinstance(default, str) else json.dumps(default), *others])
