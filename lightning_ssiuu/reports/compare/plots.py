"""The two pictures of a comparison: recovery curves under each attack, and retention against recovery."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightning_ssiuu.reports.compare.reading import number
from lightning_ssiuu.reports.compare.table import ATTACKS, Comparison, Row, common_attacks, front_of, pareto_front
from lightning_ssiuu.reports.compare.writing import one_line
from lightning_ssiuu.utils.files import written_atomically

# Okabe and Ito's, told apart by the colour-blind too; after eight the line style and the marker change.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#7f4fc9")
_STYLES: tuple[Any, ...] = ("-", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_ORACLE = "#333333"
_LONGEST_NAME = 34
_PARETO = 7.4  # inches across
Curve = Mapping[str, Any]


def strongest(curves: Sequence[Curve]) -> list[Curve]:
    """Of one attack on one run, the curves with the learning rate whose highest scores are highest on average.

    Args:
        curves: Of all learning rates and attack seeds; of equals the gentler rate is taken.

    Example:
        >>> curves = [{"learning_rate": rate, "epochs": [0, 1], "forget_scores": [5.0, top]}
        ...           for rate, top in ((1e-5, 6.0), (1e-4, 20.0), (1e-3, 9.0))]
        >>> [curve["learning_rate"] for curve in strongest(curves)]
        [0.0001]
    """
    by_rate: dict[float, list[Curve]] = {}
    for curve in sorted(curves, key=lambda one: one["learning_rate"]):
        by_rate.setdefault(curve["learning_rate"], []).append(curve)
    return max(by_rate.values(), key=lambda group: mean(_highest(curve) for curve in group), default=[])


def _highest(curve: Curve) -> float:
    return max((value for given in curve["forget_scores"] if (value := number(given)) is not None), default=0.0)


def band(curves: Sequence[Curve]) -> tuple[list[int], list[float], list[float]]:
    """Epochs that all curves have, the mean score at each and its standard deviation (n − 1; 0 for one curve).

    Example:
        >>> band([{"epochs": [0, 1, 2], "forget_scores": [1.0, 2.0, 9.0]},
        ...       {"epochs": [0, 1], "forget_scores": [3.0, 2.0]}])
        ([0, 1], [2.0, 2.0], [1.4142135623730951, 0.0])
    """
    points = [
        {e: v for e, s in zip(c["epochs"], c["forget_scores"], strict=True) if (v := number(s)) is not None}
        for c in curves
    ]
    epochs = sorted(set.intersection(*map(set, points))) if points else []
    values = [[one[epoch] for one in points] for epoch in epochs]
    return epochs, [mean(v) for v in values], [stdev(v) if len(v) > 1 else 0.0 for v in values]


def panels(rows: Sequence[Row]) -> dict[tuple[str, float | None], dict[int | None, list[Curve]]]:
    """The curves to draw, per attack and p: those of each method by its index, and under None the oracle's.

    Of every run, those of its strongest learning rate.
    """
    found: dict[tuple[str, float | None], dict[int | None, list[Curve]]] = {}
    for index, row in enumerate(rows):
        for run in row.runs:
            by_attack: dict[tuple[str, float | None, str], list[Curve]] = {}
            for curve in run.attack["curves"]:
                by_attack.setdefault((curve["attack"], curve["p"], curve["model"]), []).append(curve)
            for (attack, p, model), curves in by_attack.items():
                panel = found.setdefault((attack, p), {})
                panel.setdefault(None if model == "oracle" else index, []).extend(strongest(curves))
    order = {name: index for index, name in enumerate(ATTACKS)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0][0], len(order)), *map(str, item[0]))))


def save_recovery_curves(path: str | os.PathLike[str], comparison: Comparison) -> bool:
    """Draw the forget score by epoch, a panel per attack and p, a line per method, the oracle dashed.

    Lines are means over training and attack seeds of each run's strongest learning rate, bands ± one standard
    deviation.

    Returns:
        Whether there was anything to draw.
    """
    rows = _methods(comparison)
    drawn = panels(rows)
    if not drawn:
        return False
    n_columns = 2 if len(drawn) == 4 else min(3, len(drawn))
    n_rows = math.ceil(len(drawn) / n_columns)
    attacks = [row for one in rows for run in one.runs for row in run.attack["attacks"]]
    measured = _safe(", ".join(sorted({row["score"] for row in attacks if (row["attack"], row["p"]) in drawn})))
    used = [index for index in range(len(rows)) if any(index in panel for panel in drawn.values())]
    handles = [_line(rows, index) for index in used]
    if any(None in panel for panel in drawn.values()):
        handles.append(Line2D([], [], color=_ORACLE, linestyle="--", label="oracle"))
    width = 1.0 + 3.4 * n_columns
    picture = Picture(figsize=(width, 2.9 * n_rows + _legend_height(handles, width)))
    picture.set_layout_engine("constrained")
    grid = picture.subplots(n_rows, n_columns, squeeze=False, sharey=True)
    highest = 1.0
    for place, ((attack, p), panel) in enumerate(drawn.items()):
        axes: Axes = grid[place // n_columns][place % n_columns]
        for index, curves in panel.items():
            highest = max(highest, _draw(axes, rows, index, curves))
        title = attack.replace("_lora", ", LoRA") + ("" if p is None else f", p = {p:g}")
        axes.set_title(_safe(title), fontsize=10)
        axes.set_xlabel("epoch of the attack")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
        axes.grid(alpha=0.25)
    for row in grid:
        row[0].set(ylabel=f"forget score: {measured}, %", ylim=(0, highest * 1.04))
    for empty in list(grid.flat)[len(drawn) :]:
        empty.set_visible(False)
    _legend(picture, handles, width)
    _save(picture, path)
    return True


def _draw(axes: Axes, rows: Sequence[Row], index: int | None, curves: Sequence[Curve]) -> float:
    epochs, means, spreads = band(curves)
    low = [max(0.0, value - spread) for value, spread in zip(means, spreads, strict=True)]
    high = [value + spread for value, spread in zip(means, spreads, strict=True)]
    if index is None:
        axes.plot(epochs, means, "--", color=_ORACLE, zorder=3)
        axes.fill_between(epochs, low, high, color=_ORACLE, alpha=0.12, linewidth=0)
    else:
        axes.plot(epochs, means, _style(index), color=_colour(index), zorder=3)
        axes.fill_between(epochs, low, high, color=_colour(index), alpha=0.18 if len(rows) < 5 else 0.1, linewidth=0)
    return max(high, default=0.0)


def save_pareto(path: str | os.PathLike[str], comparison: Comparison) -> bool:
    """Draw retention (test score) against recovery (highest forget score under the attacks).

    Only relearning attacks that all methods, and the oracle, have been put under count.
    The step line is the Pareto front of the methods; the oracle is the star, or a dashed line where its test score is
    not known.

    Returns:
        Whether there was anything to draw.
    """
    attacks = common_attacks(comparison)
    rows = _methods(comparison)
    points = {i: point for i, row in enumerate(rows) if (point := front_of(row, attacks))}
    if not points:
        return False
    handles = []
    picture = Picture(layout="constrained")
    axes = picture.subplots()
    axes.margins(0.08)
    for index, (retention, recovery) in points.items():
        highest = max((rows[index].cells[key] for key in attacks), key=lambda figure: figure.mean)
        bars: Any = {"yerr": highest.spread, "xerr": rows[index].cells["test_score"].spread, "capsize": 2}
        axes.errorbar(retention, recovery, fmt=_marker(index), color=_colour(index), markersize=7, **bars)
        handles.append(
            Line2D([], [], color=_colour(index), marker=_marker(index), linestyle="", label=_name(rows[index]))
        )
    handles.append(Line2D([], [], color="#888888", linewidth=1.2, label="Pareto front"))
    handles += _oracle_point(axes, comparison.rows, attacks)
    _front(axes, list(points.values()))
    axes.set_xlabel(f"retention: test {_safe(comparison.score)}, %  (right is better)")
    axes.set_ylabel("recovery: highest forget score, %  (down is better)")
    titles = ", ".join(column.title for column in comparison.columns if column.key in attacks)
    axes.set_title(fill(f"recovery under {_safe(titles)}", 80), fontsize=9)
    axes.grid(alpha=0.25)
    picture.set_size_inches(_PARETO, 4.3 + _legend_height(handles, _PARETO))
    _legend(picture, handles, _PARETO)
    _save(picture, path)
    return True


def _front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Everything left of the line and above it is beaten by one of the points."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    front = [points[index] for index in pareto_front(points)]
    corners = [(front[0][0], top), *front, (left, front[-1][1])]
    axes.step(*zip(*corners, strict=True), where="post", color="#888888", linewidth=1.2, zorder=1)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _oracle_point(axes: Axes, rows: Sequence[Row], attacks: Sequence[str]) -> list[Line2D]:
    oracle = next((row for row in rows if row.kind == "oracle"), None)
    if oracle is None or not all(key in oracle.cells for key in attacks):
        return []
    if (point := front_of(oracle, attacks)) is not None:
        axes.plot(*point, marker="*", color=_ORACLE, markersize=13, linestyle="", zorder=4)
        return [Line2D([], [], color=_ORACLE, marker="*", markersize=11, linestyle="", label="oracle")]
    axes.axhline(max(oracle.cells[key].mean for key in attacks), color=_ORACLE, linestyle="--", linewidth=1.2)
    return [Line2D([], [], color=_ORACLE, linestyle="--", label="oracle (retention not known)")]


def _methods(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.rows if row.kind == "method"]


def _line(rows: Sequence[Row], index: int) -> Line2D:
    return Line2D([], [], color=_colour(index), linestyle=_style(index), label=_name(rows[index]))


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _style(index: int) -> Any:
    return _STYLES[index // len(_COLOURS) % len(_STYLES)]


def _marker(index: int) -> str:
    return _MARKERS[index // len(_COLOURS) % len(_MARKERS)]


def _name(row: Row) -> str:
    name = one_line(row.label)
    name = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    # A legend leaves out what begins with an underscore.
    return " " * name.startswith("_") + _safe(name) + (f" (n = {row.n})" if row.n and row.n > 1 else "")


def _safe(text: str) -> str:
    """Text without formulas, which matplotlib would set."""
    return one_line(text).replace("$", r"\$")


def _legend_columns(handles: Sequence[Line2D], width: float) -> int:
    widest = max(len(str(handle.get_label())) for handle in handles)
    return max(1, min(len(handles), int(width / (0.6 + 0.07 * widest))))


def _legend_height(handles: Sequence[Line2D], width: float) -> float:
    return 0.2 * math.ceil(len(handles) / _legend_columns(handles, width)) + 0.2


def _legend(picture: Picture, handles: Sequence[Line2D], width: float) -> None:
    columns = _legend_columns(handles, width)
    picture.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _save(picture: Picture, path: str | os.PathLike[str]) -> None:
    with written_atomically(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of names in other scripts
        picture.savefig(temporary, dpi=120)
