"""The Markdown of a benchmark: what was compared at what, and what cannot be compared yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.timing import markdown as table

from .collect import retained
from .comparison import BASELINE, Estimate, Record, attacked, by_label, cells, gap, over, paired


def markdown(results: Mapping[str, Any]) -> str:
    """Everything that ``results.json`` says, as tables."""
    parts = [_choices(results["choices"])]
    tested = [record for record in results["runs"] if record["phase"] == "test"]
    for data in dict.fromkeys(record["data"] for record in tested):
        parts.append(f"## {data}\n\n" + of_data([record for record in tested if record["data"] == data]))
    if results["failed"]:
        parts.append("## Failed\n\n" + "\n".join(f"- {line}" for line in results["failed"]))
    if results["left"]:
        parts.append(f"## Not run yet\n\n{len(results['left'])} stages: " + ", ".join(results["left"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def of_data(records: Sequence[Record]) -> str:
    """The tables of one data set."""
    groups = by_label(records)
    parts = [
        f"{label}: one training seed, so it is compared with nothing."
        for label, runs in groups.items()
        if len(runs) == 1
    ]
    missed = [f"{record['label']} (seed {record['seed']})" for record in records if not record["reached"]]
    if missed:
        parts.append("Did not reach the forget score, so left out: " + ", ".join(missed) + ".")
    compared = {label: runs for label, runs in groups.items() if len(runs) > 1}
    if compared:
        parts = [_models(compared), *(_attack(compared, cell) for cell in cells(records)), *parts]
    return "\n\n".join(parts)


def _models(groups: Mapping[str, Sequence[Record]]) -> str:
    baseline = groups.get(BASELINE, [])
    header = [
        "objective",
        "n",
        "steps",
        "forget",
        "retain",
        "test",
        "retain kept, %",
        "test kept, %",
        f"CPU, × {BASELINE}",
        "audit",
    ]
    rows = []
    for label, runs in groups.items():
        figures: list[Callable[[Record], float | None]] = [
            lambda run: run["steps"],
            *(lambda run, split=split: run["after"].get(split) for split in ("forget", "retain", "test")),  # type: ignore[misc]
            retained,
            lambda run: retained(run, "test"),
        ]
        cost = paired(runs, baseline, lambda run: run["cpu_seconds"], ratio=True)
        verdicts = [run["verdict"] for run in runs if "verdict" in run]
        counted = ", ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts))
        shown = "" if cost is None else f"{cost.mean:.2f} ({cost.low:.2f} to {cost.high:.2f})"
        rows.append([label, str(len(runs)), *(_text(over(runs, figure)) for figure in figures), shown, counted])
    oracle = [run["oracle"] for run in next(iter(groups.values())) if "oracle" in run]
    if oracle:
        values = {split: [each[split] for each in oracle if split in each] for split in ("forget", "retain", "test")}
        means = [f"{mean(each):.1f}" if each else "" for each in values.values()]
        rows.append(["oracle", str(len(oracle)), "", *means, "", "", "", ""])
    return table(header, rows)


def _attack(groups: Mapping[str, Sequence[Record]], cell: tuple[str, float | None]) -> str:
    name, p = cell
    runs = [run for group in groups.values() for run in group]
    kinds = [
        row["reference_is"]
        for run in runs
        for row in run["attacks"]
        if (row["attack"], row["p"]) == cell and "reference_is" in row
    ]
    reference = kinds[0] if kinds else "oracle"
    header = [
        "objective",
        "before",
        "highest",
        f"the {reference}'s",
        f"beyond the {reference} (95 %)",
        f"beyond {BASELINE} (95 %)",
        "inside the grid",
    ]
    rows = []
    for label, group in groups.items():
        baseline = None if label == BASELINE else paired(group, groups.get(BASELINE, []), attacked(cell))
        inside = [row["inside_grid"] for run in group for row in run["attacks"] if (row["attack"], row["p"]) == cell]
        figures = [_text(over(group, attacked(cell, key))) for key in ("before", "highest", "reference")]
        rows.append(
            [
                label,
                *figures,
                _interval(over(group, gap(cell))),
                _interval(baseline),
                f"{sum(map(bool, inside))} of {len(inside)}",
            ]
        )
    return f"Attack {name}" + ("" if p is None else f", p = {p:g}") + ":\n\n" + table(header, rows)


def _choices(choices: Mapping[str, Any]) -> str:
    lines = []
    for name, choice in choices.items():
        if choice is None:
            lines.append(f"- {name}: no setting reached the forget score on the tune data, so it is not run.")
        elif "tried" in choice:
            kept = "" if choice["kept_enough"] else ", none of which kept enough"
            lines.append(f"- {name}: {choice['name']}, of {len(choice['tried'])} settings that reached it{kept}")
        else:
            lines.append(f"- {name}: {choice['name']}, as declared: nothing was tuned")
    return "## Settings, chosen on the tune data\n\n" + "\n".join(lines) if lines else ""


def _text(estimate: Estimate | None) -> str:
    return "" if estimate is None else str(estimate)


def _interval(estimate: Estimate | None) -> str:
    return "" if estimate is None else estimate.interval
