"""What has to be run: a run is an objective's setting on one data set with one training seed, through all stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .sources import ALWAYS, FIT, Source, checkpoints, source, words
from .stages import Stage
from .table import RETAIN_WEIGHT, Objective, Setting, objectives

SETTINGS = Path(__file__).parent / "settings"
_MATCH = "benchmarks.robustness.matching.MatchForgetScore"
#: What a file of settings may leave out.
_DEFAULTS: dict[str, Any] = {
    **{"model": "tiny", "checkpoint": None, "tune": None, "data": [], "objectives": ["gradient_difference"]},
    **{"seeds": [0, 1, 2], "tune_seeds": [0], "search": [1.0], "score": "probability", "level": "oracle"},
    **{"retain_weights": [1.0], "retain_at_least": 95.0, "checkpoint_every": None, "oracle_steps": 300},
    **{"data_options": {}, "teach": {}, "fit": {}, "attacks": {}, "tune_attacks": {}, "audit": {}},
}


@dataclass(frozen=True)
class Run:
    """One run. ``attacks`` and ``oracle_attacks`` go by name; ``retain`` is the factor on the retain weight."""

    phase: str
    data: str
    objective: str
    setting: Setting
    retain: float
    seed: int
    matched: bool
    stages: Mapping[str, Stage]
    attacks: Mapping[str, Stage] = field(default_factory=dict)
    oracle_attacks: Mapping[str, Stage] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The objective, and what of it was varied."""
        return self.objective if self.retain == 1 else f"{self.objective}, retain weight × {self.retain:g}"

    @property
    def all_stages(self) -> list[Stage]:
        """In the order they can be run in."""
        found: dict[str, Stage] = {}

        def add(stage: Stage) -> None:
            for need in stage.needs.values():
                add(need)
            found.setdefault(stage.key, stage)

        for stage in (self.stages["fit"], *self.attacks.values(), *self.oracle_attacks.values(), *self.stages.values()):
            add(stage)
        return list(found.values())


def _read(name: str) -> dict[str, Any]:
    path = Path(name) if Path(name).is_file() else SETTINGS / f"{name}.yaml"
    if not path.is_file():
        raise SystemExit(
            f"--settings: got {name!r}, allowed: a file, {', '.join(sorted(f.stem for f in SETTINGS.glob('*')))}"
        )
    read: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    like = read.pop("like", None)
    if unknown := [key for key in read if key not in _DEFAULTS]:
        raise SystemExit(f"{path.name}: got {unknown[0]!r}, allowed: like, {', '.join(_DEFAULTS)}")
    return read if like is None else _read(like) | read


