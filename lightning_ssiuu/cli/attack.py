"""``lightning-ssiuu attack``: attacks on a saved model, with its oracle beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ssiuu.attacks import Attack, Harmful, Relearning
from lightning_ssiuu.attacks.base import Target, checked
from lightning_ssiuu.attacks.determined import determined
from lightning_ssiuu.attacks.records import REPORT, FinishedAttacks, fingerprint, merge_attacks, read_attacks
from lightning_ssiuu.cli.control import control_beside
from lightning_ssiuu.cli.parsing import run_function
from lightning_ssiuu.cli.report import Report, print_table
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.results import found_by
from lightning_ssiuu.evaluation.retention import Retention
from lightning_ssiuu.evaluation.runs import oracle_retention, run_collapsed, run_score
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import check_name, print_written, refuse_existing, refuse_links, same_place


def attack(
    model: str,
    oracle: str | None = None,
    attack: Attack | None = None,
    data: UnlearningDataModule | None = None,
    score: str | None = None,
    control: str = "auto",
    output: str | None = None,
    save_attacked: bool = False,
    devices: Devices | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Attack a saved model and put the result into ``attack.json``, which several attacks share.

    A sweep of a relearning attack that was interrupted goes on when the same command is run again: finished attacks are
    not repeated, and the result is the one of an uninterrupted sweep.

    Args:
        model: The unlearned model: a directory written by ``fit``, or any checkpoint.
        oracle: A model retrained without the forget set; put under the same attack, seed by seed.
        attack: ``Harmful`` (the default), ``Benign``, ``Quantization``, ``Ablation``, ``Interpolation``, ``Sampling``,
            ``Paraphrase``, ``Jailbreak``, ``Prefill``, ``FewShot``, ``Translation``, ``MultiTurn``, ``SoftPrompt``,
            ``SuffixSearch``, ``EmbeddingAttack``, ``UnlearningDepth``, ``LayerProbes``, or the import path of a class
            of one's own.
        data: The data module the model was unlearned with; by default its run's, else the embedded facts.
        score: The forget score; by default the one the run was stopped by, else probability.
        control: What a relearning attack teaches by itself, where there is no oracle to say so: the same attack on the
            same model with facts that nobody was ever taught, as many as there are to forget. ``auto``: without an
            oracle, the data module's invented facts, or the forget questions with each other's answers; ``none``; or a
            file of invented facts (columns ``question``, ``answer`` and perhaps ``distractors``).
        output: Directory for ``attack.json``; by default the model's run.
        save_attacked: Also save the attacked model with the highest score, at the end of its attack, as
            ``attacked_<attack>/``, for ``audit --after_attack``. Only for attacks that train.
        devices: Where to run. The curves do not depend on it, but for rounding. In ``bf16-true`` small learning rates
            round away.
        overwrite: Replace earlier entries of the same attack, and an interrupted sweep that had other options.

    Returns:
        The attack's rows of ``attack.json``, on every process.

    Raises:
        UserError: If an argument is outside its range, before a model is loaded (but for a ``wrong`` pool that is too
            small for p).
    """
    method = attack if attack is not None else Harmful()
    devices = devices if devices is not None else Devices()
    if save_attacked and not isinstance(method, Relearning):
        allowed = f"false with attack {type(method).__name__}, which trains nothing"
        raise UserError("save_attacked", save_attacked, allowed)
    with Report({"model": model, "oracle": oracle}, data, devices, output) as report:
        check_name("attack", method.name)
        refuse_links("output", report.folder, [REPORT, *_beside(method)])
        if method.name in read_attacks(report.folder)["settings"] and not overwrite:
            allowed = f"a directory whose {REPORT} has no {method.name} attack, or --overwrite"
            raise UserError("output", str(report.folder), allowed)
        score = score or run_score(model)
        if devices.engine not in method.engines:
            allowed = f"transformers with attack {type(method).__name__}: vllm reads a saved checkpoint alone"
            raise UserError("engine", devices.engine, allowed)
        method.check(report.data, score, devices)
        targets = [Target(*given, devices) for given in report.models.items()]
        beside = control_beside(report.data, control, oracle is not None, isinstance(method, Relearning))
        if beside is not None:
            targets.append(Target("control", model, devices, beside.data))
            method.check(beside.data, score, devices)
        log = _log(report, method, score, targets, save_attacked, overwrite) if isinstance(method, Relearning) else None
        with devices.launched():
            more: dict[str, Any] = {}
            if log is not None:
                log.finished = gathered(log.finished)[0]
                more["log"] = log
            results = checked(method, method.run(targets, report.data, score, devices, **more), targets)
            rows = method.rows(results, score)
            if devices.is_first:
                settings = {"score": score, "precision": devices.precision, **method.settings()}
                if beside is not None:
                    settings["control"] = beside.kind
                settings["data_options"] = report.data_options
                if devices.engine != "transformers":
                    settings["engine"] = devices.engine
                settings["provenance"] = report.provenance(settings)
                if (collapsed := run_collapsed(model)) is not None:
                    settings["collapsed"] = collapsed
                retention = None if oracle is None else oracle_retention(model, oracle)
                if retention is not None:
                    settings["oracle_retains"] = not retention.lost
                try:
                    merge_attacks(report.folder, method.name, rows, settings, results)
                finally:  # also where the disk refuses
                    print_attacks(rows, rows[0]["score"], collapsed, beside.kind if beside else None, retention)
                if log is not None:
                    log.remove()
                print_written(report.folder, [REPORT, *([_beside(method)[1]] if save_attacked else [])])
        return rows


