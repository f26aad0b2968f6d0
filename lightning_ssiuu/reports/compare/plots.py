"""The two pictures of a comparison: recovery curves under each attack, and retention against recovery."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_ssiuu.evaluation.results import attack_order
from lightning_ssiuu.reports.compare.table import Comparison, Row, common_attacks, front_of, pareto_front
from lightning_ssiuu.reports.curves import Curve, by_epoch, strongest
from lightning_ssiuu.utils.figures import COLOURS, DOTTED, WIDTH, Series, draw_lines, fitted, handle, legend, style

# After eight the line style and the marker change.
_METHODS = [COLOURS[f"method_{number}"] for number in range(8)]
_DASHES = ("-", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_ORACLE = COLOURS["ink"]
_KEPT = "test set during the attack"


def panels(rows: Sequence[Row]) -> dict[tuple[str, float | None], dict[int | None, list[Curve]]]:
    """Each run's curves of its strongest rate, per attack and p: by the method's index, under None the oracle's."""
    drawn: dict[tuple[str, float | None], dict[int | None, list[Curve]]] = {}
    for index, row in enumerate(rows):
        for run in row.runs:
            by_attack: dict[tuple[str, float | None, str], list[Curve]] = {}
            for curve in run.attack["curves"]:
                if curve["model"] == "control":  # each run has one of its own: in the table
                    continue
                by_attack.setdefault((curve["attack"], curve["p"], curve["model"]), []).append(curve)
            for (attack, p, model), curves in by_attack.items():
                panel = drawn.setdefault((attack, p), {})
                panel.setdefault(None if model == "oracle" else index, []).extend(strongest(curves))
    return dict(sorted(drawn.items(), key=lambda item: (attack_order(item[0][0]), str(item[0][1]))))


def recovery_lines(comparison: Comparison) -> dict[tuple[str, float | None], list[Series]]:
    """The forget score by epoch, per attack and p: a line per method, the oracle dashed.

    Lines are means over training and attack seeds of each run's strongest attacker and learning rate, bands ± one
    standard deviation; dotted ones are the test set's score meanwhile, where the attack took it.
    """
    rows = _methods(comparison)
    return {
        attack: [line for item in panel.items() for line in (_mean_line(rows, *item), *_kept_line(rows, *item))]
        for attack, panel in panels(rows).items()
    }


def attack_scores(comparison: Comparison) -> str:
    """The scores that the drawn attacks were scored by."""
    runs = [run for row in _methods(comparison) for run in row.runs]
    curves = {(curve["attack"], curve["p"]) for run in runs for curve in run.attack["curves"]}
    rows = [row for run in runs for row in run.attack["attacks"]]
    return ", ".join(sorted({row["score"] for row in rows if (row["attack"], row["p"]) in curves}))


def recovery_figure(comparison: Comparison) -> Figure | None:
    """A panel of :func:`recovery_lines` for each attack and p beside the others; None if there is nothing to draw."""
    lines = recovery_lines(comparison)
    if not lines:
        return None
    handles = {line.name: handle(line.name, line.colour, linestyle=line.dash) for of in lines.values() for line in of}
    handles |= {_KEPT: handle(_KEPT, _ORACLE, linestyle=DOTTED)} if _KEPT in handles else {}
    names = [_name(row) for row in _methods(comparison)] + ["oracle", _KEPT]
    n_columns = 2 if len(lines) == 4 else min(3, len(lines))
    n_rows = math.ceil(len(lines) / n_columns)
    with style():
        figure = Figure(figsize=(1.0 + 3.6 * n_columns, 3.1 * n_rows), layout="constrained")
        grid = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True)
        for axes, ((attack, p), series) in zip(grid.flat, lines.items(), strict=False):
            draw_lines(axes, series)
            axes.margins(x=0.03)
            axes.set_title(fitted(attack.replace("_lora", ", LoRA"), 34) + ("" if p is None else f", p = {p:g}"))
            axes.set_xlabel("epoch of the attack")
        highest = max(
            (y for of in lines.values() for line in of for _, *_, y in (*line.band, *line.points)), default=1.0
        )
        for row in grid:
            row[0].set(
                ylabel=f"forget score: {fitted(attack_scores(comparison), 20)}, %", ylim=(0, max(highest, 1.0) * 1.04)
            )
        for empty in list(grid.flat)[len(lines) :]:
            empty.set_visible(False)
        legend(figure, [handles[name] for name in dict.fromkeys(names) if name in handles])
    return figure


