"""Cheap figures of unlearned models, and how well each predicts what an attack brings back.

    python benchmarks/indicators.py runs/gd/0 runs/gd/1 runs/mudman/0 [--output indicators.csv] [--steps 10 ...]

Every run is the directory of a ``fit``; its original model and its data are those of its ``config.yaml``. One JSON line
per run: what :func:`lightning_ssiuu.attribution.indicators.indicators` gives, scores, D⁺, D⁻ and flagged neurons of its
``metrics.json``, and ``recovery``, the highest forget score in its ``attack.json`` (mean over seeds of the highest over
learning rates and epochs, percent), where there is one. With five attacked runs or more, Spearman's rank correlation of
every figure with the recovery follows, with a 95 % bootstrap interval over runs. ``--output`` keeps the figures as CSV
(``fit`` is the run's directory), and takes runs that it has from there.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from robustness.comparison import rank_correlation
from timing import markdown

from lightning_ssiuu.attribution.indicators import indicators
from lightning_ssiuu.attribution.update import weights_of
from lightning_ssiuu.datamodules.invented import control_of
from lightning_ssiuu.evaluation.elicitation import Elicitation
from lightning_ssiuu.evaluation.results import read_config
from lightning_ssiuu.evaluation.runs import run_data
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model, load_tokenizer


def measured(run: Path, adversary: Elicitation, probes: int, original: str | None) -> dict[str, Any]:
    """The figures of one run that need its model."""
    start, model = original or read_config(run, "run")["model"]["init_args"]["checkpoint"], str(run / "model")
    data = run_data(model, None)
    data.setup("validate")
    control = control_of(data)
    before = weights_of(AnswerModel(load_model(start, torch.float32)))
    unlearned = AnswerModel(load_model(model, torch.float32))
    strangers = None if control is None else control.data.splits.forget
    return indicators(unlearned, load_tokenizer(model), before, data, adversary, strangers, probes)


def known(run: Path) -> dict[str, float]:
    """What the run's own files say."""
    after = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["after"]
    found = {name: after[name] for name in ("forget_score", "retain_score", "test_score") if name in after}
    found |= after.get("influence", {})
    if (file := run / "attack.json").is_file():
        rows = json.loads(file.read_text(encoding="utf-8"))["attacks"]
        scores = [row["unlearned"]["forget_score"]["mean"] for row in rows if row["attack"].startswith("harmful")]
        found |= {"recovery": max(scores)} if scores else {}
    return found


def correlations(runs: Sequence[Mapping[str, Any]]) -> str:
    """Correlations of every figure with the recovery, the strongest first; empty of fewer than five attacked runs."""
    attacked = [row for row in runs if "recovery" in row]
    if len(attacked) < 5:
        return ""
    recovery, rows = [row["recovery"] for row in attacked], []
    for name in attacked[0]:
        values = [row.get(name) for row in attacked]
        if name == "recovery" or not all(isinstance(value, (int, float)) for value in values):
            continue
        if (rho := rank_correlation(values, recovery)) is not None:  # type: ignore[arg-type]
            rows.append((name, *rho))
    rows.sort(key=lambda row: -abs(row[1]))
    header = [f"figure, {len(attacked)} runs", "Spearman's ρ", "95 %"]
    return markdown(header, [[name, f"{rho:.2f}", f"{low:.2f} to {high:.2f}"] for name, rho, low, high in rows])


def kept(path: Path | None) -> dict[str, dict[str, Any]]:
    """The rows of a CSV file by their run."""
    if path is None or not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row.pop("fit"): {k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)}


def write(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """One line per run; figures of figures, such as distances by kind, are left out."""
    names = dict.fromkeys(name for row in rows.values() for name, value in row.items() if not isinstance(value, dict))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["fit", *names], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"fit": run} | dict(row) for run, row in rows.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a JSON line per run, then the correlations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument(
        "--original", help="the model before unlearning; by default the one the run's config.yaml names"
    )
    parser.add_argument("--probes", type=int, default=32, help="examples per set for gradients and the line")
    parser.add_argument("--output", type=Path, help="a CSV file")
    for name, default in (("share", 0.3), ("learning_rate", 2e-4), ("steps", 10), ("batch_size", 8)):
        parser.add_argument(f"--{name}", type=type(default), default=default, help="of the adversary")
    options = parser.parse_args(arguments)
    adversary = Elicitation(options.share, options.learning_rate, options.steps, options.batch_size)
    rows = kept(options.output)
    for run in options.runs:
        if str(run) not in rows:
            rows[str(run)] = measured(run, adversary, options.probes, options.original)
        rows[str(run)] |= known(run)
        print(json.dumps({"fit": str(run)} | rows[str(run)]), flush=True)
        if options.output is not None:
            write(options.output, rows)
    print(correlations([rows[str(run)] for run in options.runs]))


if __name__ == "__main__":
    main()
