"""The pictures of ``report.html`` as inline SVG: drawn as trees of elements, so that no text in them is ever markup.

Colours are classes that the report's style sheet knows, for light and dark. All are 340 units wide: a phone shows them
at about their size, a desktop two beside each other.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lightning_ssiuu.reports.audit.verdict import percent

WIDTH = 340
_LEFT, _RIGHT, _BOTTOM = 44, 10, 36
_LETTER = 6.1  # of 11-pixel text, on average
# What XML knows no way to write; browsers would show them as boxes.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Args:
        name: In the legend; empty: not there.
        points: ``(x, y)``; what is not finite is left out.
        style: Class of its colour, ``"s0"`` to ``"s3"``, ``"plus"`` or ``"minus"``.
        dash: ``stroke-dasharray``, so that lines are told apart without colours.
        band: ``(x, low, high)`` around the line.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "s1"
    dash: str = ""
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Interval:
    """A line of :func:`interval_plot`: what it is, and a share with its bounds (infinite: not known)."""

    name: str
    value: float
    low: float
    high: float
    says: str


def line_chart(
    label: str, series: Sequence[Series], x_label: str, y_label: str, y_high: float | None = None, y_low: float = 0.0
) -> Markup:
    """Lines over a common axis.

    Args:
        label: Read out instead of the picture.
        series: The lines.
        x_label: Below the horizontal axis.
        y_label: Above the vertical axis.
        y_high: Upper end of the vertical axis; None: that of the data.
        y_low: Lower end, where no value is lower.

    Example:
        >>> picture = line_chart("scores", [Series("a <b>", [(0, 1.0), (1, 2.0)])], "epoch", "%")
        >>> "a &lt;b&gt;" in picture, "<b>" in picture
        (True, False)
    """
    points = [point for line in series for point in line.points if _finite(*point)]
    edges = [value for line in series for x, low, high in line.band if _finite(low, high) for value in (low, high)]
    ys = [y for _, y in points] + edges + [y_low]
    top = y_high if y_high is not None else _rounded_up(min(ys), max(ys))
    legend = _legend_rows([(line.name, line.style, line.dash) for line in series if line.name])
    head = 20 + 16 * len(legend)
    root = _picture(head + 180 + _BOTTOM, label)
    _draw_legend(root, legend)
    axes = _Axes(
        (min((x for x, _ in points), default=0), max((x for x, _ in points), default=1)),
        (min(ys), top),
        head,
        head + 180,
    )
    axes.draw(root, x_label, y_label)
    for line in series:
        band = [one for one in line.band if _finite(*one)]
        if band:
            outline = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
            _add(root, "polygon", points=" ".join(axes.at(*point) for point in outline), class_=f"band {line.style}")
        kept = [point for point in line.points if _finite(*point)]
        attributes = {"class_": f"line {line.style}", "points": " ".join(axes.at(*point) for point in kept)}
        drawn = _add(root, "polyline", **attributes, **({"stroke_dasharray": line.dash} if line.dash else {}))
        if line.name:
            _add(drawn, "title", line.name)
    return _markup(root)


def heat_map(
    label: str, means: Mapping[tuple[int, str], float], kinds: Sequence[str], highest: float, style: str
) -> Markup:
    """One value for every module and layer, darker where it is higher.

    Args:
        label: Read out instead of the picture.
        means: ``{(layer, kind): value}``, all ≥ 0.
        kinds: Rows from the top.
        highest: The value of the full colour, so that several maps can share a scale.
        style: ``"plus"`` or ``"minus"``.

    Example:
        >>> picture = heat_map("D⁺", {(0, "mlp_up"): 0.5}, ["mlp_up"], 0.5, "plus")
        >>> "<title>layer 0, mlp_up: 0.5</title>" in picture
        True
    """
    n_layers = 1 + max((layer for layer, _ in means), default=0)
    left, cell_height = 62, 22
    width = (WIDTH - left - _RIGHT) / n_layers
    bottom = cell_height * len(kinds)
    root = _picture(bottom + 64, label)
    for row, kind in enumerate(kinds):
        _add(root, "text", kind, x=left - 6, y=cell_height * row + 15, class_="end")
        for layer in range(n_layers):
            if not _finite(value := means.get((layer, kind), math.nan)):
                continue
            strength = min(value / highest, 1.0) if highest > 0 else 0.0
            place: dict[str, Any] = {
                "x": left + layer * width,
                "y": cell_height * row,
                "width": width - min(1, width / 8),
            }
            rect = _add(root, "rect", **place, height=cell_height - 1, class_="cell")
            _add(rect, "title", f"layer {layer}, {kind}: {value:.3g}")
            if strength > 0:
                filled = _add(root, "rect", **place, height=cell_height - 1, class_=style, fill_opacity=strength)
                _add(filled, "title", f"layer {layer}, {kind}: {value:.3g}")
    for layer in range(0, n_layers, 1 + n_layers // 12):
        _add(root, "text", str(layer), x=left + (layer + 0.5) * width, y=bottom + 14, class_="middle")
    _add(root, "text", "layer", x=left + (WIDTH - left - _RIGHT) / 2, y=bottom + 29, class_="middle")
    steps, step = 10, (WIDTH - left - _RIGHT) / 10
    for number in range(steps):
        shade = (number + 0.5) / steps
        x = left + number * step
        _add(root, "rect", x=x, y=bottom + 38, width=step, height=8, class_=style, fill_opacity=shade)
    _add(root, "text", "0", x=left, y=bottom + 60)
    _add(root, "text", f"{highest:.3g}", x=WIDTH - _RIGHT, y=bottom + 60, class_="end")
    return _markup(root)


def scatter(label: str, points: Sequence[tuple[float, float]], x_label: str, y_label: str) -> Markup:
    """Points on two axes of the same scale, with the line on which both are equal.

    Example:
        >>> "line of equality" in scatter("before and after", [(0.0, 1.0)], "before", "after")
        True
    """
    kept = [point for point in points if _finite(*point)]
    size = max((abs(value) for point in kept for value in point), default=0) or 1.0
    root = _picture(20 + 286 + _BOTTOM, label)
    axes = _Axes((-size, size), (-size, size), 20, 20 + 286)
    axes.draw(root, x_label, y_label)
    equal = " ".join((axes.at(-size, -size), axes.at(size, size)))
    _add(_add(root, "polyline", points=equal, class_="guide", stroke_dasharray="4 3"), "title", "line of equality")
    # One path of strokes without length, whose round caps are the points: thousands of circles would be slow.
    path = "".join(f"M{axes.at(*point).replace(',', ' ')}h0" for point in kept)
    if path:
        _add(root, "path", d=path, class_="points s1")
    return _markup(root)


def interval_plot(label: str, intervals: Sequence[Interval], threshold: float) -> Markup:
    """Shares with their bounds beside the threshold, each under its name.

    Example:
        >>> picture = interval_plot("evidence", [Interval("attack", 0.3, 0.2, 0.4, "hidden")], 0.1)
        >>> "30 %" in picture
        True
    """
    left, right, row = 14, WIDTH - 14, 46
    height = row * len(intervals)
    root = _picture(height + 46, label)
    low, high = -0.2, 1.0

    def at(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (right - left)

    _add(root, "rect", x=left, y=0, width=at(threshold) - left, height=height, class_="below")
    for tick in (-0.2, 0, 0.2, 0.4, 0.6, 0.8, 1.0):
        _add(root, "line", x1=at(tick), x2=at(tick), y1=0, y2=height, class_="axis" if tick == 0 else "grid")
        _add(root, "text", f"{100 * tick:.0f}", x=at(tick), y=height + 14, class_="middle")
    line = _add(
        root, "line", x1=at(threshold), x2=at(threshold), y1=0, y2=height, class_="guide", stroke_dasharray="4 3"
    )
    _add(line, "title", "threshold")
    _add(root, "text", "% of what was lost that comes back", x=WIDTH / 2, y=height + 30, class_="middle")
    for number, one in enumerate(intervals):
        y = row * number
        style = f"says-{one.says.split()[0]}"
        _add(root, "text", _fitted(one.name, 42), x=left + 4, y=y + 16, class_="named")
        if not _finite(one.value):
            continue
        _add(
            root,
            "text",
            f"{percent(one.value)} %",
            x=right,
            y=y + 16,
            class_="end strong named",
        )
        ends = [bound if _finite(bound) else edge for bound, edge in ((one.low, low), (one.high, high))]
        dash = {} if _finite(one.low) else {"stroke_dasharray": "2 4"}
        _add(root, "line", x1=at(ends[0]), x2=at(ends[1]), y1=y + 30, y2=y + 30, class_=f"whisker {style}", **dash)
        point = _add(root, "circle", cx=at(one.value), cy=y + 30, r=5, class_=style)
        _add(point, "title", one.name)
    return _markup(root)


class _Axes:
    """Where values go, and ticks at round numbers."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], top: float, bottom: float) -> None:
        self.x, self.y = (_widened(*x), _widened(*y))
        self.top, self.bottom, self.left, self.right = top, bottom, _LEFT, WIDTH - _RIGHT

    def at(self, x: float, y: float) -> str:
        return f"{_number(self._x(x))},{_number(self._y(y))}"

    def _x(self, value: float) -> float:
        return self.left + (value - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)

    def _y(self, value: float) -> float:
        share = (value - self.y[0]) / (self.y[1] - self.y[0])
        return self.bottom - min(max(share, 0.0), 1.0) * (self.bottom - self.top)

    def draw(self, root: ET.Element, x_label: str, y_label: str) -> None:
        for tick in _ticks(*self.y):
            y = self._y(tick)
            _add(root, "line", x1=self.left, x2=self.right, y1=y, y2=y, class_="axis" if tick == 0 else "grid")
            _add(root, "text", f"{tick:g}", x=self.left - 5, y=y + 4, class_="end")
        for tick in _ticks(*self.x):
            x = self._x(tick)
            _add(root, "line", x1=x, x2=x, y1=self.bottom, y2=self.bottom + 4, class_="axis")
            _add(root, "text", _short(tick), x=min(x, self.right - 6), y=self.bottom + 15, class_="middle")
        _add(root, "text", _fitted(x_label, 44), x=(self.left + self.right) / 2, y=self.bottom + 31, class_="middle")
        _add(root, "text", _fitted(y_label, 50), x=2, y=self.top - 9)


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _rounded_up(low: float, high: float) -> float:
    ticks = _ticks(*_widened(low, high))
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 0.0
    return ticks[-1] if ticks[-1] >= high else ticks[-1] + step


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def _legend_rows(entries: Sequence[tuple[str, str, str]]) -> list[list[tuple[float, str, str, str]]]:
    rows: list[list[tuple[float, str, str, str]]] = []
    x = WIDTH + 1.0
    for name, style, dash in entries:
        name = _fitted(name, 44)
        needed = 32 + _LETTER * len(name)
        if x + needed > WIDTH:
            rows.append([])
            x = 2.0
        rows[-1].append((x, name, style, dash))
        x += needed + 8
    return rows


