"""``--config``: files, recipes by name, and files that build on others by a ``config:`` of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile

from lightning_ssiuu.cli.recipes import config_file
from lightning_ssiuu.utils.errors import Given, UserError
from lightning_ssiuu.utils.reading import load_yaml

_KEY = "config"
#: Sections and options of ``fit`` that no other command has.
_OF_FIT = ("attribution", "stopping", "saving", "report", "checkpoints", "trainer")
_OF_RUNS = ("seed_everything", "ckpt_path", "weights_only", "estimate_memory")


class ConfigFile(ActionConfigFile):
    """The option ``--config``, given with ``type=config_files``: what it names is applied in order."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            self.apply_config(parser, cfg, self.dest, value)


class ConfigFileBesideFit(ConfigFile):
    """The same for other commands than ``fit``: what a file says of a run alone is passed over."""

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: Any) -> None:
        content = _content(Path(value).expanduser()) if isinstance(value, str) else None
        if isinstance(content, dict):
            own = {name: part for name, part in content.items() if not _of_a_run(name, part)}
            if "trainer" in content:  # what a run may replace, another command may not
                own.pop("overwrite", None)
            value = value if own == content else yaml.safe_dump(own)
        ConfigFile.apply_config(parser, cfg, dest, value)


def _of_a_run(name: str, part: Any) -> bool:
    # What these commands call a model is its name.
    section = isinstance(part, Mapping)
    return name in _OF_RUNS or (name in _OF_FIT and (section or part is None)) or (name == "model" and section)


def config_files(value: Any) -> Any:
    """Everything that one ``--config`` stands for: what its file builds on, base first, and the file itself.

    A file may name others under ``config``, one or a list, as files beside it or as recipes; that is the same as giving
    these before it on the command line. What is no file is left as it is.

    Raises:
        UserError: If a name is that of no file and no recipe, or files build on each other in a circle.

    Example:
        >>> [Path(file).name for file in config_files("model/tiny")]
        ['tiny.yaml']
    """
    return _with_bases(config_file(value), ())


def _with_bases(value: Any, above: Sequence[str]) -> list[Any]:
    # jsonargparse replaces whole sections where a file names another; applied one by one they are merged key by key.
    if not isinstance(value, str) or not os.path.isfile(path := os.path.expanduser(value)):
        return [value]  # a text in YAML, or what can be read once only
    if (whole := os.path.realpath(path)) in above:
        raise UserError(_KEY, value, "files that do not name each other in a circle")
    found: list[Any] = []
    for name in _named(Path(path)):
        if not isinstance(name, str):
            raise UserError(
                _KEY, Given(f"a {type(name).__name__} in {value}"), "a name under config, or a list of names"
            )
        beside = os.path.join(os.path.dirname(path), os.path.expanduser(name))
        found += _with_bases(beside if os.path.isfile(beside) else config_file(name), [*above, whole])
    return [*found, value]


def _named(path: Path) -> list[Any]:
    content = _content(path)
    names = content.get(_KEY) if isinstance(content, dict) else None
    return names if isinstance(names, list) else [] if names is None else [names]


def _content(path: Path) -> Any:
    try:
        return load_yaml(path.read_text(encoding="utf-8-sig"))
    except Exception:  # told by whoever reads all of it
        return None
