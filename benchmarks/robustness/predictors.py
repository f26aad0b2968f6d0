"""Which figures of a run, known before any attack, predict what the attack finds?

    python -m benchmarks.robustness.predictors runs/robustness/results.json [MORE ...] [--columns FILE]

Spearman's rank correlation of every figure in ``metrics.json`` and ``audit.json`` with the recovery of the run, the
highest forget score minus the oracle's (the control's, where there is no oracle), over all runs of the files, with a
95 % bootstrap interval over objectives, whose training seeds are drawn together. Figures are ranked within a data set
first, as recovery is, so that data sets which differ in both do not make a correlation. ``--columns`` adds figures from
a CSV file with a column ``fit`` (the run's directory, as ``results.json`` has it under ``folder``) and one per figure.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import rankdata

from .comparison import Record, attacked, cells, gap, rank_correlation
from .tables import table


def correlations(
    records: Sequence[Record], cell: tuple[str, float | None]
) -> list[tuple[str, int, float, float, float]]:
    """Name, number of runs, ρ and its interval, the strongest first; figures of fewer than five runs are not there."""
    found = gap(cell) if any("reference" in row for record in records for row in record["attacks"]) else attacked(cell)
    known = [(record, value) for record in records if (value := found(record)) is not None]
    rows = []
    for name in dict.fromkeys(name for record, _ in known for name in record.get("indicators", {})):
        shown = [(record, value) for record, value in known if name in record.get("indicators", {})]
        pairs = [(record["data"], record["indicators"][name], value) for record, value in shown]
        ranks = [ranked([(data, pair[which]) for data, *pair in pairs]) for which in (0, 1)]
        groups = [(record["data"], record["label"]) for record, _ in shown]
        if (rho := rank_correlation(*ranks, groups=groups)) is not None:
            rows.append((name, len(pairs), *rho))
    return sorted(rows, key=lambda row: -abs(row[2]))


def ranked(values: Sequence[tuple[str, float]]) -> list[float]:
    """Ranks within each data set, from 0 to 1."""
    found = [0.0] * len(values)
    for data in dict.fromkeys(data for data, _ in values):
        places = [place for place, (each, _) in enumerate(values) if each == data]
        ranks = rankdata([values[place][1] for place in places])
        for place, rank in zip(places, ranks, strict=True):
            found[place] = float((rank - 0.5) / len(places))
    return found


def add_columns(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Put the figures of a CSV file beside those of the runs it names."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = {str(Path(row.pop("fit"))): row for row in csv.DictReader(file)}
    for record in records:
        for name, value in rows.get(str(Path(record["folder"])), {}).items():
            if value and name != "recovery":  # that of the fit's own attack, if it has one
                record.setdefault("indicators", {})[name] = float(value)


def markdown(records: Sequence[Record], chosen: Sequence[tuple[str, float | None]]) -> str:
    """A table an attack."""
    parts = []
    for name, p in chosen:
        rows = correlations(records, (name, p))
        title = f"Attack {name}" + ("" if p is None else f", p = {p:g}")
        if not rows:
            parts.append(f"{title}: fewer than five runs with figures, no correlation.")
            continue
        shown = [[row[0], str(row[1]), f"{row[2]:.2f}", f"{row[3]:.2f} to {row[4]:.2f}"] for row in rows]
        parts.append(f"{title}:\n\n" + table(["figure", "runs", "Spearman's ρ", "95 %"], shown))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of correlations an attack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--columns", type=Path, help="a CSV file with more figures")
    parser.add_argument("--attack", help="one attack alone")
    parser.add_argument("--p", type=float, help="one fraction alone")
    options = parser.parse_args(arguments)
    records: list[dict[str, Any]] = []
    for path in options.results:
        content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        records += [record for record in content["runs"] if record["phase"] == "test"]
    if options.columns is not None:
        add_columns(records, options.columns)
    chosen = [c for c in cells(records) if options.attack in (None, c[0]) and options.p in (None, c[1])]
    print(markdown(records, chosen))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
