"""The data of the benchmark: what a model is taught, what its oracle is, which options name the data to a command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .stages import Stage

FIT = ("lightning-ssiuu", "fit")
#: Of every ``fit``: it goes on where it was ended, diagnoses nothing, which an audit does, and shows and logs nothing.
ALWAYS = (
    *("--ckpt_path", "last", "--attribution.probe_examples", "0", "--trainer.default_root_dir", "{own}"),
    *("--trainer.logger", "false", "--trainer.enable_progress_bar", "false"),
)


def words(options: Mapping[str, Any], prefix: str = "") -> tuple[str, ...]:
    """Options of a command, as its command line has them."""
    return tuple(
        word
        for name, value in options.items()
        for word in (f"--{prefix}{name}", value if isinstance(value, str) else json.dumps(value))
    )


@dataclass(frozen=True)
class Source:
    """Data to unlearn, and the models that know it.

    ``data`` are the options that name it, ``stages`` those that make its files. ``taught`` says whether the model has
    to be taught it. ``more`` are stages that only some objectives name in their words.
    """

    name: str
    data: tuple[str, ...]
    stages: Mapping[str, Stage]
    settings: Mapping[str, Any]
    taught: bool = False
    more: Mapping[str, Stage] = field(default_factory=dict)

    @property
    def recipe(self) -> str:
        """The recipe of the model."""
        model = self.settings["model"]
        return model if Path(model).suffix else f"recipes/model/{model}.yaml"

    @property
    def model_words(self) -> tuple[str, ...]:
        """The model as it is before anything is taught."""
        given = self.settings.get("checkpoint")
        return ("--config", self.recipe, *(("--model.init_args.checkpoint", given) if given else ()))

    def teach(self, train_on: str, seed: int) -> Stage | None:
        """The model that was taught the data (``all``), or its oracle (``retain``); None where there is none."""
        kind, name = {"all": "teach", "retain": "oracle"}[train_on], f"{self.name}.seed{seed}"
        if self.taught:
            begin = (*FIT, "--config", "recipes/objective/fine_tuning.yaml", *self.model_words, *self.data)
            options = {"data.init_args.train_on": train_on, "stopping.threshold": None, "seed_everything": seed}
            more = (*words(self.settings["teach"] | options), *checkpoints(self.settings), *ALWAYS)
            return Stage(kind, name, (*begin, *more), self.stages, "model")
        if train_on == "retain" and "people" in self.stages:
            begin = ("python", "-m", "benchmarks.robustness.people", "--fold", self.name.removeprefix("embedded"))
            options = {"seed": seed, "steps": self.settings["oracle_steps"]}
            return Stage(kind, name, (*begin, *words(options), "--output", "{own}"), {}, "model")
        return None


def checkpoints(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The option that keeps a checkpoint to go on from."""
    return words({"checkpoints.every_n_steps": settings["checkpoint_every"]})


def source(text: str, settings: Mapping[str, Any]) -> Source:
    """``embedded:FOLD``, ``world_facts:SPLIT`` or a directory with ``forget.jsonl`` and ``retain.jsonl``."""
    kind, _, number = text.partition(":")
    more = settings["data_options"].get
    if kind == "embedded":
        fold = ("--fold", number or "0", "--output", "{own}")
        people, decoys = (
            Stage(name, f"embedded{number or 0}", ("python", "-m", f"benchmarks.robustness.{name}", *fold), {}, None)
            for name in ("people", "decoys")
        )
        files = {name: f"{{people}}/{name}.jsonl" for name in ("forget", "retain", "test")}
        options = files | {"distractors_column": "distractors"} | more("CustomData", {})
        data = ("--data", "CustomData", *words(options, "data.init_args."))
        return Source(people.name, data, {"people": people}, settings, more={"decoys": decoys})
    if kind == "world_facts":
        options = {"split_seed": int(number or 0)} | more("WorldFacts", {})
        data = ("--config", "recipes/data/world_facts.yaml", *words(options, "data.init_args."))
        return Source(f"world_facts{number or 0}", data, {}, settings)
    folder = Path(text)
    for name in ("forget", "retain"):
        if not (folder / f"{name}.jsonl").is_file():
            raise SystemExit(
                f"--data: got {text!r}, allowed: embedded:FOLD, world_facts:SPLIT, or a directory with {name}.jsonl"
            )
    options = {"forget": "forget", "retain": "retain"} | more("TOFU", {})
    data = ("--data", "TOFU", "--data.init_args.path", text, *words(options, "data.init_args."))
    return Source(folder.name, data, {}, settings, taught=True)
