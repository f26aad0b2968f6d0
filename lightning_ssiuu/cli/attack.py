"""``lightning-ssiuu attack``: attacks on a saved model, with its oracle beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import lightning
import torch
import transformers
from rich.console import Console
from rich.table import Table

import lightning_ssiuu
from lightning_ssiuu.attacks.records import (
    REPORT,
    FinishedAttacks,
    attack_name,
    checkpoint_fingerprint,
    fingerprint,
    merge_attacks,
    read_attacks,
)
from lightning_ssiuu.attacks.registry import (
    Ablation,
    Sampling,
    attack_without_training,
    check_without_training,
    outcome_rows,
)
from lightning_ssiuu.attacks.relearning import RecoveryCurve, check_attack, table
from lightning_ssiuu.attacks.sweep import Sweep, Target, check_pool
from lightning_ssiuu.cli.parsing import run_function
from lightning_ssiuu.datamodules import QAExample, RelearnDataModule, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.relearn import Kind as Relearning
from lightning_ssiuu.evaluation.runs import (
    check_tokenizers,
    output_directory,
    resolve_models,
    run_architecture,
    run_data,
    run_score,
)
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.training.devices import Devices, Precision, Strategy
from lightning_ssiuu.utils.console import hide_short_bars
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import check_space, refuse_existing
from lightning_ssiuu.utils.provenance import provenance


def attack(
    model: str,
    oracle: str | None = None,
    data: UnlearningDataModule | None = None,
    kind: Literal["harmful", "benign", "quantization", "ablation", "sampling", "paraphrase"] = "harmful",
    p: Sequence[float] = (0.1, 0.3),
    pool: Literal["all", "wrong"] = "all",
    learning_rates: Sequence[float] = (1e-5, 5e-6, 1e-6),
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 10,
    every_n_epochs: int = 1,
    batch_size: int = 8,
    lora: LoRA | None = None,
    until_saturated: bool = False,
    score: str | None = None,
    benign_path: str | None = None,
    benign_size: int = 1000,
    quantization: Sequence[str] = ("8bit", "4bit"),
    ablation: Ablation | None = None,
    sampling: Sampling | None = None,
    output: str | None = None,
    save_attacked: bool = False,
    accelerator: str = "auto",
    devices: int | Literal["auto"] = 1,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Attack a saved model and put the result into ``attack.json``, which attacks of several kinds share.

    A sweep that was interrupted goes on when the same command is run again: finished attacks are not repeated, and
    the result is the one of an uninterrupted sweep.

    Args:
        model: The unlearned model: a directory written by ``fit``, or any checkpoint.
        oracle: A model retrained without the forget set; put under the same attacks, seed by seed.
        data: The data module the model was unlearned with; by default its run's, else the embedded facts.
        kind: ``harmful`` trains on a fraction p of the forget set and scores the rest; ``benign`` trains on harmless
            instruction data and scores the whole forget set. The others train nothing: ``quantization`` (the weights
            in 8 and in 4 bits), ``ablation`` (flagged neurons put back to what they were, or to zero), ``sampling``
            (best of k answers at a temperature), ``paraphrase`` (other wordings of the questions).
        p: Fractions for harmful attacks.
        pool: Harmful attacks train on and score ``all`` forget examples, or those alone that the unlearned model
            answers ``wrong`` under the score (as in FaithUn: the score before the attack is 0). The oracle is attacked
            on the same ones.
        learning_rates: AdamW's; the default is the paper's harmful grid for 3B models. Small models need larger ones:
            widen until ``inside_grid`` is true.
        seeds: Of the selection and the order; of what is sampled.
        epochs: Passes over the attack set.
        every_n_epochs: Epochs from one score to the next; the last is always scored. Scoring can cost more than the
            attack itself.
        batch_size: Attack sequences per step, over all devices.
        lora: Fine-tune adapters instead of the weights; null for the weights.
        until_saturated: Where the highest score lies at the largest learning rate or in the last epoch, go on with
            larger rates, then with twice the epochs, until it lies inside (at most 8 times for a model and p).
        score: The forget score; by default the one the run was stopped by, else probability.
        benign_path: Instruction data (file or hub id) for benign attacks; by default the data module's own, or where
            it has none ``tatsu-lab/alpaca`` of the hub.
        benign_size: Number of benign items at most.
        quantization: Widths to try, for ``kind: quantization``.
        ablation: Options of ``kind: ablation``.
        sampling: Options of ``kind: sampling``.
        output: Directory for ``attack.json``; by default the model's run.
        save_attacked: Also save the attacked model with the highest score, at the end of its attack, as
            ``attacked_<kind>/`` (with adapters ``attacked_<kind>_lora/``), for ``audit --after_attack``.
        accelerator: Lightning's.
        devices: How many, one process each; ``auto``: all GPUs, or one process on the CPU. The curves do not depend
            on it, but for rounding.
        strategy: ``ddp``: the whole model on every device; ``fsdp2``: its weights cut over them.
        precision: Of the attack's steps and, but for ``bf16-mixed``, of the weights. In ``bf16-true`` small learning
            rates round away.
        overwrite: Replace earlier entries of the same attack, and an interrupted sweep that had other options.

    Returns:
        The attack's rows of ``attack.json``, on every process.

    Raises:
        UserError: If an argument is outside its range, before a model is loaded (but for a ``wrong`` pool that is too
            small for p).
    """
    start = time.monotonic()
    trains = kind in get_args(Relearning)
    lists: dict[str, Sequence[Any]] = {"seeds": seeds}
    if trains:
        lists |= {"learning_rates": learning_rates} | ({"p": p} if kind == "harmful" else {})
    _check_options(kind, lists, {"lora": lora, "until_saturated": until_saturated, "save_attacked": save_attacked})
    models = {"model": model} | ({"oracle": oracle} if oracle else {})
    hide_short_bars(*resolve_models(models))
    score = score or run_score(model)
    if trains:
        check_attack(score, learning_rates, epochs, every_n_epochs)
    if pool == "wrong":
        if kind != "harmful":
            raise UserError("pool", pool, f"all with kind {kind}")
        check_pool(score)
    where = Devices(accelerator, devices, strategy, precision, run_architecture(model))
    if lora is not None and where.sharded:
        raise UserError(
            "lora", "adapters", "null with strategy fsdp2, which cuts the weights before adapters are there"
        )
    folder, name = output_directory(model, output), attack_name(kind, lora is not None)
    if name in read_attacks(folder)["settings"] and not overwrite:
        raise UserError("output", str(folder), f"a directory whose {REPORT} has no {name} attack, or --overwrite")
    check_space("output", folder, 1 << 20)
    data = run_data(model, data)
    check_tokenizers(models, data)
    settings: dict[str, Any] = {"score": score, "lora": None if lora is None else asdict(lora), "precision": precision}
    settings |= {option: list(values) for option, values in lists.items()}
    report = _Report(models, data, score, where, folder, name, settings, overwrite, start)
    if trains:
        settings |= {"epochs": epochs, "every_n_epochs": every_n_epochs, "batch_size": batch_size}
        settings |= {"until_saturated": until_saturated}
        settings |= {"pool": pool} if kind == "harmful" else {"benign_size": benign_size}
        return _relearning(report, cast(Relearning, kind), pool, lora, benign_path, save_attacked)

    check_without_training(kind, data, score, where, seeds, quantization, ablation)
    if kind == "quantization":
        settings |= {"quantization": list(quantization)}
    elif (given := {"ablation": ablation, "sampling": sampling or Sampling()}.get(kind)) is not None:
        # No paths: whoever reads the report is not to learn how directories are called here.
        settings |= {option: value for option, value in asdict(given).items() if option != "original"}
    with where.launched():
        outcomes = attack_without_training(kind, models, data, score, where, seeds, quantization, ablation, sampling)
        rows = outcome_rows(outcomes)
        report.write(rows, outcomes=[asdict(outcome) for outcome in outcomes])
    return rows