def read_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A file of settings, by name or path, with what the command line gives.

    A file is as the one it names as ``like``, but for what it has itself.
    """
    settings = _DEFAULTS | _read(name) | {key: value for key, value in given.items() if value is not None}
    if not settings["data"]:
        raise SystemExit("--data: got nothing, allowed: embedded:FOLD, world_facts:SPLIT, or directories of slices")
    if settings["tune"] in settings["data"]:
        raise SystemExit(f"--tune: got {settings['tune']!r}, allowed: data on which nothing is compared")
    return settings


class Planner:
    """Runs of the two phases: settings are chosen on the tune data, then fixed and run on the others."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.objectives = objectives(settings["objectives"], settings["model"])
        self.sources = {
            text: source(text, settings) for text in (*settings["data"], settings["tune"]) if text is not None
        }
        names = [each.name for each in self.sources.values()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise SystemExit(f"--data: got two called {twice!r}, allowed: directories with different names")
        self.recipe = next(iter(self.sources.values())).recipe
        self.tunes = settings["tune"] is not None
        self.tried = {
            each.name: each.settings(settings["search"], self.recipe) if self.tunes else [Setting("recipe", {})]
            for each in self.objectives
        }

    def tuning(self) -> Iterator[Run]:
        """Every setting of every objective on the tune data; without such data the recipes are taken as they are."""
        if not self.tunes:
            return
        data = self.sources[self.settings["tune"]]
        for seed in self.settings["tune_seeds"]:
            for objective in self.objectives:
                for setting in self.tried[objective.name]:
                    yield self._run("tune", data, objective, setting, 1.0, seed, self.settings["tune_attacks"])

    def testing(self, chosen: Mapping[str, Setting]) -> Iterator[Run]:
        """The chosen settings on the other data, seed by seed, so that what is there is comparable at any time."""
        for seed in self.settings["seeds"]:
            for text in self.settings["data"]:
                for objective in self.objectives:
                    for factor in self.settings["retain_weights"] if objective.name in chosen else ():
                        if factor != 1 and objective.value(RETAIN_WEIGHT, self.recipe) is None:
                            continue
                        yield self._run(
                            *("test", self.sources[text], objective, chosen[objective.name], factor, seed),
                            self.settings["attacks"],
                        )

    def _run(
        self,
        phase: str,
        data: Source,
        objective: Objective,
        setting: Setting,
        retain: float,
        seed: int,
        attacks: Mapping[str, Any],
    ) -> Run:
        learned, oracle = data.teach("all", seed), data.teach("retain", seed)
        before = self._before(data, objective, seed, learned)
        fit = self._fit(data, objective, setting, retain, seed, before or learned, oracle)
        attacked = {name: self._attack(data, name, attack, fit, learned, oracle) for name, attack in attacks.items()}
        oracles = {
            name: self._attack(data, name, attack, oracle, learned, oracle)
            for name, attack in attacks.items()
            if oracle
        }
        stages = {"learned": learned, "oracle": oracle, "before": before, "fit": fit}
        if phase == "test" and self.settings["audit"] is not None:
            stages["audit"] = self._audit(data, fit, learned, oracle, attacked)
        kept = {name: stage for name, stage in stages.items() if stage is not None}
        return Run(phase, data.name, objective.name, setting, retain, seed, objective.matched, kept, attacked, oracles)

    def _before(self, data: Source, objective: Objective, seed: int, learned: Stage | None) -> Stage | None:
        if objective.before is None:
            return None
        recipes = [word for recipe in objective.before.recipes for word in ("--config", recipe)]
        model, needs = _begin(data, learned)
        options = words({"stopping.threshold": None, "seed_everything": seed} | objective.before.options)
        needs |= {name: stage for name, stage in data.more.items() if f"{{{name}}}/" in " ".join(options)}
        if "{decoys}/" in " ".join(options) and "decoys" not in needs:
            raise SystemExit(f"{objective.name}: got {data.name}, allowed: embedded data, for its decoys")
        begin = (*FIT, *recipes, *model, *data.data, *words(self.settings["fit"]))
        # By its digest alone: objectives that have the same one share it.
        return Stage(
            *("before", f"{data.name}.seed{seed}", (*begin, *options, *checkpoints(self.settings), *ALWAYS)),
            *(needs, "model"),
        )

    def _fit(
        self,
        data: Source,
        objective: Objective,
        setting: Setting,
        retain: float,
        seed: int,
        first: Stage | None,
        oracle: Stage | None,
    ) -> Stage:
        settings = self.settings
        model, needs = _begin(data, first)
        recipes = [word for recipe in objective.recipes for word in ("--config", recipe)]
        options = dict(objective.options) | dict(setting.options)
        if retain != 1:
            options[RETAIN_WEIGHT] = float(f"{retain * (objective.value(RETAIN_WEIGHT, data.recipe)):.4g}")
        level = settings["level"]
        if level == "oracle" and oracle is not None:
            needs["oracle"], level = oracle, f"{{oracle:{settings['score']}}}"
        elif level == "oracle":
            raise SystemExit(f"level: got 'oracle', allowed: a number, mismatched or chance: {data.name} has no oracle")
        stop = {"stopping.score": settings["score"], "stopping.threshold": level, "seed_everything": seed}
        match = ("--trainer.callbacks", _MATCH) if objective.matched else ()
        then = [word for recipe in objective.then for word in ("--config", recipe)]
        begin = (*FIT, *recipes, *model, *then, *data.data, *words(settings["fit"]), *words(stop))
        name = f"{data.name}.{objective.name}.{setting.name}" + (f".retain{retain:g}" if retain != 1 else "")
        more = (*words(options), *match, *checkpoints(settings), *ALWAYS)
        return Stage("fit", f"{name}.seed{seed}", (*begin, *more), needs, "model")

    def _attack(
        self,
        data: Source,
        name: str,
        attack: Mapping[str, Any],
        attacked: Stage,
        learned: Stage | None,
        oracle: Stage | None,
    ) -> Stage:
        recipe = attack["recipe"]
        recipe = recipe if Path(recipe).suffix else f"recipes/attack/{recipe}.yaml"
        begin = ("lightning-ssiuu", "attack", "--config", recipe, *words(attack.get("options", {}), "attack."))
        more = ("--score", self.settings["score"], "--model", "{attacked}/model", "--output", "{own}")
        needs = {**data.stages, "attacked": attacked}
        if oracle is not None:  # it is attacked once, for all; where there is none the command has its control
            more = (*more, "--control", "none")
        if attack.get("original"):
            more = (*more, "--attack.original", self._original(data, learned))
            needs |= {"learned": learned} if learned else {}
        kind = "attack" if attacked.kind == "fit" else "oracle_attack"
        return Stage(kind, f"{attacked.name}.{name}", (*begin, *more, *data.data), needs)

    def _audit(
        self, data: Source, fit: Stage, learned: Stage | None, oracle: Stage | None, attacks: Mapping[str, Stage]
    ) -> Stage:
        needs = {**data.stages, "fit": fit, **({"learned": learned} if learned else {})}
        needs |= {f"attack_{name}": stage for name, stage in attacks.items()}
        models: dict[str, Any] = {"original": self._original(data, learned), "unlearned": "{fit}/model"}
        if oracle is not None:
            needs["oracle"], models["oracle"] = oracle, "{oracle}/model"
        options = words(models | {"score": self.settings["score"], "relearning_probe": False} | self.settings["audit"])
        return Stage("audit", fit.name, ("lightning-ssiuu", "audit", *options, "--output", "{own}", *data.data), needs)

    def _original(self, data: Source, learned: Stage | None) -> str:
        if learned is not None:
            return "{learned}/model"
        if self.settings["checkpoint"]:
            return str(self.settings["checkpoint"])
        recipe = yaml.safe_load(Path(data.recipe).read_text(encoding="utf-8"))
        return str(recipe["model"]["init_args"]["checkpoint"])


def _begin(data: Source, first: Stage | None) -> tuple[tuple[str, ...], dict[str, Stage]]:
    # The words of the model that a fit starts from, and what it needs for them
    needs = dict(data.stages)
    if first is None:
        return data.model_words, needs
    name = "before" if first.kind == "before" else "learned"
    more = ("--model.init_args.checkpoint", f"{{{name}}}/model")
    return (*data.model_words, *more), needs | {name: first}
