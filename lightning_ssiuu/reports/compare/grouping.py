"""Which runs are one method: those that differ in nothing but the seed; and how to call them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning_ssiuu.evaluation.results import read_config
from lightning_ssiuu.reports.compare.reading import Run
from lightning_ssiuu.utils.errors import UserError

_SEEDS = ("seed", "seed_everything")
_LONGEST, _MOST = 44, 3  # of a label, in characters and settings
_ROWS = ("original", "oracle")  # what other rows are called
_ABSENT = object()
_DEEPEST = 5  # runs that begin where another ended


def without_seeds(config: Any, root: str, seeds: list[Any], depth: int = 0) -> Any:
    """A run's configuration without what tells it from the same run with another seed.

    Keys named ``seed`` or ``seed_everything`` go (their values into ``seeds``), and so does ``default_root_dir``; paths
    below that directory, ``root``, become relative to it. A ``checkpoint`` that is itself the model of a run is
    replaced by that run's configuration, treated likewise: three seeds of a second stage that began from three seeds
    of a first one are one method.
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
        return read_config(run, "runs")
    except UserError:
        return None


def _root(config: dict[str, Any]) -> str:
    trainer = config.get("trainer")
    return str(trainer.get("default_root_dir") or "") if isinstance(trainer, dict) else ""


def group_by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Put runs together that differ in nothing but the seed, in the order of each group's first run.

    Two runs with the same configuration and the same seeds are refused: counted twice, a spread over training seeds
    would be too small.
    """
    groups: dict[str, list[Run]] = {}
    seen: dict[str, Path] = {}
    for run in runs:
        seeds: list[Any] = []
        # Without a configuration nobody knows what it has in common with others.
        config = without_seeds(run.config, _root(run.config), seeds) if run.config else str(run.path.resolve())
        key = run.metrics["objective"] + _text(config)
        groups.setdefault(key, []).append(run)
        seed = run.config.get("seed_everything")
        if seed is None or seed is False:
            continue  # never seeded: no two such runs are the same
        if (other := seen.setdefault(key + _text(seeds), run.path)) is not run.path:
            raise UserError("runs", str(run.path), f"one run per seed: {other} has the same configuration and seed")
    return list(groups.values())


def labels(groups: Sequence[Sequence[Run]], given: Mapping[Path, str] | None = None) -> list[str]:
    """A name for each group: its objective and, among several with the same one, the settings that tell them apart.

    Of many settings the first are shown; where these do not tell groups apart, the run directories do. A name ``given``
    to a run (by its resolved path) is its group's.

    Raises:
        UserError: If two names are given for one group, or one for two.
    """
    names = [str(group[0].metrics["objective"]) for group in groups]
    configs = [without_seeds(group[0].config, _root(group[0].config), []) for group in groups]
    places = _places(groups)
    found = []
    for index, objective in enumerate(names):
        alike = [i for i, name in enumerate(names) if (name, not configs[i]) == (objective, not configs[index])]
        settings = differences([configs[i] for i in alike])[alike.index(index)]
        shown = [objective]
        for setting in list(settings.values())[:_MOST]:
            if len(", ".join([*shown, setting])) > _LONGEST:
                break
            shown.append(setting)
        found.append(", ".join([*shown, *(["…"] if len(shown) <= len(settings) else [])]))
    found = [
        f"{label} ({place})" if found.count(label) > 1 and not label.endswith(f"({place})") else label
        for label, place in zip(found, places, strict=True)
    ]
    for index, group in enumerate(groups):
        own = {name for run in group if (name := (given or {}).get(run.path.resolve())) is not None}
        if len(own) > 1:
            raise UserError("label", " and ".join(sorted(own)), "one name for runs that differ in nothing but the seed")
        found[index] = next(iter(own), found[index])
    if given and (twice := [label for label in found if found.count(label) > 1 or label in _ROWS]):
        raise UserError("label", twice[0], "a name that no other row has")
    return found


def settings_of_each(groups: Sequence[Sequence[Run]]) -> list[dict[str, str]]:
    """All options that are not the same in all groups' ``config.yaml``, seeds and run directories aside.

    Of different objectives, whatever options they have.
    """
    configs = []
    for group in groups:
        config = without_seeds(group[0].config, _root(group[0].config), [])
        model = config.get("model")
        if isinstance(model, dict) and isinstance(model.get("init_args"), dict):
            config = config | {"model": model["init_args"]}
        configs.append(config)
    known = iter(differences([config for config in configs if config], deep=True))
    return [next(known) if config else {} for config in configs]


def _places(groups: Sequence[Sequence[Run]]) -> list[str]:
    # What tells the groups' directories apart.
    paths = [[os.path.abspath(run.path) for run in group] for group in groups]
    common = os.path.commonpath([os.path.dirname(path) for group in paths for path in group])
    places = []
    for group in paths:
        relative = [os.path.relpath(path, common) for path in group]
        alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*relative, strict=False))
        shared = "".join(letters[0] for letters in alike) if len(relative) > 1 else relative[0]
        places.append(shared.strip("/\\-_. ") or relative[0])
    return places


def differences(configs: Sequence[Any], name: str = "", deep: bool = False) -> list[dict[str, str]]:
    """What each configuration has that not all have: ``{key: "key=value"}``, of classes their names.

    ``configs`` may be the same part of each, ``name`` its key; a class is ``{class_path, init_args}``. With
    ``deep`` the options of different classes count, too.
    """
    if len({_text(config) for config in configs}) <= 1:
        return [{} for _ in configs]
    if any(config is _ABSENT for config in configs):
        there = iter(differences([config for config in configs if config is not _ABSENT], name, deep))
        return [{} if config is _ABSENT else next(there) or {name: _named(name, config)} for config in configs]
    classes = [_class(config) for config in configs]
    if any(classes) and len(set(classes)) > 1:
        kinds = [{name: kind} if kind else {} for kind in classes]
        options = [
            (config.get("init_args") or _ABSENT) if kind else _ABSENT
            for kind, config in zip(classes, configs, strict=True)
        ]
        return (
            [own | more for own, more in zip(kinds, differences(options, name, deep), strict=True)] if deep else kinds
        )
    if not all(isinstance(config, dict) for config in configs):
        return [{name: _named(name, config)} for config in configs]
    found: list[dict[str, str]] = [{} for _ in configs]
    for key in dict.fromkeys(key for config in configs for key in config):
        inner = differences(
            [config.get(key, _ABSENT) for config in configs], name if key == "init_args" else str(key), deep
        )
        for settings, more in zip(found, inner, strict=True):
            settings |= {f"{name}.{part}" if part in settings else part: text for part, text in more.items()}
    return found


def _class(config: Any) -> str:
    return str(config.get("class_path", "")).rpartition(".")[2] if isinstance(config, dict) else ""


def _named(name: str, value: Any) -> str:
    return _class(value) or f"{name}={_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "..."
    return value if isinstance(value, str) else _text(value)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
