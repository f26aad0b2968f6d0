"""``lightning-ssiuu audit``: a verdict, with numbers and pictures that tell erasing from hiding."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, Literal

from rich.text import Text
from torch import Tensor

from lightning_ssiuu.attribution.diagnosis import attribution_correlation, check_probes, diagnose, influences
from lightning_ssiuu.attribution.influence import CSV_HEADER, SpuriousNeuron
from lightning_ssiuu.attribution.methods import attribution_method
from lightning_ssiuu.cli.control import control_beside
from lightning_ssiuu.cli.parsing import run_function
from lightning_ssiuu.cli.report import Report, print_table
from lightning_ssiuu.cli.run_loggers import log_verdict
from lightning_ssiuu.cli.suites import published_model, suite_module
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.runs import run_score
from lightning_ssiuu.evaluation.scores import check_score
from lightning_ssiuu.models.answers import Target
from lightning_ssiuu.models.loading import check_same_shape
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
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import print_written, refuse_links, write_csv, write_json, written_atomically
from lightning_ssiuu.utils.terminal import three_digits


def audit(
    original: str | None = None,
    unlearned: str | None = None,
    oracle: str | None = None,
    after_attack: str | None = None,
    data: UnlearningDataModule | None = None,
    score: str | None = None,
    relearning_probe: bool = True,
    probe: RelearningProbe | None = None,
    control: str = "auto",
    own_change: bool = True,
    show_text: bool = False,
    probe_examples: int = 64,
    alpha: float = 1e-3,
    target: Target = "length_normalised",
    method: str | None = None,
    memory_budget: int | str | None = None,
    scores: Sequence[str] | None = None,
    output: str | None = None,
    devices: Devices | None = None,
    overwrite: bool = False,
    suite: Literal["tofu"] | None = None,
    suite_data: str | None = None,
    keep_oracle: bool = False,
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
        relearning_probe: Make a small relearning attack where the run's ``attack.json`` has none with this score and
            oracle.
        probe: Options of that attack; its learning rates suit small models.
        control: What that attack teaches by itself, where there is no oracle to say so: as in ``attack``.
        own_change: Also flag neurons by what their own changed weights cost: precise where few neurons hide the answer,
            empty where the change is spread out. Takes eight more passes over the forget probes, over the retain ones
            too where a neuron costs a tenth of the probability, and, in main memory, three times the weights. Not with
            strategy ``fsdp2``.
        show_text: Put questions of the forget set, and the answers of both models, into the report.
        probe_examples: Examples per set on which attributions are taken, over all devices.
        alpha: False-positive rate of the spurious-neuron flags, in (0, 1).
        target: ``sequence`` (the paper's P), ``length_normalised`` (P^{1/T}) or ``log_probability``.
        method: Attribution method: ``gradient_x_activation`` (the default), ``integrated_gradients`` or another of
            :data:`~lightning_ssiuu.attribution.methods.METHODS`, or the import path of a callable.
        memory_budget: Bytes an attribution pass may take beside the weights, or ``2GB``; null: batches as they come.
        scores: Scores to compare; by default all that need no generated text, and the most probable forget answer.
        output: Directory for the results; by default the unlearned model's run.
        devices: Where to run; nothing is trained, so not in ``bf16-mixed``. The figures do not depend on it, but for
            rounding; attributions are taken in float32 at least.
        overwrite: Replace an earlier audit.
        suite: ``tofu``: find what is not given by the unlearned model's name, as open-unlearning names models: original
            and oracle (directories beside it, else on the hub), TOFU's split, how it is asked, an output
            ``audits/NAME``. ``keep_oracle`` is then on.
        suite_data: Directory or hub id of the suite's data; null: ``locuslab/TOFU``.
        keep_oracle: Keep the oracle's curves under the audit's own attack in the cache, for the next model that is
            judged beside it.

    Returns:
        The contents of ``audit.json``, on every process.

    Raises:
        UserError: If an argument is outside its range, before anything is written.
    """
    published = None
    if suite is not None:
        published, keep_oracle = published_model(unlearned), True
        original, oracle = original or published.original, oracle or published.oracle
        data = data if data is not None else suite_module(published, suite_data)
        output = output or f"audits/{published.name}"
    elif suite_data is not None:
        raise UserError("suite_data", suite_data, "null without a suite: --data names data of your own")
    if original is None or unlearned is None:
        missing = "original" if original is None else "unlearned"
        raise UserError(missing, None, "a model; with --suite the unlearned one's name says what the original is")
    devices = devices if devices is not None else Devices()
    check_probes(probe_examples, alpha)
    if devices.precision == "bf16-mixed":
        raise UserError("precision", devices.precision, "'32-true', 'bf16-true': nothing is trained")
    for name in scores or []:
        check_score(name)
    if score is not None:
        check_score(score, "score")
    attribute = attribution_method(method, target, memory_budget)
    given = {"original": original, "unlearned": unlearned, "oracle": oracle, "after_attack": after_attack}
    with Report(given, data, devices, output, ["audit.json"], overwrite, "unlearned", needed=1 << 23) as report:
        refuse_links("output", report.folder, ["audit_spurious_neurons.csv", "plots", "report.html"])
        data, models = report.data, report.models
        check_same_shape(models)
        data.setup("validate")
        data.check_share(devices.n_ranks)
        if probe_examples < devices.n_ranks:
            raise UserError("probe_examples", probe_examples, f"at least {devices.n_ranks}, one for each device")
        relearning = recorded_relearning(unlearned, score, oracle is not None)
        score = score or (relearning["score"] if relearning else run_score(unlearned, argument="unlearned"))
        probe = (probe or RelearningProbe()) if relearning is None and relearning_probe else None
        if probe is not None:
            probe.check(data, score, devices)
        beside = control_beside(data, control, oracle is not None) if probe is not None else None
        if probe is not None and beside is not None:
            probe.check(beside.data, score, devices)
        attacked = None if probe is None else asdict(probe) | ({"control": beside.kind} if beside else {})
        options = [probe_examples, alpha, target, scores, devices.precision, score, attacked, method]
        with devices.launched():
            measured = measure(
                *(models, data, devices, probe_examples, target, scores, score, alpha, own_change, show_text),
                method=attribute,
            )
            examined = measured.examined
            changed: list[str] = [name for name in ("unlearned", "oracle") if name in examined]
            diagnoses = {
                name: diagnose(
                    examined["original"], examined[name], alpha, measured.own if name == "unlearned" else None
                )
                for name in changed
            }
            forgetting = measured.forgetting(score)
            evidence: list[Evidence] = []
            ablation: dict[str, Any] | None = None
            # What was not unlearned needs no attack to be seen.
            if forgetting.share >= LEAST_FORGOTTEN:
                if probe is not None:
                    attackable = {name: models[name] for name in changed}
                    invented = beside.data if beside else None
                    relearning = probe_relearning(attackable, data, probe, score, devices, invented, keep_oracle)
                evidence += relearning_evidence(relearning["attacks"], forgetting) if relearning else []
                forced = forced_score(score)
                sites = examined["original"].attribution["forget"].sites
                flags = {"own change": diagnoses["unlearned"].own, "D⁻": diagnoses["unlearned"].flagged}
                as_it_is = examined["unlearned"].scores["forget"][forced]
                ablation = undo_neurons(original, unlearned, sites, flags, data, forced, as_it_is, devices)
                evidence += neuron_evidence(ablation, examined["original"].scores["forget"][forced])
            content: dict[str, Any] = {
                "verdict": decide(
                    forgetting, evidence, measured.retention(data), measured.retention(data, "oracle")
                ).content(),
                "scores": {name: model.scores for name, model in examined.items()},
                "influence": {name: diagnosis.figures() for name, diagnosis in diagnoses.items()},
                "flagged": [asdict(neuron) for neuron in diagnoses["unlearned"].table[:SHOWN_NEURONS]],
                "relearning": relearning,
                "ablation": ablation,
                "logit_lens": measured.lens or None,
                "target": target,
                "method": method or "gradient_x_activation",
                "alpha": alpha,
            }
            moved: tuple[Tensor, Tensor] | None = None  # influences before and after the attack
            if "after_attack" in examined:
                before, after = (examined[name].attribution for name in ("unlearned", "after_attack"))
                content["correlation"] = asdict(attribution_correlation(before, after))
                content["attribution_correlation"] = content["correlation"]["rho"]
                moved = influences(before["forget"]), influences(after["forget"])
            chosen: dict[str, Any] = models | {
                "score": score,
                "target": target,
                "alpha": alpha,
                "probe_examples": probe_examples,
            }
            named: dict[str, Any] = {"method": method, "output": output, "suite": suite, "suite_data": suite_data}
            named |= {"memory_budget": memory_budget}
            chosen |= {name: value for name, value in named.items() if value}
            chosen |= {"control": control} if control != "auto" else {}
            chosen |= {"precision": devices.precision} if devices.precision != "32-true" else {}
            chosen |= {"scores": list(scores)} if scores else {}
            if relearning is not None and relearning["source"] == "probe":
                chosen |= {f"probe.{name}": value for name, value in relearning["options"].items()}
            words = [f"--{name} {shlex.quote(str(value))}" for name, value in chosen.items()]
            words += ["--own_change false"] * (not own_change) + ["--show_text"] * show_text
            words += ["--relearning_probe false"] * (not relearning_probe)
            words += ["--keep_oracle"] * (keep_oracle and suite is None)
            words += report.data_words if suite is None else []
            command = " ".join(["lightning-ssiuu audit", *words])
            content |= {"data_options": report.data_options if suite is None else {}}
            content |= {"score": score, "command": command, "provenance": report.provenance(options)}
            if published is not None and suite is not None:
                content["suite"] = published.content(suite)
            if devices.is_first:
                variations = {name: diagnosis.variation for name, diagnosis in diagnoses.items()}
                examples = measured.examples(data)
                table = diagnoses["unlearned"].table
                measures = Measured(models, command, variations, moved, len(table), examples)
                try:
                    _write(report.folder, content, table, measures)
                finally:  # also where the disk refuses
                    print_audit(content)
                log_verdict(str(unlearned), content, variations["unlearned"])
                print_written(report.folder, ["report.html", "audit.json", "audit_spurious_neurons.csv", "plots"])
        return content


