"""Every picture of this package, drawn once with matplotlib, for files and for pages.

Each panel is 340 units wide: a phone shows it at about its size, a desktop two beside each other.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from lightning_ssiuu.utils.files import written_atomically

#: Width of a panel, in points of a file and in pixels of a page.
WIDTH = 340
#: Colours on light paper (those of files) and on dark. No two light ones are the same: a page finds them by it.
PALETTE = {
    "ink": ("#1b2430", "#e8ecf1"),
    "soft": ("#55606e", "#a5b0bd"),
    "rule": ("#dde2e8", "#323c49"),
    "faint": ("#eef1f4", "#222b36"),
    "original": ("#5b6775", "#a5b0bd"),
    "unlearned": ("#2456c5", "#7ea6ff"),
    "oracle": ("#96620a", "#e0aa4a"),
    "after_attack": ("#8a2f8f", "#d992dd"),
    "control": ("#3c7a1f", "#93cf6e"),
    "erased": ("#12756c", "#4cc2b5"),
    "hidden": ("#b3402f", "#ff8a75"),
    "undecided": ("#8a5a00", "#e0aa4a"),
    # Methods side by side: Okabe and Ito's, told apart by the colour-blind too.
    **{"method_0": ("#0072b2", "#4db1ea"), "method_1": ("#d55e00", "#ff8f4d"), "method_2": ("#009e73", "#3ccfa0")},
    **{"method_3": ("#cc79a7", "#e6a3c8"), "method_4": ("#e69f00", "#ffc04d"), "method_5": ("#56b4e9", "#8fd0f5")},
    **{"method_6": ("#8a6d00", "#cdb04a"), "method_7": ("#7f4fc9", "#b58cf0")},
}
COLOURS = {name: light for name, (light, _) in PALETTE.items()}
#: Before an artist's id that a page shows as text under the pointer.
HOVER = "hover: "
DASHED, DOTTED = (0, (3, 1.5)), (0, (1, 1.5))
_GUIDE: Any = {"color": COLOURS["soft"], "linestyle": DASHED, "linewidth": 1.2}

_STYLE: Any = {
    **{"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 11, "axes.titlesize": 11},
    **{"text.usetex": False, "text.parse_math": False, "path.simplify": False},
    **{"svg.fonttype": "none", "svg.hashsalt": "lightning-ssiuu", "pdf.fonttype": 42, "axes.titlelocation": "left"},
    **{"axes.grid": True, "axes.axisbelow": True, "axes.edgecolor": COLOURS["soft"], "grid.color": COLOURS["rule"]},
    **{f"axes.spines.{side}": False for side in ("top", "left", "right")},
    **{f"{axis}tick.{key}": value for axis in "xy" for key, value in (("color", COLOURS["soft"]), ("major.size", 0))},
    **{"text.color": COLOURS["soft"], "axes.labelcolor": COLOURS["soft"], "lines.linewidth": 2},
    **{f"legend.{key}": value for key, value in (("frameon", False), ("handlelength", 2), ("columnspacing", 1.2))},
    "figure.constrained_layout.use": 1,
}
# What XML knows no way to write; browsers would show them as boxes.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_STEPS = (1, 2, 2.5, 5, 10)
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line: ``points`` ``(x, y)`` and a ``band`` of ``(x, low, high)`` around it; what is not finite is left out.

    A line without a name is not in the legend; the dash is matplotlib's line style, for readers who see no colours.
    """

    name: str
    points: Sequence[Point]
    colour: str = COLOURS["unlearned"]
    dash: Any = "-"
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class HeatMap:
    """Values ≥ 0 by ``(layer, row)``, stronger in colour where they are higher; ``highest`` has the full colour."""

    title: str
    values: Mapping[tuple[int, str], float]
    rows: Sequence[str]
    highest: float
    colour: str


@dataclass(frozen=True)
class Interval:
    """A share with its bounds; infinite ones are not known."""

    name: str
    value: float
    low: float
    high: float
    colour: str


