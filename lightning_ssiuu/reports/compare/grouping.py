"""Which runs are one method: those that differ in nothing but the seed; and how to call them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from lightning_ssiuu.reports.compare.reading import Run
from lightning_ssiuu.utils.errors import UserError

_SEEDS = ("seed", "seed_everything")
_LONGEST, _MOST = 44, 3  # of a label, in characters and settings
_DEEPEST = 5  # runs that begin where another ended


def without_seeds(config: Any, root: str, seeds: list[Any], depth: int = 0) -> Any:
    """A run's configuration without what tells it from the same run with another seed.

    Keys named ``seed`` or ``seed_everything`` go, and so does ``default_root_dir``; paths below that directory become
    relative to it. A ``checkpoint`` that is itself the model of a run is replaced by that run's configuration,
    treated likewise: three seeds of a second stage that began from three seeds of a first one are one method.

    Args:
        config: ``config.yaml``'s content, or a part of it.
        root: Its ``trainer.default_root_dir``.
        seeds: Receives the values taken out.
        depth: Of runs that begin where another one ended.

    Example:
        >>> seeds = []
        >>> without_seeds({"seed_everything": 3, "trainer": {"default_root_dir": "runs/a", "logger": "runs/a/log"},
        ...                "data": {"seed": 4, "split_seed": 0}}, "runs/a", seeds)
        {'trainer': {'logger': '<run>/log'}, 'data': {'split_seed': 0}}
        >>> seeds
        [3, 4]
    """
    if isinstance(config, dict):
        kept = {}
        for key, value in config.items():
            if key in _SEEDS:
                seeds.append(value)
            elif key == "checkpoint" and isinstance(value, str) and (earlier := _earlier(value, depth)) is not None:
                kept[key] = without_seeds(earlier, _root(earlier), seeds, depth + 1)
            elif key != "default_root_dir":
                kept[key] = without_seeds(value, root, seeds, depth)
        return kept
    if isinstance(config, list):
        return [without_seeds(value, root, seeds, depth) for value in config]
    if isinstance(config, str) and root and (config == root or config.startswith(root.rstrip("/") + "/")):
        return "<run>" + config[len(root.rstrip("/")) :]
    return config


def _earlier(checkpoint: str, depth: int) -> dict[str, Any] | None:
    run = Path(checkpoint).parent
    if depth >= _DEEPEST or not Path(checkpoint).is_dir() or not (run / "metrics.json").is_file():
        return None
    try:
        content = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def _root(config: dict[str, Any]) -> str:
    trainer = config.get("trainer")
    return str(trainer.get("default_root_dir") or "") if isinstance(trainer, dict) else ""


def group_by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Put runs together that differ in nothing but the seed, in the order of each group's first run.

    Raises:
        UserError: If two runs have the same configuration and the same seeds: counted twice, a spread over training
            seeds would be too small.

    Example:
        >>> def run(path, seed, rate):
        ...     config = {"seed_everything": seed, "trainer": {"default_root_dir": path}, "model": {"lr": rate}}
        ...     return Run(Path(path), {"objective": "NPO"}, config, {}, {}, {})
        >>> groups = group_by_seed([run("runs/a", 0, 1e-4), run("runs/b", 0, 1e-3), run("runs/c", 1, 1e-4)])
        >>> [[one.path.name for one in group] for group in groups]
        [['a', 'c'], ['b']]
    """
    groups: dict[str, list[Run]] = {}
    seen: dict[str, Path] = {}
    for run in runs:
        seeds: list[Any] = []
        key = run.metrics["objective"] + _text(without_seeds(run.config, _root(run.config), seeds))
        groups.setdefault(key, []).append(run)
        if run.config.get("seed_everything", False) is False or run.config["seed_everything"] is None:
            continue  # never seeded: no two such runs are the same
        if (other := seen.setdefault(key + _text(seeds), run.path)) is not run.path:
            raise UserError("runs", str(run.path), f"one run per seed: {other} has the same configuration and seed")
    return list(groups.values())


def labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """A name for each group: its objective and, among several with the same one, the settings that tell them apart.

    Where these would be long, the name of the run directory takes their place.

    Example:
        >>> def run(path, weight):
        ...     return Run(Path(path), {"objective": "SSIUU"}, {"model": {"weight": weight}}, {}, {}, {})
        >>> labels([[run("runs/a", 0.1)], [run("runs/b", 1.0)]])
        ['SSIUU, weight=0.1', 'SSIUU, weight=1.0']
    """
    names = [str(group[0].metrics["objective"]) for group in groups]
    places = _places(groups)
    found = []
    for index, (objective, place) in enumerate(zip(names, places, strict=True)):
        alike = [i for i, name in enumerate(names) if name == objective]
        label = objective
        if len(alike) > 1:
            configs = [without_seeds(groups[i][0].config, _root(groups[i][0].config), []) for i in alike]
            told = differences(configs)[alike.index(index)]
            label = ", ".join([objective, *told.values()])
            if len(told) > _MOST or len(label) > _LONGEST:
                label = f"{objective} ({place})"
        found.append(label)
    return [
        f"{label} ({place})" if found.count(label) > 1 and not label.endswith(f"({place})") else label
        for label, place in zip(found, places, strict=True)
    ]


def _places(groups: Sequence[Sequence[Run]]) -> list[str]:
    """What tells the groups' directories apart."""
    paths = [[os.path.abspath(run.path) for run in group] for group in groups]
    common = os.path.commonpath([os.path.dirname(path) for group in paths for path in group])
    places = []
    for group in paths:
        relative = [os.path.relpath(path, common) for path in group]
        alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*relative, strict=False))
        shared = "".join(letters[0] for letters in alike) if len(relative) > 1 else relative[0]
        places.append(shared.strip("/\\-_. ") or relative[0])
    return places


def differences(configs: Sequence[Any], name: str = "") -> list[dict[str, str]]:
    """What each configuration has that not all have: ``{key: "key=value"}``, of classes their names.

    Args:
        configs: Configurations or the same part of each; a class is ``{class_path, init_args}``.
        name: Key of that part.

    Example:
        >>> plain = {"model": {"class_path": "NPO", "init_args": {"beta": 0.1, "regularizer": None}}}
        >>> other = {"model": {"class_path": "NPO", "init_args": {"beta": 0.5, "regularizer": {"class_path": "a.L2"}}}}
        >>> differences([plain, other])
        [{'beta': 'beta=0.1'}, {'beta': 'beta=0.5', 'regularizer': 'L2'}]
    """
    if len({_text(config) for config in configs}) == 1:
        return [{} for _ in configs]
    classes = [_class(config) for config in configs]
    if any(classes) and len(set(classes)) > 1:
        return [{name: one} if one else {} for one in classes]
    if not all(isinstance(config, dict) for config in configs):
        return [{name: f"{name}={_short(config)}"} for config in configs]
    told: list[dict[str, str]] = [{} for _ in configs]
    for key in dict.fromkeys(key for config in configs for key in config):
        inner = differences([config.get(key) for config in configs], name if key == "init_args" else str(key))
        for mine, more in zip(told, inner, strict=True):
            mine |= {f"{name}.{one}" if one in mine else one: text for one, text in more.items()}
    return told


def _class(config: Any) -> str:
    return str(config.get("class_path", "")).rpartition(".")[2] if isinstance(config, dict) else ""


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "..."
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if _plain(value) else _text(value)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, str))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