def _mean_line(rows: Sequence[Row], index: int | None, curves: Sequence[Curve]) -> Series:
    scores = by_epoch(curves)
    points = [(float(epoch), mean(values)) for epoch, values in scores.items()]
    spreads = [stdev(values) if len(values) > 1 else 0.0 for values in scores.values()]
    band = [(x, max(0.0, y - spread), y + spread) for (x, y), spread in zip(points, spreads, strict=True)]
    if index is None:
        return Series("oracle", points, _ORACLE, "--", band)
    dash = _DASHES[index // len(_METHODS) % len(_DASHES)]
    return Series(_name(rows[index]), points, _METHODS[index % len(_METHODS)], dash, band)


def _kept_line(rows: Sequence[Row], index: int | None, curves: Sequence[Curve]) -> list[Series]:
    # What an attack leaves of the rest; no name of its own in the legend.
    scores = {} if index is None else by_epoch(curves, "test")
    points = [(float(epoch), mean(values)) for epoch, values in scores.items()]
    return [Series(_KEPT, points, _METHODS[(index or 0) % len(_METHODS)], DOTTED)] if points else []


def pareto_figure(comparison: Comparison) -> Figure | None:
    """Draw retention (test score) against recovery (highest forget score under the attacks).

    Only relearning attacks that all methods, and the oracle, have been put under count. The step line is the Pareto
    front of the methods; the oracle is the star, or a dashed line where its test score is not known. None if
    there is nothing to draw.
    """
    attacks = common_attacks(comparison)
    rows = _methods(comparison)
    points = {i: point for i, row in enumerate(rows) if (point := front_of(row, attacks))}
    if not points:
        return None
    titles = ", ".join(column.title for column in comparison.columns if column.key in attacks)
    with style():
        figure = Figure(figsize=(WIDTH / 72, 4.2 + 0.21 * len(points)), layout="constrained")
        axes = figure.subplots()
        axes.margins(0.08)
        handles = []
        for index, (retention, recovery) in points.items():
            highest = max((rows[index].cells[key] for key in attacks), key=lambda cell: cell.mean)
            bars: Any = {"yerr": highest.spread, "xerr": rows[index].cells["test_score"].spread, "capsize": 2}
            mark: Any = {"linestyle": "", "marker": _MARKERS[index // len(_METHODS) % len(_MARKERS)]}
            colour = _METHODS[index % len(_METHODS)]
            axes.errorbar(retention, recovery, color=colour, markersize=7, elinewidth=1.2, **bars, **mark)
            handles.append(handle(_name(rows[index]), colour, **mark))
        handles.append(handle("Pareto front", COLOURS["original"], linewidth=1.2))
        handles += _oracle_point(axes, comparison.rows, attacks)
        _front(axes, list(points.values()))
        axes.set_xlabel(f"retention: test {fitted(comparison.score, 16)}, % (right is better)")
        axes.set_ylabel("recovery: highest forget score, %")
        axes.set_title(fill(f"recovery (down is better) under {fitted(titles, 160)}", 46))
        legend(figure, handles)
    return figure


def _front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    # Everything left of the line and above it is beaten by one of the points.
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    front = [points[index] for index in pareto_front(points)]
    corners = [(front[0][0], top), *front, (left, front[-1][1])]
    axes.step(*zip(*corners, strict=True), where="post", color=COLOURS["original"], linewidth=1.2, zorder=1)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _oracle_point(axes: Axes, rows: Sequence[Row], attacks: Sequence[str]) -> list[Line2D]:
    oracle = next((row for row in rows if row.kind == "oracle"), None)
    if oracle is None or not all(key in oracle.cells for key in attacks):
        return []
    if (point := front_of(oracle, attacks)) is not None:
        axes.plot(*point, marker="*", color=_ORACLE, markersize=13, linestyle="", zorder=4)
        return [handle("oracle", _ORACLE, marker="*", markersize=11, linestyle="")]
    axes.axhline(max(oracle.cells[key].mean for key in attacks), color=_ORACLE, linestyle="--", linewidth=1.2)
    return [handle("oracle (retention not known)", _ORACLE, linestyle="--")]


def _methods(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.rows if row.kind == "method"]


def _name(row: Row) -> str:
    return fitted(row.label, 34) + (f" (n = {row.n})" if row.n and row.n > 1 else "")