@contextmanager
def style() -> Iterator[None]:
    """Inside, matplotlib draws as this package does, whatever the user's configuration says."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of names in other scripts
        yield


@style()
def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, low: float = 0.0, high: float | None = None
) -> Figure:
    """Lines over a common axis from ``low``, or the lowest value, to ``high``, or a round number above the data."""
    handles = [handle(line.name, line.colour, linestyle=line.dash) for line in series if line.name]
    figure, axes = _panel(216 + 15 * max(0, len(handles) - 4), x_label, y_label)
    draw_lines(axes, series)
    ys = [low, *(y for line in series for _, y in line.points if math.isfinite(y))]
    ys += [edge for line in series for _, *edges in line.band for edge in edges if math.isfinite(edge)]
    top = max(ys) if max(ys) > min(ys) else min(ys) + 1.0
    axes.set_ylim(min(ys), MaxNLocator(5, steps=_STEPS).tick_values(min(ys), top)[-1] if high is None else high)
    legend(figure, handles)
    return figure


def draw_lines(axes: Axes, series: Sequence[Series]) -> None:
    """The lines and bands of ``series``."""
    xs = [x for line in series for x, _ in line.points]
    for line in series:
        band = [point for point in line.band if all(map(math.isfinite, point))]
        if band:
            outline = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
            axes.fill(*zip(*outline, strict=True), color=line.colour, alpha=0.16, linewidth=0)
        points = [point for point in line.points if all(map(math.isfinite, point))]
        shown: Any = {"color": line.colour, "linestyle": line.dash, "gid": _hover(line.name)}
        axes.plot(*np.reshape(points, (-1, 2)).T, zorder=3, **shown)
    axes.margins(x=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS, integer=all(x == round(x) for x in xs)))
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


@style()
def heat_map_figure(maps: Sequence[HeatMap]) -> Figure:
    """Heat maps of the same rows and layers beside each other, each with its scale below."""
    rows = maps[0].rows
    n_layers = 1 + max((layer for heat_map in maps for layer, _ in heat_map.values), default=0)
    gap = min(0.1, n_layers / 200)
    figure = _figure(22 * len(rows) + 62 + 20 * any(heat_map.title for heat_map in maps), len(maps))
    ratios = (22 * max(len(rows), 1), 8)
    grid = figure.subplots(2, len(maps), squeeze=False, gridspec_kw={"height_ratios": ratios})
    for column, (heat_map, axes, scale) in enumerate(zip(maps, *grid, strict=True)):
        for (layer, row), value in heat_map.values.items():
            place = (layer - 0.5, rows.index(row) - 0.5)
            shade = min(value / heat_map.highest, 1.0) if heat_map.highest > 0 else 0.0
            hover = f"layer {layer}, {row}: {value:.3g}"
            if math.isfinite(value):
                _cell(axes, place, 1 - gap, COLOURS["faint"], 1.0, "" if shade > 0 else hover)
            if shade > 0:
                _cell(axes, place, 1 - gap, heat_map.colour, shade, hover)
        axes.set(xlim=(-0.5, n_layers - 0.5), ylim=(max(len(rows), 1) - 0.5, -0.5), xlabel="layer")
        axes.set_title(fitted(heat_map.title, 48))
        axes.set_xticks(range(0, n_layers, 1 + n_layers // 12))
        axes.set_yticks(range(len(rows)), ["" if column else fitted(row, 16) for row in rows])
        for step in range(10):
            _cell(scale, (step, 0), 1.0, heat_map.colour, (step + 0.5) / 10)
        scale.set(xlim=(0, 10), ylim=(0, 0.94), yticks=[])
        scale.set_xticks([0, 10], ["0", f"{heat_map.highest:.3g}"])
        for side, tick in zip(("left", "right"), scale.get_xticklabels(), strict=True):
            tick.set_horizontalalignment(side)
        for plain in (axes, scale):
            plain.grid(visible=False)
            plain.spines["bottom"].set_visible(False)
    return figure


@style()
def scatter(points: Sequence[Point], x_label: str, y_label: str) -> Figure:
    """Points on two axes of the same scale, with the line on which both are equal."""
    kept = [point for point in points if all(map(math.isfinite, point))]
    size = max((abs(value) for point in kept for value in point), default=0.0) or 1.0
    figure, axes = _panel(332, x_label, y_label)
    axes.plot((-size, size), (-size, size), gid=_hover("line of equality"), **_GUIDE)
    # One path of very short strokes, whose round caps are the points: thousands of markers would be slow.
    strokes = [(x + shift, y) for x, y in kept for shift in (0.0, size * 1e-6, math.nan)]
    options: Any = {"color": COLOURS["unlearned"], "alpha": 0.45, "linewidth": 3, "solid_capstyle": "round"}
    axes.plot(*np.reshape(strokes, (-1, 2)).T, **options)
    axes.set(xlim=(-size, size), ylim=(-size, size))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure


@style()
def interval_plot(intervals: Sequence[Interval], threshold: float, x_label: str) -> Figure:
    """Shares with their bounds beside the threshold (a share, too), each under its name; the axis is in percent.

    Where the bounds are not known the line is dotted and goes to the edge.
    """
    figure, axes = _panel(46 * len(intervals) + 46, x_label)
    left, right = -0.2, 1.0
    for row, interval in enumerate(intervals):
        top, bottom, middle = row + 0.42, row + 0.95, row + 0.69
        axes.text(left + 0.01, row + 0.36, fitted(interval.name, 42), color=COLOURS["ink"], in_layout=False)
        _cell(axes, (left, top), threshold - left, COLOURS["faint"], 1.0, height=bottom - top)
        for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            axes.plot((tick, tick), (top, bottom), color=COLOURS["rule" if tick else "soft"], linewidth=1)
        axes.plot((threshold,) * 2, (top, bottom), gid=_hover("threshold"), **_GUIDE)
        if not math.isfinite(interval.value):
            continue
        shown: Any = {"ha": "right", "weight": "bold", "color": COLOURS["ink"]}
        axes.text(right, row + 0.36, f"{round(100 * interval.value)} %", **shown)
        line: Any = {"color": interval.colour, "linewidth": 3, "solid_capstyle": "round"}
        low, value, high = np.clip((interval.low, interval.value, interval.high), left, right)
        axes.plot((low, high), (middle, middle), "-" if math.isfinite(interval.low) else ":", **line)
        axes.plot(value, middle, "o", color=interval.colour, markersize=9, gid=_hover(interval.name))
    axes.set(xlim=(left, right), ylim=(len(intervals), 0), yticks=[])
    axes.set_xticks(np.arange(left, 1.1, 0.2), [f"{tick:.0f}" for tick in range(-20, 101, 20)])
    axes.grid(visible=False)
    return figure


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Below the panels, in as many columns as fit."""
    if handles:
        widest = max(len(str(handle.get_label())) for handle in handles)
        columns = max(1, min(len(handles), int(72 * figure.get_figwidth() / (38 + 6.3 * widest))))
        figure.legend(handles=list(handles), loc="outside lower center", ncols=columns)


