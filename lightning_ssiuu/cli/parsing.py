"""Run a function as a command of its own, outside LightningCLI."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable


def run_function(function: Callable[..., object], name: str, args: list[str]) -> None:
    """Run a function as a command: its parameters are the options, its docstring the help, ``--config`` reads YAML.

    Args:
        function: The command; parameters annotated ``bool`` may be given as bare flags.
        name: The command's name.
        args: Command-line arguments after the name.

    Example:
        >>> def greet(name: str, loud: bool = False):
        ...     print(name.upper() if loud else name)
        >>> run_function(greet, "greet", ["--name", "you", "--loud"])
        YOU
    """
    from jsonargparse import ArgumentParser

    from lightning_ssiuu.utils.processes import end_with_parent

    end_with_parent()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = ArgumentParser(prog=f"lightning-ssiuu {name}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file with these options; may be given several times")
    parser.add_function_arguments(function, as_positional=False)
    flags = {f"--{p.name}" for p in inspect.signature(function).parameters.values() if p.annotation in (bool, "bool")}
    following = [*args[1:], "--"]
    spelled = [
        f"{arg}=true" if arg in flags and after not in ("true", "false") else arg
        for arg, after in zip(args, following, strict=False)
    ]
    config = parser.instantiate_classes(parser.parse_args(spelled))
    config.pop("config", None)
    function(**config.as_dict())