def _write(folder: Path, content: dict[str, Any], table: Sequence[SpuriousNeuron], measured: Measured) -> None:
    from lightning_ssiuu.attribution.plots import save_cumulative_curves, save_heat_maps

    page = report_html(content, measured)
    write_csv(folder / "audit_spurious_neurons.csv", CSV_HEADER, map(astuple, table))
    for name, variation in measured.variations.items():
        save_heat_maps(folder / "plots" / f"audit_heat_maps_{name}.png", variation)
    save_cumulative_curves(folder / "plots" / "audit_cumulative_curves.png", measured.variations)
    with written_atomically(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    write_json(folder / "audit.json", content)


def print_audit(content: dict[str, Any]) -> None:
    """Print the contents of ``audit.json`` as a table, and the verdict."""
    models, influence = list(content["scores"]), content["influence"]
    rows = [["", *models, ""]]
    for split, measured in content["scores"][models[0]].items():
        for score in measured:
            rows.append([f"{split} {score}", *(f"{content['scores'][m][split][score]:.1f}" for m in models), "%"])
    for figure in next(iter(influence.values())):
        rows.append([figure, *(three_digits(influence[m][figure]) if m in influence else "" for m in models), ""])
    notes: list[str | Text] = [Text(content["verdict"]["sentence"])]  # Text: brackets are no markup
    if content["verdict"].get("oracle_retains") is False:
        notes.append("The oracle does not retain: what is measured beside it says little.")
    if "attribution_correlation" in content:
        notes.insert(0, f"attribution correlation before/after attack: {content['attribution_correlation']:.3f}")
    print_table(rows, notes=notes)


def run(args: list[str]) -> None:
    """Parse and run ``audit``."""
    run_function(audit, "audit", args)