def _check_options(kind: str, lists: Mapping[str, Sequence[Any]], relearning: Mapping[str, Any]) -> None:
    for name, values in lists.items():
        if not values:
            raise UserError(name, list(values), "at least one value")
    if kind not in get_args(Relearning):
        for name, value in relearning.items():
            if value:
                given = "adapters" if name == "lora" else value
                allowed = "null" if name == "lora" else "false"
                raise UserError(name, given, f"{allowed} with kind {kind}, which trains nothing")


@dataclass
class _Report:
    """What is attacked, and where what is found goes."""

    models: dict[str, str]
    data: UnlearningDataModule
    score: str
    where: Devices
    folder: Path
    attack: str
    settings: dict[str, Any]
    overwrite: bool
    start: float

    @cached_property
    def data_sha256(self) -> str:
        """Of the data module."""
        return self.data.content_sha256()

    def write(
        self,
        rows: Sequence[Mapping[str, Any]],
        curves: Sequence[RecoveryCurve] = (),
        outcomes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write and show it, on the first rank."""
        if self.where.is_first:
            wall_s, config = time.monotonic() - self.start, json.dumps(self.settings)
            origin = provenance(wall_s, self.where.device, config, self.data_sha256)
            merge_attacks(self.folder, self.attack, rows, {**self.settings, "provenance": origin}, curves, outcomes)
            print_attacks(rows, rows[0]["score"])

    def log(self, saved: Path | None, benign: Sequence[QAExample]) -> FinishedAttacks:
        """Where finished curves are kept, under a fingerprint of everything that determines them."""
        encoder, data, where = self.data.encoder, self.data, self.where
        determined = {
            "attack": self.attack,
            "settings": self.settings,
            "data": self.data_sha256,
            "benign": Splits([], [], benign=list(benign)).sha256(),
            "encoding": [encoder.template, encoder.choice_template, encoder.max_length, data.multiple_choice],
            "eval_batch_size": data.eval_batch_size,
            "models": {name: checkpoint_fingerprint(checkpoint) for name, checkpoint in self.models.items()},
            "devices": [where.device.type, where.n_ranks, where.sharded],
            "saved": saved is not None,
            "versions": [one.__version__ for one in (lightning_ssiuu, torch, lightning, transformers)],
        }
        return FinishedAttacks(self.folder / f"attack.{self.attack}.partial.jsonl", fingerprint(determined))


def _relearning(
    report: _Report,
    kind: Relearning,
    pool: str,
    lora: LoRA | None,
    benign_path: str | None,
    save_attacked: bool,
) -> list[dict[str, Any]]:
    data, settings, where = report.data, report.settings, report.where

    def attacks(ids: Sequence[int] | None = None) -> list[RelearnDataModule]:
        # Selected and tokenised once for all learning rates and models.
        made = [
            RelearnDataModule(
                *(data, kind, p, benign_path, settings.get("benign_size", 1), ids),
                batch_size=settings["batch_size"],
                seed=seed,
            )
            for p in settings.get("p", [0.5])
            for seed in settings["seeds"]
        ]
        for one in made:
            if kind == "benign":
                one.benign_items = made[0].benign_items  # read once
            one.check_share(where.n_ranks)
        return made

    # Every selection that needs no model is made and checked before one is loaded.
    cells = attacks() if pool == "all" else []
    saved = report.folder / f"attacked_{report.attack}" if save_attacked else None
    log = report.log(saved, cells[0].benign_items if kind == "benign" else [])
    finished = log.read()
    if finished is None and not report.overwrite:
        allowed = f"with the options of the {report.attack} attack that was interrupted there, or with --overwrite"
        raise UserError("output", str(report.folder), allowed)
    if saved is not None and (finished is None or not log.path.exists()):
        refuse_existing("output", report.folder, [saved.name], report.overwrite)
    lost = saved is not None and not saved.exists()  # and with it what the finished attacks were for
    with where.launched():
        log.anew = finished is None or lost
        finished = gathered({} if log.anew else finished)[0] or {}
        targets = [Target(argument, checkpoint, where) for argument, checkpoint in report.models.items()]
        if pool == "wrong":
            if not (ids := targets[0].wrong_ids(data, report.score)):
                raise UserError("pool", pool, "all: the model answers no forget example wrongly")
            cells = attacks(ids)
        sweep = Sweep(where, report.score, settings["every_n_epochs"], lora, log, finished, saved)
        curves = sweep.run(targets, cells, settings["learning_rates"], settings["epochs"], settings["until_saturated"])
        first = {"attack": report.attack, "kind": kind, "p": None, "variant": None, "score": report.score}
        rows = [first | row for row in table(curves)]
        report.write(rows, curves)
        if where.is_first:
            log.remove()
    return rows


def run(args: list[str]) -> None:
    """Parse and run ``attack``.

    Args:
        args: ``["--config", "recipes/attack/harmful.yaml", "--model", "runs/ssiuu/model", ...]``.
    """
    run_function(attack, "attack", args)


def print_attacks(rows: Sequence[Mapping[str, Any]], score: str, console: Console | None = None) -> None:
    """Print rows of ``attack.json`` as a table.

    Args:
        rows: Of one score.
        score: Its name.
        console: Where to.

    Example:
        >>> cell = {"before": {"mean": 5.0, "std": 0.0}, "forget_score": {"mean": 30.0, "std": 1.0}}
        >>> row = {"attack": "harmful", "p": 0.1, "variant": None, "unlearned": {**cell, "inside_grid": True}}
        >>> print_attacks([row], "probability", Console(width=70, color_system=None))  # doctest: +NORMALIZE_WHITESPACE
        Highest forget probability under attack, %
        attack       model      before  highest
        harmful 0.1  unlearned  5.0      30.0 ± 1.0
    """
    console = console or Console()
    swept = any("inside_grid" in row.get("unlearned", {}) for row in rows)
    console.print(f"{'Highest forget' if swept else 'Forget'} {score} under attack, %")
    output = Table(box=None)
    for column in ("attack", "model", "before", "highest" if swept else "after"):
        output.add_column(column)
    for row in rows:
        detail = row["p"] if row["variant"] is None else row["variant"]
        label = row["attack"] if detail is None else f"{row['attack']} {detail}"
        for name in ("unlearned", "oracle"):
            if name in row:
                one = row[name]
                edge = "" if one.get("inside_grid", True) else "  (at the edge of the grid)"
                output.add_row(label, name, f"{one['before']['mean']:.1f}", f"{_shown(one['forget_score'])}{edge}")
                if control := row.get("control") if name == "unlearned" else one.get("control"):
                    output.add_row(label, f"{name}, control", "", _shown(control["forget_score"]))
        if "gap" in row:
            output.add_row(label, "gap", "", _shown(row["gap"]))
    console.print(output)


def _shown(spread: Mapping[str, Any]) -> str:
    return f"{spread['mean']:.1f} ± {spread['std']:.1f}"