def handle(name: str, colour: str, **options: Any) -> Line2D:
    """An entry of a legend; ``options`` are those of matplotlib's lines."""
    # matplotlib leaves out what begins with an underscore.
    return Line2D([], [], color=colour, label=" " * name.startswith("_") + fitted(name, 44), **options)


def clean(text: str) -> str:
    """Text without control characters."""
    return _CONTROL.sub("\ufffd", text)


def fitted(text: str, letters: int) -> str:
    """One line of clean text, cut where it is longer than so many letters."""
    text = clean(" ".join(text.split()))
    return text if len(text) <= letters else text[: letters - 1] + "…"


def save_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure whole or not at all; the same figure gives the same bytes."""
    with style(), written_atomically(path) as temporary:
        laid_out(figure, FigureCanvasAgg, 120).savefig(temporary, dpi=120)


def save_pdf(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as vectors, whole or not at all; the same figure gives the same bytes."""
    with style(), written_atomically(path) as temporary:
        figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})


def laid_out(figure: Figure, canvas: type[FigureCanvasBase], dpi: float) -> Figure:
    """The figure, its panels in their places: to find those, saving would draw all of it one more time.

    Args:
        figure: What is to be saved next.
        canvas: That of the file's format, by which texts are measured.
        dpi: Of the format's renderer.
    """
    canvas(figure)
    figure.set_dpi(dpi)
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
        with matplotlib.rc_context({"figure.constrained_layout.use": False}):
            figure.set_layout_engine(None)
    return figure


@style()
def pixels(figure: Figure) -> np.ndarray:
    """``[height, width, 3]`` bytes, for a logger that takes images."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _figure(height: float, panels: int = 1) -> Figure:
    return Figure(figsize=(WIDTH * panels / 72, height / 72), layout="constrained")


def _panel(height: float, x_label: str, y_label: str = "") -> tuple[Figure, Axes]:
    figure = _figure(height)
    axes = figure.subplots()
    axes.set_xlabel(fitted(x_label, 44))
    axes.set_title(fitted(y_label, 48))
    return figure, axes


def _cell(
    axes: Axes, place: Point, width: float, colour: str, alpha: float, hover: str = "", height: float = 0.94
) -> None:
    axes.add_patch(Rectangle(place, width, height, facecolor=colour, alpha=alpha, linewidth=0, gid=_hover(hover)))


def _hover(text: str) -> str | None:
    return HOVER + clean(text) if text else None


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