def _draw_legend(root: ET.Element, rows: Sequence[Sequence[tuple[float, str, str, str]]]) -> None:
    for number, row in enumerate(rows):
        y = 16 * number + 11
        for x, name, style, dash in row:
            extra = {"stroke_dasharray": dash} if dash else {}
            _add(root, "line", x1=x, x2=x + 22, y1=y - 4, y2=y - 4, class_=f"line {style}", **extra)
            _add(root, "text", name, x=x + 27, y=y)


def _picture(height: float, label: str) -> ET.Element:
    return ET.Element("svg", {"viewBox": f"0 0 {WIDTH} {_number(height)}", "role": "img", "aria-label": clean(label)})


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: object) -> ET.Element:
    named = {}
    for name, value in attributes.items():
        written = _number(value) if isinstance(value, (int, float)) else clean(str(value))
        named[name.rstrip("_").replace("_", "-")] = written
    element = ET.SubElement(parent, tag, named)
    if text is not None:
        element.text = clean(text)
    return element


def _markup(root: ET.Element) -> Markup:
    return Markup(ET.tostring(root, encoding="unicode"))


def clean(text: str) -> str:
    r"""Text without control characters.

    Example:
        >>> clean("a\x00b")
        'a\ufffdb'
    """
    return _CONTROL.sub("\ufffd", text)


def _fitted(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)
