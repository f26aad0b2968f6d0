"""``lightning-ssiuu audit``: a verdict, with numbers and pictures that tell erasing from hiding."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_ssiuu.attribution.diagnosis import Diagnosis, attribution_correlation, diagnose, influences
from lightning_ssiuu.attribution.influence import CSV_HEADER
from lightning_ssiuu.attribution.methods import attribution_method
from lightning_ssiuu.attribution.plots import save_cumulative_curves, save_heat_maps
from lightning_ssiuu.cli.parsing import run_function
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.runs import (
    check_tokenizers,
    output_directory,
    resolve_models,
    run_architecture,
    run_data,
    run_score,
)
from lightning_ssiuu.evaluation.scores import check_score
from lightning_ssiuu.models.answers import TARGETS, Target
from lightning_ssiuu.models.architectures import Architecture
from lightning_ssiuu.reports.audit.evidence import (
    RelearningProbe,
    neuron_evidence,
    probe_relearning,
    recorded_relearning,
    relearning_evidence,
    undo_neurons,
)
from lightning_ssiuu.reports.audit.measure import forced_score, measure
from lightning_ssiuu.reports.audit.page import SHOWN_NEURONS, Measured, report_html
from lightning_ssiuu.reports.audit.verdict import LEAST_FORGOTTEN, Evidence, decide
from lightning_ssiuu.training.devices import Devices, Strategy
from lightning_ssiuu.utils.console import hide_short_bars
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import check_space, refuse_existing, write_csv, write_json, written_atomically
from lightning_ssiuu.utils.provenance import provenance


def audit(
    original: str,
    unlearned: str,
    oracle: str | None = None,
    after_attack: str | None = None,
    data: UnlearningDataModule | None = None,
    score: str | None = None,
    relearning_probe: bool = True,
    probe: RelearningProbe | None = None,
    own_change: bool = True,
    show_text: bool = False,
    probe_examples: int = 64,
    alpha: float = 1e-3,
    target: Target = "length_normalised",
    method: str | None = None,
    memory_budget: int | str | None = None,
    scores: Sequence[str] | None = None,
    output: str | None = None,
    accelerator: str = "auto",
    devices: int | Literal["auto"] = 1,
    strategy: Strategy = "auto",
    precision: Literal["32-true", "bf16-true"] = "32-true",
    overwrite: bool = False,
    architecture: str | dict[str, Any] | Architecture | None = None,
) -> dict[str, Any]:
    """Judge a model before and after unlearning: ``audit.json``, ``report.html``, a table of neurons, and plots.

    Args:
        original: The model before unlearning.
        unlearned: The model after it; a directory written by ``fit``, or any checkpoint.
        oracle: A model retrained without the forget set, for what erasing looks like.
        after_attack: The unlearned model after a relearning attack (``attack --save_attacked true``): adds the
            correlation of attributions before and after the attack.
        data: The data module to judge by; by default the unlearned model's run's, else the embedded facts.
        score: The forget score of the verdict; by default that of the run's relearning attacks, else the one the run
            was stopped by, else probability.
        relearning_probe: Where the run has no relearning attack with this score in its ``attack.json`` (and with the
            oracle, if one is given): make a small one.
        probe: Options of that attack; its learning rates suit small models.
        own_change: Also flag neurons by what their own changed weights cost: precise where few neurons hide the answer,
            empty where the change is spread out. Costs eight more passes over the probes and, in main memory, three
            times the weights. Not with strategy ``fsdp2``.
        show_text: Put questions of the forget set, and the answers of both models, into the report.
        probe_examples: Examples per set on which attributions are taken, over all devices.
        alpha: False-positive rate of the spurious-neuron flags, in (0, 1).
        target: ``sequence`` (the paper's P), ``length_normalised`` (P^{1/T}) or ``log_probability``.
        method: Attribution method: ``gradient_x_activation`` (the default), ``integrated_gradients`` or another of
            :data:`~lightning_ssiuu.attribution.methods.METHODS`, or the import path of a callable.
        memory_budget: Bytes an attribution pass may take beside the weights, or ``2GB``; null: batches as they come.
        scores: Scores to compare; by default all that need no generated text.
        output: Directory for the results; by default the unlearned model's run.
        accelerator: Lightning's.
        devices: How many, one process each; ``auto``: all GPUs, or one process on the CPU. The figures do not depend
            on it, but for rounding.
        strategy: ``ddp``: the whole model on every device; ``fsdp2``: its weights cut over them.
        precision: Of the weights; attributions are taken in float32 at least.
        overwrite: Replace an earlier audit.
        architecture: Where the models' blocks and neurons are, as for ``fit``; null: as in the unlearned model's run,
            else by their types.

    Returns:
        The contents of ``audit.json``, on every process.

    Raises:
        UserError: If an argument is outside its range, before anything is written.
    """
    start = time.monotonic()
    if probe_examples < 1:
        raise UserError("probe_examples", probe_examples, "a number ≥ 1")
    if not 0 < alpha < 1:
        raise UserError("alpha", alpha, "a false-positive rate in (0, 1)")
    if target not in TARGETS:
        raise UserError("target", target, f"one of {list(TARGETS)}")
    attribute = attribution_method(method, target, memory_budget)
    for name in scores or []:
        check_score(name)
    if score is not None:
        check_score(score, "score")
    given: dict[str, str | None] = {
        "original": original,
        "unlearned": unlearned,
        "oracle": oracle,
        "after_attack": after_attack,
    }
    checkpoints = {name: checkpoint for name, checkpoint in given.items() if checkpoint is not None}
    hide_short_bars(*resolve_models(checkpoints))
    where = Devices(accelerator, devices, strategy, precision, run_architecture(unlearned, architecture))
    folder = output_directory(unlearned, output)
    refuse_existing("output", folder, ["audit.json"], overwrite)
    check_space("output", folder, 1 << 23)
    data = run_data(unlearned, data)
    data.setup("validate")
    check_tokenizers(checkpoints, data)
    data.check_share(where.n_ranks)
    if probe_examples < where.n_ranks:
        raise UserError("probe_examples", probe_examples, f"at least {where.n_ranks}, one for each device")
    relearning = recorded_relearning(unlearned, score, oracle is not None)
    score = score or (relearning["score"] if relearning else run_score(unlearned))
    probe = probe if probe is not None else RelearningProbe()
    cells = probe.cells(data) if relearning is None and relearning_probe else []
    for cell in cells:
        cell.check_share(where.n_ranks)
    options = [probe_examples, alpha, target, scores, precision, score, asdict(probe) if cells else None, method]
    with where.launched():
        found = measure(
            *(checkpoints, data, where, probe_examples, target, scores, score, alpha, own_change, show_text),
            method=attribute,
        )
        examined = found.examined
        changed: list[str] = [name for name in ("unlearned", "oracle") if name in examined]
        diagnoses = {
            name: diagnose(examined["original"], examined[name], alpha, found.own if name == "unlearned" else None)
            for name in changed
        }
        forgetting = found.forgetting(score)
        evidence: list[Evidence] = []
        ablation: dict[str, Any] | None = None
        # What was not unlearned needs no attack to be seen.
        if forgetting.share >= LEAST_FORGOTTEN:
            if cells:
                attacked = {name: checkpoints[name] for name in changed}
                relearning = probe_relearning(attacked, cells, probe, score, where)
            evidence += relearning_evidence(relearning["attacks"], forgetting) if relearning else []
            forced = forced_score(score)
            sites = examined["original"].attribution["forget"].sites
            flags = {"own change": diagnoses["unlearned"].own, "D⁻": diagnoses["unlearned"].flagged}
            ablation = undo_neurons(original, unlearned, sites, flags, data, forced, where)
            evidence += neuron_evidence(ablation, examined["original"].scores["forget"][forced])
        verdict = decide(forgetting, evidence)
        content: dict[str, Any] = {
            "verdict": verdict.content(),
            "scores": {name: one.scores for name, one in examined.items()},
            "influence": {name: diagnosis.figures() for name, diagnosis in diagnoses.items()},
            "flagged": [asdict(neuron) for neuron in diagnoses["unlearned"].table[:SHOWN_NEURONS]],
            "relearning": relearning,
            "ablation": ablation,
            "logit_lens": found.lens or None,
            "target": target,
            "method": method or "gradient_x_activation",
            "alpha": alpha,
        }
        moved = None
        if "after_attack" in examined:
            before, after = (examined[name].attribution for name in ("unlearned", "after_attack"))
            moved = (influences(before["forget"]), influences(after["forget"]))
            content["correlation"] = asdict(attribution_correlation(before, after))
            content["attribution_correlation"] = content["correlation"]["rho"]
        seconds = time.monotonic() - start
        content["provenance"] = provenance(seconds, where.device, json.dumps(options), data.content_sha256())
        if where.is_first:
            shown = _command(
                checkpoints,
                {"score": score, "target": target, "alpha": alpha} | ({"method": method} if method else {}),
                show_text,
            )
            _write(folder, content, diagnoses, Measured(checkpoints, shown, {}, moved, 0, found.examples(data)))
            print_audit(content)
    return content


def _write(folder: Path, content: Mapping[str, Any], diagnoses: Mapping[str, Diagnosis], measured: Measured) -> None:
    table = diagnoses["unlearned"].table
    variations = {name: diagnosis.variation for name, diagnosis in diagnoses.items()}
    page = report_html(content, replace(measured, variations=variations, n_flagged=len(table)))
    write_csv(folder / "audit_spurious_neurons.csv", CSV_HEADER, map(astuple, table))
    save_plots(folder / "plots", diagnoses)
    with written_atomically(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    write_json(folder / "audit.json", content)


def _command(checkpoints: Mapping[str, str], options: Mapping[str, Any], show_text: bool) -> str:
    words = [
        f"--{name}" if value is None else f"--{name} {shlex.quote(str(value))}"
        for name, value in [*checkpoints.items(), *options.items(), *([("show_text", None)] if show_text else [])]
    ]
    return " ".join(["lightning-ssiuu audit", *words])


def save_plots(folder: Path, diagnoses: Mapping[str, Diagnosis]) -> None:
    """Heat maps per model, and one picture of all cumulative curves, as ``audit_*.png``."""
    for name, diagnosis in diagnoses.items():
        save_heat_maps(folder / f"audit_heat_maps_{name}.png", diagnosis.variation)
    curves = {name: diagnosis.variation for name, diagnosis in diagnoses.items()}
    save_cumulative_curves(folder / "audit_cumulative_curves.png", curves)


def print_audit(content: dict[str, Any], console: Console | None = None) -> None:
    """Print the contents of ``audit.json`` as a table, and the verdict.

    Example:
        >>> scores = {name: {"forget": {"probability": p}} for name, p in (("original", 90.0), ("unlearned", 9.0))}
        >>> content = {"scores": scores, "influence": {"unlearned": {"d_plus_total": 1.0, "d_minus_total": 2.0}}}
        >>> content["verdict"] = {"sentence": "Mixed: [sic]."}
        >>> print_audit(content, Console(width=60, color_system=None))  # doctest: +NORMALIZE_WHITESPACE
                              original  unlearned
        forget probability        90.0        9.0  %
        d_plus_total                            1
        d_minus_total                           2
        Mixed: [sic].
    """
    console = console or Console()
    models = list(content["scores"])
    table = Table(box=None)
    table.add_column("")
    for name in models:
        table.add_column(name, justify="right")
    table.add_column("")
    for split, measured in content["scores"][models[0]].items():
        for score in measured:
            values = [f"{content['scores'][name][split][score]:.1f}" for name in models]
            table.add_row(f"{split} {score}", *values, "%")
    for figure in next(iter(content["influence"].values())):
        values = [f"{content['influence'][n][figure]:.3g}" if n in content["influence"] else "" for n in models]
        table.add_row(figure, *values, "")
    console.print(table)
    if "attribution_correlation" in content:
        console.print(f"attribution correlation before/after attack: {content['attribution_correlation']:.3f}")
    console.print(Text(content["verdict"]["sentence"]))


def run(args: list[str]) -> None:
    """Parse and run ``audit``.

    Args:
        args: ``["--original", "tiny", "--unlearned", "runs/ssiuu/model", ...]``.
    """
    run_function(audit, "audit", args)
