"""What ``erase`` runs: the configuration of every trial, the attacks, the audit; and what is read of their results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_ssiuu.attacks.harmful import Harmful
from lightning_ssiuu.attacks.records import fingerprint, read_attacks
from lightning_ssiuu.cli.config_files import config_files
from lightning_ssiuu.cli.trials import Setting, Trial
from lightning_ssiuu.datamodules import Documents, UnlearningDataModule
from lightning_ssiuu.datamodules.columns import is_text
from lightning_ssiuu.datamodules.deletion import check_sources
from lightning_ssiuu.datamodules.documents import SUFFIXES
from lightning_ssiuu.datamodules.readers import read_records
from lightning_ssiuu.evaluation.chance import Level
from lightning_ssiuu.evaluation.knowledge import Known
from lightning_ssiuu.evaluation.results import check_metrics, read_result
from lightning_ssiuu.evaluation.retention import LEAST_KNOWN, Retention
from lightning_ssiuu.evaluation.runs import check_tokenizers, data_of, resolve_models
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import check_same_shape
from lightning_ssiuu.training.devices import Devices, Precision
from lightning_ssiuu.utils.errors import Given, UserError, check_choice
from lightning_ssiuu.utils.reading import read_yaml

SCORE = "probability"
#: The option by which an objective resists relearning more; an adversary's learning rate moves with the objective's.
_STRENGTH = {
    "ElicitedUnlearning": "adversary_lr",
    "MUDMAN": "adversary_lr",
    "AdversarialUnlearning": "step_size",
    "SSIUU": "regularizer.init_args.weight",
    "SAM": "rho",
}
_RATE = "optimizer.init_args.lr"
_MOST_STEPS = 300
_EVERY = 10  # steps from one checkpoint to the next
_SEARCH: dict[str, Any] = {"p": [0.3], "seeds": [0, 1], "epochs": 6}
_FULL: dict[str, Any] = {"p": [0.1, 0.3], "epochs": 8, "until_saturated": True}
#: Rows that all seeds of the full attack train on together at the least, and the fewest and most seeds: what one or two
#: rows bring back differs much from seed to seed.
_ROWS, _SEEDS = 12, (3, 6)
_AUDITED = 3.5  # times the work of the small attack
_ATTACKED_AT = (1.0, 2.0)  # of the rate of the search's attack; larger ones where it is not saturated


@dataclass(frozen=True)
class Plan:
    """What was asked of ``erase``, and the commands that follow from it."""

    output: str
    model: str
    forget: str | None
    retain: str | None
    test: str | None
    data: str | None
    forget_ids: str | None
    forget_where: str | None
    recipe: str | None
    fit: tuple[str, ...]
    template: str | None
    threshold: float | Level | None
    oracle: str | None
    seed: int
    accelerator: str
    devices: int
    precision: str

    def asked(self) -> dict[str, Any]:
        """What a run that goes on has to agree in, as JSON."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("output", "accelerator")}
        settings = self._base | {"trainer": self._base["trainer"] | {"accelerator": None}}
        digests = {"settings_sha256": fingerprint(settings), "data_sha256": self._data.content_sha256()}
        return kept | {"fit": list(self.fit)} | digests

    def check(self) -> None:
        """Raise a :class:`UserError` for a mistake in what was asked, the data and the models' names.

        No model is loaded.
        """
        if self._data_section():  # before one of them is looked for
            files = {"forget": self.forget, "retain": self.retain}
            check_sources(files, self.data, self.forget_ids, self.forget_where)
        models = {"model": self.model} | ({"oracle": self.oracle} if self.oracle else {})
        resolve_models(models)
        check_same_shape(models)
        self.config(Setting(), {"template": self.template}, Path(self.output))
        self._data.splits  # noqa: B018 (which is read now)
        check_tokenizers(models, self._data)
        check_choice("precision", self.precision, Precision)
        Devices(self.accelerator, self.devices)

    @cached_property
    def _base(self) -> dict[str, Any]:
        # The recipe, what `fit` adds, and the data; all that no trial changes.
        names = [self.recipe] if self.recipe else ["erase", *([] if self.model == "tiny" else ["model/smollm2_erase"])]
        merged: dict[str, Any] = {"attribution": {"probe_examples": 0}}  # the audit looks at neurons, of one run
        for name in names:
            _read(merged, "recipe", name)
        if not isinstance(merged.get("model"), dict) or "init_args" not in merged["model"]:
            raise UserError("recipe", self.recipe, "one with an objective: model.class_path and model.init_args")
        if (given := self._data_section()) is not None:  # of the recipe's data the sizes are of use
            sizes = merged.get("data", {}).get("init_args", {})
            kept = {name: sizes[name] for name in ("batch_size", "retain_batch_size") if name in sizes}
            merged["data"] = {"class_path": _data_class(given), "init_args": kept}
        _merge(merged, self._own)
        _merge(merged, {"data": {"init_args": given or {}}, "model": {"init_args": {"checkpoint": self.model}}})
        merged["seed_everything"] = self.seed
        stopping: dict[str, Any] = {"score": SCORE}
        if self.threshold is not None:
            stopping["threshold"] = self.threshold
        elif not self._has_threshold and (self.model != "tiny" or self._data_section() is not None):
            stopping["threshold"] = "chance"
        trainer = {"accelerator": self.accelerator, "devices": self.devices, "precision": self.precision}
        _merge(merged, {"stopping": stopping, "trainer": trainer, "checkpoints": {"every_n_steps": _EVERY}})
        return merged

    @cached_property
    def _own(self) -> dict[str, Any]:
        # What --fit has.
        own: dict[str, Any] = {}
        for name in self.fit:
            _read(own, "fit", name)
        return own

    @property
    def _has_threshold(self) -> bool:
        stopping = self._own.get("stopping")
        return isinstance(stopping, dict) and "threshold" in stopping

    def _data_section(self) -> dict[str, Any] | None:
        given = {"forget": self.forget, "retain": self.retain, "test": self.test, "data": self.data}
        given |= {"forget_ids": self.forget_ids, "forget_where": self.forget_where}
        return {name: value for name, value in given.items() if value is not None} or None

    @property
    def strength(self) -> str | None:
        """Option of the objective that is its strength; None: it has none."""
        option = _STRENGTH.get(str(self._base["model"].get("class_path", "")).rpartition(".")[2])
        return option if option is not None and _get(self._base["model"]["init_args"], option) is not None else None

    def config(self, setting: Setting, known: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """The configuration of a trial, for ``fit``; ``known`` is what :meth:`measure` found."""
        config: dict[str, Any] = yaml.safe_load(yaml.safe_dump(self._base))
        options = config["model"]["init_args"]
        rate = float(_get(options, _RATE) or 0.0)
        if rate <= 0:
            raise UserError("recipe", self.recipe, f"one with a learning rate: model.init_args.{_RATE}")
        _set(options, _RATE, _rounded(rate * setting.rate))
        if self.strength is not None:
            moved = setting.rate if self.strength == "adversary_lr" else 1.0
            strength = float(_get(options, self.strength)) * moved * setting.strength
            _set(options, self.strength, _rounded(strength))
        config["data"].setdefault("init_args", {})["template"] = known["template"]
        if (oracle := known.get("oracle")) is not None and self.threshold is None and not self._has_threshold:
            config["stopping"]["threshold"] = oracle
        config["trainer"]["default_root_dir"] = str(folder)
        config["trainer"].setdefault("max_steps", _MOST_STEPS)
        config["trainer"]["max_epochs"] = config["trainer"]["max_steps"]  # none has more epochs than steps
        config["saving"] = (config.get("saving") or {}) | {"folder": "model", "push_to_hub": None}
        if not self.attackable:  # nor can an adversary be asked
            config["stopping"]["elicited"] = None
        return config

    @staticmethod
    def rate(config: Mapping[str, Any]) -> float:
        """Learning rate of a configuration."""
        return float(_get(config["model"]["init_args"], _RATE))

    @staticmethod
    def fit_words(config: Path) -> list[str]:
        """The command of a trial; given again, it goes on."""
        return ["fit", "--config", str(config), "--ckpt_path", "last"]

    def searching(self, folder: Path, rate: float) -> list[str]:
        """The small attack on a trial."""
        return self._attack(folder, _SEARCH | {"learning_rates": [_rounded(2 * rate)]}, None, control=False)

    @cached_property
    def attackable(self) -> bool:
        """Whether a relearning attack can train on some of the rows and score others: not of one row alone."""
        try:
            Harmful(**_SEARCH).cells(self._data)
        except UserError as error:
            if error.argument != "attack.p":
                raise
            return False
        return True

    def judging(self, chosen: Trial) -> dict[str, list[str]]:
        """The attack in full, if there can be one, and the audit, by the file that each writes."""
        folder = Path(self.output)
        models = ["--original", self.model, "--unlearned", str(folder / "model"), "--score", SCORE]
        beside = ["--oracle", self.oracle] if self.oracle else []
        audit = ["audit", *models, *beside, *self._where(self._scoring), "--overwrite"]
        if not self.attackable:
            return {"audit": [*audit, "--relearning_probe", "false"]}
        rates = [_rounded(2 * factor * chosen.learning_rate) for factor in _ATTACKED_AT]
        options = _FULL | {"learning_rates": rates, "seeds": self._seeds}
        return {"attack": self._attack(folder, options, self.oracle, control=True), "audit": audit}

    @cached_property
    def _seeds(self) -> list[int]:
        cells = Harmful(p=_FULL["p"], seeds=[0]).cells(self._data)
        fewest = min(len(cell.attacked) for cell in cells)
        least, most = _SEEDS
        return list(range(min(max(math.ceil(_ROWS / fewest), least), most)))

    @property
    def judged_per_searched(self) -> dict[str, float]:
        """How many times the work of the small attack that of each command of :meth:`judging` is, about."""
        runs = len(_FULL["p"]) * len(self._seeds) * len(_ATTACKED_AT) / (len(_SEARCH["p"]) * len(_SEARCH["seeds"]))
        return {"attack": 2 * runs * _FULL["epochs"] / _SEARCH["epochs"], "audit": _AUDITED}  # 2: the oracle or control

    def _attack(self, folder: Path, options: Mapping[str, Any], oracle: str | None, control: bool) -> list[str]:
        given = [
            word
            for name, value in options.items()
            for word in (f"--attack.{name}", yaml.safe_dump(value, default_flow_style=True).split("\n")[0])
        ]
        beside = ["--oracle", oracle] if oracle else [] if control else ["--control", "none"]
        return [
            "attack",
            "--model",
            str(folder / "model"),
            *given,
            "--score",
            SCORE,
            *beside,
            *self._where(self.precision),
        ]

    def _where(self, precision: str) -> list[str]:
        return ["--accelerator", self.accelerator, "--devices", str(self.devices), "--precision", precision]

    @property
    def _scoring(self) -> Literal["32-true", "bf16-true"]:
        # Where nothing is trained there is no mixed precision.
        return "bf16-true" if self.precision == "bf16-true" else "32-true"

    @cached_property
    def _data(self) -> UnlearningDataModule:
        from lightning_ssiuu.utils.messages import parsing

        section = {"class_path": "Facts"} | self._base["data"]
        more = {"tokenizer": self.model} | ({"template": self.template} if self.template else {})
        section = section | {"init_args": section.get("init_args", {}) | more}
        with parsing():
            return data_of(section)

    def measure(self) -> dict[str, Any]:
        """The template under which the model knows most, what it and the oracle know, and how many items there are."""
        from lightning_ssiuu.evaluation.knowledge import SOMETHING, known_under, other_templates

        data = self._data
        data.setup("validate")
        devices = Devices(self.accelerator, 1, precision=self._scoring)
        with devices.launched():
            model = devices.load(self.model)
            others = [] if isinstance(data, Documents) else other_templates(data)
            names = [self.template] if self.template else [None, *others]
            found = [known_under(name, SCORE, model, data.tokenizer, data) for name in names]
            known = max(filter(None, found), key=lambda one: one.above, default=None)
            if known is None:
                allowed = "questions that the model's context takes, with an answer that some other row does not have"
                raise UserError("forget", Given(f"{len(data.splits.forget)} items"), allowed)
            if known.above < SOMETHING:
                given = Given("one that does not know the forget set")
                raise UserError("model", given, f"a model that knows it: there is nothing to forget ({known})")
            oracle = {}
            if self.oracle:
                before = _scores(model, data, known)
                del model
                after = _scores(devices.load(self.oracle), data, known)
                _check_oracle(before, after, known, len(data.splits.retain))
                oracle = {"oracle": float(f"{after['forget']:.4g}")}
        sizes = {"n_forget": len(data.splits.forget), "n_retain": len(data.splits.retain)}
        return {"template": known.template, "probability": known.value, "chance": known.chance} | oracle | sizes


def _scores(model: AnswerModel, data: UnlearningDataModule, known: Known) -> dict[str, float]:
    asking = data if known.template == data.template else data.with_template(known.template)
    loaders = [asking.eval_dataloader(split) for split in ("forget", "retain")]
    found = evaluate(model, data.tokenizer, loaders, [SCORE])
    return {split: scores[SCORE] for split, scores in found.items()}


def _check_oracle(model: Mapping[str, float], oracle: Mapping[str, float], known: Known, n_retain: int) -> None:
    if model["forget"] - oracle["forget"] < LEAST_KNOWN:
        given = Given(f"a model that gives the forget set {oracle['forget']:.4g} %")
        allowed = f"one that does not know it: clearly less than the {model['forget']:.4g} % of the model to unlearn"
        raise UserError("oracle", given, allowed)
    retention = Retention(SCORE, model["retain"], oracle["retain"], known.chance, n_retain)
    if retention.collapsed:
        raise UserError("oracle", Given(f"a collapsed model ({retention.change})"), "one trained on the retain set")


def trial_of(setting: Setting, rate: float, folder: Path) -> Trial:
    """What a finished ``fit`` says of its trial."""
    metrics = read_result(folder / "metrics.json", "output", check_metrics)
    before, after = metrics["before"]["scores"], metrics["after"]["scores"]
    return Trial(
        setting,
        rate,
        reached=SCORE in metrics["stopped_by"],
        steps=metrics["steps"],
        forget=after["forget"][SCORE],
        retain_before=before["retain"][SCORE],
        retain=after["retain"][SCORE],
        test=after.get("test", {}).get(SCORE),
    )


def with_attack(trial: Trial, folder: Path) -> Trial:
    """The same with what its attack found."""
    if not trial.reached:
        return trial
    found = [row["unlearned"]["forget_score"]["mean"] for row in read_attacks(folder)["attacks"]]
    return replace(trial, recovered=max(found, default=None))


def _data_class(given: Mapping[str, Any]) -> str:
    sources = [value for name, value in given.items() if name in ("data", "forget", "retain", "test")]
    files = [Path(source).expanduser() for source in sources]
    is_plain = any(path.is_dir() or path.suffix.lower() in SUFFIXES for path in files)
    argument = "data" if "data" in given else "forget"
    return "Documents" if is_plain or is_text(next(read_records(given[argument], argument), {})) else "CustomData"


def _read(into: dict[str, Any], argument: str, source: str) -> None:
    for path in config_files(source):
        content = read_yaml(path, argument)
        content.pop("config", None)  # what it builds on has been read before it
        _merge(into, content)


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _get(options: Mapping[str, Any], name: str) -> Any:
    value: Any = options
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _set(options: dict[str, Any], name: str, value: Any) -> None:
    *parts, last = name.split(".")
    for part in parts:
        options = options.setdefault(part, {})
    options[last] = value


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
