"""``lightning-ssiuu audit``: numbers and plots that tell erasing from hiding."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from lightning_ssiuu.audit.diagnosis import Diagnosis, attribution_correlation, diagnose, examine
from lightning_ssiuu.audit.plots import save_cumulative_curves, save_heat_maps
from lightning_ssiuu.callbacks.neuron_attribution import CSV_HEADER
from lightning_ssiuu.command_line import run_function
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.devices import Devices, Strategy
from lightning_ssiuu.errors import UserError
from lightning_ssiuu.evaluation import check_score
from lightning_ssiuu.files import check_space, refuse_existing, write_csv, write_json
from lightning_ssiuu.functional.attribution import TARGETS, Target
from lightning_ssiuu.provenance import provenance
from lightning_ssiuu.runs import check_tokenizers, naming, output_directory, resolve_models, run_data
from lightning_ssiuu.screen import hide_short_bars


def audit(
    original: str,
    unlearned: str,
    oracle: str | None = None,
    after_attack: str | None = None,
    data: UnlearningDataModule | None = None,
    probe_examples: int = 64,
    alpha: float = 1e-3,
    target: Target = "length_normalised",
    scores: Sequence[str] | None = None,
    output: str | None = None,
    accelerator: str = "auto",
    devices: int | Literal["auto"] = 1,
    strategy: Strategy = "auto",
    precision: Literal["32-true", "bf16-true"] = "32-true",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Compare a model before and after unlearning and write ``audit.json``, ``audit_spurious_neurons.csv`` and plots.

    Args:
        original: The model before unlearning.
        unlearned: The model after it; a directory written by ``fit``, or any checkpoint.
        oracle: A model retrained without the forget set, for what erasing looks like.
        after_attack: The unlearned model after a relearning attack (``attack --save_attacked true``): adds the
            correlation of attributions before and after the attack.
        data: The data module to judge by; by default the unlearned model's run's, else the embedded facts.
        probe_examples: Examples per set on which attributions are taken, over all devices.
        alpha: False-positive rate of the spurious-neuron flags, in (0, 1).
        target: ``sequence`` (the paper's P), ``length_normalised`` (P^{1/T}) or ``log_probability``.
        scores: Scores to compare; by default all that need no generated text.
        output: Directory for the results; by default the unlearned model's run.
        accelerator: Lightning's.
        devices: How many, one process each; ``auto``: all GPUs, or one process on the CPU. The figures do not depend
            on it, but for rounding.
        strategy: ``ddp``: the whole model on every device; ``fsdp2``: its weights cut over them.
        precision: Of the weights; attributions are taken in float32 at least.
        overwrite: Replace an earlier audit.

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
    for name in scores or []:
        check_score(name)
    given = {"original": original, "unlearned": unlearned, "oracle": oracle, "after_attack": after_attack}
    checkpoints = {name: checkpoint for name, checkpoint in given.items() if checkpoint is not None}
    hide_short_bars(*resolve_models(checkpoints))
    where = Devices(accelerator, devices, strategy, precision)
    folder = output_directory(unlearned, output)
    refuse_existing("output", folder, ["audit.json"], overwrite)
    check_space("output", folder, 1 << 22)
    data = run_data(unlearned, data)
    data.setup("validate")
    check_tokenizers(checkpoints, data)
    where.check_share(data)
    if probe_examples < where.n_ranks:
        raise UserError("probe_examples", probe_examples, f"at least {where.n_ranks}, one for each device")
    config = json.dumps([probe_examples, alpha, target, scores, precision])
    with where.launched():
        examined = {}
        for name, checkpoint in tqdm(checkpoints.items(), desc="audit", unit="model", disable=not where.is_first):
            with naming(name):
                examined[name] = examine(checkpoint, data, probe_examples, target, scores, where)
        changed = [name for name in ("unlearned", "oracle") if name in examined]
        diagnoses = {name: diagnose(examined["original"], examined[name], alpha) for name in changed}
        content: dict[str, Any] = {
            "scores": {name: one.scores for name, one in examined.items()},
            "influence": {name: diagnosis.figures() for name, diagnosis in diagnoses.items()},
            "target": target,
            "alpha": alpha,
        }
        if "after_attack" in examined:
            content["attribution_correlation"] = attribution_correlation(
                examined["unlearned"].attribution, examined["after_attack"].attribution
            )
        content["provenance"] = provenance(time.monotonic() - start, where.device, config, data.content_sha256())
        if where.is_first:
            flagged = diagnoses["unlearned"].flagged
            write_csv(folder / "audit_spurious_neurons.csv", CSV_HEADER, map(astuple, flagged))
            save_plots(folder / "plots", diagnoses)
            write_json(folder / "audit.json", content)
            print_audit(content)
    return content


def save_plots(folder: Any, diagnoses: dict[str, Diagnosis]) -> None:
    """Heat maps per model, and one picture of all cumulative curves, as ``audit_*.png``."""
    for name, diagnosis in diagnoses.items():
        save_heat_maps(folder / f"audit_heat_maps_{name}.png", diagnosis.variation)
    curves = {name: diagnosis.variation for name, diagnosis in diagnoses.items()}
    save_cumulative_curves(folder / "audit_cumulative_curves.png", curves)


def print_audit(content: dict[str, Any], console: Console | None = None) -> None:
    """Print the contents of ``audit.json`` as a table.

    Example:
        >>> scores = {name: {"forget": {"probability": p}} for name, p in (("original", 90.0), ("unlearned", 9.0))}
        >>> content = {"scores": scores, "influence": {"unlearned": {"d_plus_total": 1.0, "d_minus_total": 2.0}}}
        >>> print_audit(content, Console(width=60, color_system=None))  # doctest: +NORMALIZE_WHITESPACE
                              original  unlearned
        forget probability        90.0        9.0  %
        d_plus_total                            1
        d_minus_total                           2
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


def run(args: list[str]) -> None:
    """Parse and run ``audit``.

    Args:
        args: ``["--original", "tiny", "--unlearned", "runs/ssiuu/model", ...]``.
    """
    run_function(audit, "audit", args)