def _log(
    report: Report,
    attack: Relearning,
    score: str,
    targets: Sequence[Target],
    save_attacked: bool,
    overwrite: bool,
) -> FinishedAttacks:
    # What is finished of a sweep is kept beside attack.json, and is of use to the same sweep only.
    folder, data, devices = report.folder, report.data, report.devices
    partial, attacked = _beside(attack)
    saved = folder / attacked if save_attacked else None
    if saved is not None and any(same_place(saved, checkpoint) for checkpoint in report.models.values()):
        raise UserError("save_attacked", True, f"false, or another output: {attacked} there is under attack itself")
    content = determined(attack, targets, report.models, data, score, devices) | {"saved": save_attacked}
    log = FinishedAttacks(folder / partial, fingerprint(content), saved)
    finished = log.read()
    if finished is None and not overwrite:
        allowed = f"with the options of the {attack.name} attack that was interrupted there, or with --overwrite"
        raise UserError("output", str(folder), allowed)
    if saved is not None and (finished is None or not log.path.exists()):
        refuse_existing("output", folder, [saved.name], overwrite)
    # The model that finished attacks were for may be lost.
    log.anew = finished is None or (saved is not None and not saved.exists())
    log.finished = {} if log.anew else finished or {}
    return log


def _beside(attack: Attack) -> tuple[str, str]:
    # What lies beside attack.json: of an unfinished sweep, and the attacked model.
    return f"attack.{attack.name}.partial.jsonl", f"attacked_{attack.name}"


def run(args: list[str]) -> None:
    """Parse and run ``attack``."""
    run_function(attack, "attack", args, {"attack": "Harmful"})


def print_attacks(
    rows: Sequence[Mapping[str, Any]],
    score: str,
    collapsed: bool | None = None,
    control: str | None = None,
    oracle: Retention | None = None,
) -> None:
    """Print rows of ``attack.json``, all of one score, as a table, and that the model had ``collapsed``.

    ``control`` is what the control of relearning attacks is made of, ``oracle`` what the oracle has of the retain set.
    """
    swept = any("inside_grid" in row.get("unlearned", {}) for row in rows)
    others = list(dict.fromkeys(split for row in rows for split in row.get("unlearned", {}).get("utility", ())))
    head = ("attack", "model", "before", "highest" if swept else "after")
    lines, empty, found = [(*head, *others)], [""] * len(others), []
    for row in rows:
        detail = row["p"] if row["variant"] is None else row["variant"]
        label = row["attack"] if detail is None else f"{row['attack']} {detail}"
        for name in ("unlearned", "oracle", "control"):
            if (model := row.get(name)) and "before" in model:  # else a control of random neurons
                edge = "" if model.get("inside_grid", True) else "  (at the edge of the grid)"
                more = [_moved(model.get("utility", {}).get(split)) for split in others]
                if "attackers" in model:
                    found.append(f"{label}, {name}: the highest is by {found_by(model['best'])}.")
                figures = f"{model['before']['mean']:.1f}", f"{_shown(model['forget_score'])}{edge}"
                lines.append((label, name, *figures, *more))
                neurons = (row if name == "unlearned" else model).get("control")
                if neurons and "before" not in neurons:
                    lines.append((label, f"{name}, control", "", _shown(neurons["forget_score"]), *empty))
        if "gap" in row:
            lines.append((label, "gap", "", _shown(row["gap"]), *empty))
    if control is not None:
        found.append(f"control: the unlearned model, taught what nobody ever knew ({control}) in the same way.")
    if oracle is not None and oracle.lost:
        found.append(f"The oracle does not retain ({oracle.change}): the gap to it says little.")
    notes = [*found, *["The unlearned model has collapsed: what comes back says nothing of erasing."] * bool(collapsed)]
    print_table(lines, f"{'Highest forget' if swept else 'Forget'} {score} under attack, %", notes, right=False)


def _shown(spread: Mapping[str, Any]) -> str:
    return f"{spread['mean']:.1f} ± {spread['std']:.1f}"


def _moved(utility: Mapping[str, Any] | None) -> str:
    return "" if utility is None else f"{utility['before']['mean']:.1f} → {utility['at_highest']['mean']:.1f}"
