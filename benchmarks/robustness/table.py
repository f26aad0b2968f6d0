"""The table of objectives: what is tried of each, and how ``fit`` is told."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

LEARNING_RATE = "model.init_args.optimizer.init_args.lr"
RETAIN_WEIGHT = "model.init_args.retain_weight"
TABLE = Path(__file__).parent / "objectives.yaml"
_KEYS = {"like", "recipes", "then", "options", "strength", "match", "before"}


@dataclass(frozen=True)
class Setting:
    """One setting of an objective: its name, and the options that differ from the objective's own."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Before:
    """A fit that comes first: ``recipes``, which the model's follows, and options."""

    recipes: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Objective:
    """An entry of the table, for one model.

    ``then`` are recipes that are given after the model's. ``matched`` says whether it ends at the others' forget score.
    ``before`` is the fit whose model it starts from, in place of the learned one.
    """

    name: str
    recipes: tuple[str, ...]
    then: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    strength: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    matched: bool = True
    before: Before | None = None

    def settings(self, search: Sequence[float], model_recipe: str) -> list[Setting]:
        """What is tried: as many settings for every objective, ``search`` being factors on the learning rate.

        Those of an objective with strengths to try are the first ones of ``search``, each with every strength.
        """
        strengths = [
            dict(zip(self.strength, values, strict=True)) for values in itertools.product(*self.strength.values())
        ]
        if len(search) % len(strengths):
            raise SystemExit(
                f"{self.name}: {len(strengths)} strengths do not divide the {len(search)} settings of a search"
            )
        base = float(self.value(LEARNING_RATE, model_recipe))
        found = []
        for factor, strength in itertools.product(search[: len(search) // len(strengths)], strengths):
            options = {LEARNING_RATE: float(f"{base * factor:.4g}")} | strength
            name = "_".join(f"{key.rpartition('.')[2]}{value:g}" for key, value in options.items())
            found.append(Setting(name, options))
        return found

    def value(self, name: str, model_recipe: str) -> Any:
        """An option as ``fit`` will find it without a setting; None where no recipe has it."""
        merged: dict[str, Any] = {}
        for recipe in (*self.recipes, model_recipe, *self.then):
            merged |= _flat(yaml.safe_load(Path(recipe).read_text(encoding="utf-8")) or {})
        return (merged | _flat(self.options)).get(name)


def objectives(names: Sequence[str], model: str) -> list[Objective]:
    """Entries of the table by name, or a recipe of one's own by its path."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    found = []
    for name in names:
        if name not in table and Path(name).is_file():
            found.append(Objective(Path(name).stem, (name,)))
            continue
        if name not in table:
            raise SystemExit(f"--objectives: got {name!r}, allowed: the path of a recipe, {', '.join(table)}")
        entry = table[name]
        recipes = _paths(entry.get("recipes", [name]))
        then = tuple(entry.get("then", ()))
        own = entry.get(Path(model).stem, {})
        strength = own.get("strength", entry.get("strength", {}))
        options = entry.get("options", {}) | {key: value for key, value in own.items() if key != "strength"}
        unknown = [key for key in entry if key not in _KEYS and not Path(f"recipes/model/{key}.yaml").is_file()]
        if unknown:
            raise SystemExit(
                f"{TABLE.name}: {name}: {unknown[0]!r} is neither one of {sorted(_KEYS)} nor a model's recipe"
            )
        before = None
        if (first := entry.get("before")) is not None:
            before = Before(_paths(first.get("recipes", ["fine_tuning"])), first.get("options", {}))
        if "like" in entry:
            if own_keys := _KEYS.intersection(entry) - {"like", "options", "before"}:
                raise SystemExit(f"{TABLE.name}: {name}: got {min(own_keys)} beside like, allowed: options and before")
            (other,) = objectives([entry["like"]], model)
            found.append(replace(other, name=name, options=other.options | options, before=before or other.before))
            continue
        found.append(Objective(name, recipes, then, options, strength, entry.get("match", True), before))
    return found


def _paths(recipes: Sequence[str]) -> tuple[str, ...]:
    return tuple(recipe if Path(recipe).suffix else f"recipes/objective/{recipe}.yaml" for recipe in recipes)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
