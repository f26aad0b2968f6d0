"""Tables of what penalty_conditions.py has run."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from penalty_arms import ARMS, COMPARED, Arm
from robustness.comparison import estimate
from timing import markdown


def recovered(curves: Sequence[dict[str, Any]], p: float, up_to: float = math.inf) -> float:
    """Highest score of attacks with rates up to one, mean over attack seeds."""
    own = [c for c in curves if c["p"] == p and c["learning_rate"] <= up_to]
    seeds = {c["seed"] for c in own}
    return mean(max(max(c["forget_scores"]) for c in own if c["seed"] == seed) for seed in seeds)


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):.3g} ± {stdev(values):.2g}" if len(values) > 1 else f"{values[0]:.3g}"


def interval(differences: Sequence[float]) -> str:
    """Mean with the 95 % interval of Student's t."""
    if (found := estimate(differences)) is None:
        return "one seed: no comparison"
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def place_of(options: argparse.Namespace, arm: Arm, seed: int) -> Path:
    """Where a run lies."""
    return options.output / str(arm).replace(", ", "_").replace(" ", "-") / str(seed)


def reached(folder: Path) -> bool:
    """Whether a finished run came down to the level."""
    return json.loads((folder / "fit.json").read_text())["passed"] is not None


def read(options: argparse.Namespace, arm: Arm, name: str) -> dict[int, Any]:
    """What there is of an arm's runs that came down to the level, by training seed."""
    folders = {seed: place_of(options, arm, seed) for seed in options.seeds}
    done = {seed: folder for seed, folder in folders.items() if (folder / "fit.json").is_file() and reached(folder)}
    files = {seed: folder / f"{name}.json" for seed, folder in done.items()}
    return {seed: json.loads(file.read_text()) for seed, file in files.items() if file.is_file()}


def row_of(options: argparse.Namespace, arm: Arm) -> list[str]:
    """A line of the table of runs."""
    fits, attacks, base = (read(options, *which) for which in ((arm, "fit"), (arm, "attack"), (arm.control, "attack")))
    seeds = sorted(fits.keys() & attacks.keys())
    n_runs = sum((place_of(options, arm, seed) / "fit.json").is_file() for seed in options.seeds)
    if not seeds:
        return [str(arm), f"0 of {n_runs}", *[""] * (len(HEADER) - 2)] if n_runs else []
    cells = [str(arm), f"{len(seeds)} of {n_runs}", spread([fits[s]["steps"] for s in seeds])]
    for split in ("retain", "test"):
        values = [fits[s]["scores"].get(split) for s in seeds]
        cells.append(spread(values) if None not in values else "")
    for p in (0.1, 0.3):
        found = {s: recovered(attacks[s]["curves"], p) for s in seeds}
        paired = [found[s] - recovered(base[s]["curves"], p) for s in seeds if s in base]
        cells += [spread(list(found.values())), "" if arm == arm.control or not paired else interval(paired)]
    for name in ("log10_penalty_ratio", "objective_participation", "penalty_participation", "update_signs_changed"):
        values = [
            median(f[name] for f in fits[s]["figures"] if name in f) for s in seeds if name in fits[s]["figures"][-1]
        ]
        cells.append(f"{mean(values):.2g}" if values else "")
    return cells


HEADER = [
    "run",
    "came down",
    "steps",
    "retain",
    "test",
    "p 0.1",
    "less gradient difference",
    "p 0.3",
    "less gradient difference",
]
HEADER += ["log10 norm ratio", "participation, loss", "penalty", "signs changed"]


def runs_table(options: argparse.Namespace, arms: Sequence[Arm]) -> list[list[str]]:
    """Lines of these arms, each after its control."""
    shown = {str(arm): arm for own in arms for arm in (own.control, own)}
    return [row for arm in shown.values() if (row := row_of(options, arm))]


def controls_table(options: argparse.Namespace) -> list[list[str]]:
    """The penalty on negative attributions less those on others, paired by training seed."""
    rows = []
    for arm in (arm for arm in ARMS["k"] if arm.which != "negative"):
        cells, both = [arm.which], [replace(arm, which="negative"), arm]
        attacks, fits = ([read(options, each, name) for each in both] for name in ("attack", "fit"))
        seeds = sorted(attacks[0].keys() & attacks[1].keys())
        for p in (0.1, 0.3):
            ours, theirs = ([recovered(found[s]["curves"], p) for s in seeds] for found in attacks)
            cells.append(interval([a - b for a, b in zip(ours, theirs, strict=True)]))
        for split in ("retain", "test"):
            ours, theirs = ([found[s]["scores"].get(split, math.nan) for s in seeds] for found in fits)
            cells.append(interval([a - b for a, b in zip(ours, theirs, strict=True)]))
        rows += [cells] if seeds else []
    return rows


def attacks_table(options: argparse.Namespace, name: str, rates: Sequence[float]) -> list[list[str]]:
    """Lines of another attack on what is compared, up to each of these rates."""
    rows = []
    for arm in COMPARED:
        found, base = read(options, arm, name), read(options, arm.control, name)
        for p in (0.1, 0.3) if found else ():
            cells = [str(arm), str(p), str(len(found))]
            for rate in rates:
                values = {s: recovered(found[s]["curves"], p, rate) for s in found}
                paired = [values[s] - recovered(base[s]["curves"], p, rate) for s in values if s in base]
                gap = "" if arm == arm.control or not paired else f"; {interval(paired)}"
                cells.append(spread(list(values.values())) + gap)
            rows.append(cells)
    return rows


def report(options: argparse.Namespace) -> None:
    """Print and write all there is."""
    parts = {letter: (HEADER, runs_table(options, arms)) for letter, arms in ARMS.items()}
    first, rates = ["run", "p", "seeds"], sorted(options.wide_rates)
    parts["g"] = [*first, *(f"rates up to {rate:g}" for rate in rates)], attacks_table(options, "wide", rates)
    parts["f"] = [*first, "multiple choice"], attacks_table(options, "choice", [math.inf])
    parts["negative attributions less others"] = ["others", "p 0.1", "p 0.3", "retain", "test"], controls_table(options)
    text = "\n\n".join(f"### {letter}\n\n{markdown(*part)}" for letter, part in parts.items() if part[1])
    (options.output / "report.md").write_text(text + "\n", encoding="utf-8")
    print(text)
