"""Run a function as a command of its own, outside LightningCLI."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, get_args, get_type_hints


def run_function(
    function: Callable[..., object], name: str, args: list[str], defaults: Mapping[str, Any] | None = None
) -> Any:
    """Run a function as a command: its parameters are the options, its docstring the help, ``--config`` reads YAML.

    Parameters annotated ``bool``, and those of the classes it takes, may be given as bare flags; one annotated
    ``Devices`` becomes ``--accelerator``, ``--devices``, ``--strategy`` and ``--precision``. ``defaults`` are the
    classes of the command line where the function's own are null. Returns what the function does.
    """
    from jsonargparse import ArgumentParser

    from lightning_ssiuu.cli.config_files import ConfigFileBesideFit, config_files
    from lightning_ssiuu.training.devices import Devices
    from lightning_ssiuu.utils.messages import parsing
    from lightning_ssiuu.utils.processes import end_with_parent
    from lightning_ssiuu.utils.threads import remember_threads

    class Parser(ArgumentParser):
        def parse(self) -> Any:
            config = self.parse_args(given)
            return self.parse() if self._without_defaults(config) else config

        def dump(self, cfg: Any, *args: Any, **options: Any) -> str:  # what --print_config prints
            if self is parser and self._without_defaults(cfg):  # and not that of a class within
                self.parse()  # prints, and ends
            return str(super().dump(_as_given(cfg), *args, **options))

        def _without_defaults(self, config: Any) -> bool:
            # Options of the default class, filled in for it, would stay with another class that has some of their name.
            own = {name: self.get_defaults()[name] for name in defaults or ()}
            others = [name for name, one in own.items() if one and _path(config[name]) != _path(one)]
            self.set_defaults(dict.fromkeys(others))
            return bool(others)

    end_with_parent()
    remember_threads()  # before a module of the user's is imported, which may set another number
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = Parser(prog=f"lightning-ssiuu {name}", exit_on_error=False)
    text = "a YAML file with these options, or a recipe's name; may be given several times"
    parser.add_argument("--config", action=ConfigFileBesideFit, type=config_files, help=text)
    hints = get_type_hints(function)
    devices = next((option for option, hint in hints.items() if Devices in (hint, *get_args(hint))), None)
    parser.add_function_arguments(function, as_positional=False, skip={devices} if devices else None)
    if devices:
        parser.add_class_arguments(Devices)
    parser.set_defaults(dict(defaults or {}))
    flags = {option for option, hint in hints.items() if hint is bool}
    given = _spelled(args, flags)
    with parsing():
        config = parser.parse()
        config = parser.instantiate_classes(config)
    config.pop("config", None)
    options = config.as_dict()
    if devices:
        options[devices] = Devices(**{option: options.pop(option) for option in inspect.signature(Devices).parameters})
    return function(**options)


def _path(config: Any) -> str | None:
    return getattr(config, "class_path", None)


def _as_given(value: Any) -> Any:
    # Defaults that are objects, such as attackers, as a configuration has them.
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if type(value).__name__ == "Namespace":
        return type(value)({name: _as_given(each) for name, each in vars(value).items()})
    return [_as_given(each) for each in value] if isinstance(value, (list, tuple)) else value


def _spelled(args: list[str], flags: set[str]) -> list[str]:
    # Bare flags, also of nested options, with the value that jsonargparse asks for.
    spelled = []
    for arg, after in zip(args, [*args[1:], "--"], strict=False):
        nested = re.fullmatch(r"--\w+(\.\w+)+", arg) and not arg.endswith(".help") and after.startswith("--")
        bare = arg.removeprefix("--") in flags and arg.startswith("--") and after not in ("true", "false")
        spelled.append(f"{arg}=true" if nested or bare else arg)
    return spelled


def bare(args: list[str], name: str, value: str) -> list[str]:
    """The arguments with a value for an option that may be given without one."""
    return [
        f"{arg}={value}" if arg == f"--{name}" and follows.startswith("--") else arg
        for arg, follows in zip(args, [*args[1:], "--"], strict=False)  # without arguments there is nothing
    ]


def positional(args: list[str], name: str) -> list[str]:
    """The arguments with the option that may be given without its name, as the first of them, spelled out."""
    return [f"--{name}", *args] if args and not args[0].startswith("-") else args
