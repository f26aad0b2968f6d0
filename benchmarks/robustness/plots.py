"""The pictures of a benchmark: retention against recovery with the oracle's point, and recovery with its intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_ssiuu.utils.figures import COLOURS, handle, legend, save_png, style

from .comparison import Estimate, Record, attacked, by_label, cells, over

_COLOURS = [COLOURS[name] for name in ("unlearned", "hidden", "erased", "after_attack", "undecided", "original")]
_MARKERS = "osD^vP"


def save_plots(records: Sequence[Record], folder: Path, title: str) -> list[Path]:
    """Both pictures of one data set; nothing where no objective has two training seeds."""
    groups = {label: runs for label, runs in by_label(records).items() if len(runs) > 1}
    shown = [cell for cell in cells(records) if all(over(runs, attacked(cell)) for runs in groups.values())]
    if not groups or not shown:
        return []
    paths = [folder / f"{title}_front.png", folder / f"{title}_recovery.png"]
    for path, draw in zip(paths, (_front, _recovery), strict=True):
        with style():
            figure = Figure(figsize=(max(4.6, 4.0 * len(shown)), 4.4), layout="constrained")
            grid = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
            for axes, cell in zip(grid, shown, strict=True):
                draw(axes, groups, cell)
                axes.set_title(cell[0] + ("" if cell[1] is None else f", p = {cell[1]:g}"))
            if draw is _front:
                legend(figure, _handles(groups))
        folder.mkdir(parents=True, exist_ok=True)
        save_png(figure, path)
    return paths


def _look(index: int) -> tuple[str, str]:
    return _COLOURS[index % len(_COLOURS)], _MARKERS[index // len(_COLOURS) % len(_MARKERS)]


def _handles(groups: Mapping[str, Sequence[Record]]) -> list[Line2D]:
    looks = {name: _look(index) for index, name in enumerate(groups)} | {"oracle": (COLOURS["oracle"], "*")}
    return [handle(name, colour, marker=marker, linestyle="") for name, (colour, marker) in looks.items()]


def _front(axes: Any, groups: Mapping[str, Sequence[Record]], cell: tuple[str, float | None]) -> None:
    for index, runs in enumerate(groups.values()):
        x, y = over(runs, lambda run: run["after"].get("retain")), over(runs, attacked(cell))
        if x is not None and y is not None:
            colour, marker = _look(index)
            axes.errorbar(x.mean, y.mean, xerr=x.std, yerr=y.std, color=colour, marker=marker, linestyle="", capsize=2)
    if (point := _oracle(groups, cell)) is not None:
        axes.plot(*point, marker="*", color=COLOURS["oracle"], markersize=13, linestyle="", zorder=4)
    axes.set(xlabel="retain, % (right is better)", ylabel="highest forget score, % (down is better)")
    axes.set_ylim(bottom=0)


def _oracle(groups: Mapping[str, Sequence[Record]], cell: tuple[str, float | None]) -> tuple[float, float] | None:
    runs = next(iter(groups.values()))
    retain = [run["oracle"]["retain"] for run in runs if "oracle" in run]
    recovered = over(runs, attacked(cell, "reference"))
    return (mean(retain), recovered.mean) if retain and recovered is not None else None


def _recovery(axes: Any, groups: Mapping[str, Sequence[Record]], cell: tuple[str, float | None]) -> None:
    for row, runs in enumerate(groups.values()):
        estimate = over(runs, attacked(cell))
        assert isinstance(estimate, Estimate)
        low, high = estimate.mean - max(estimate.low, 0.0), min(estimate.high, 100.0) - estimate.mean
        axes.errorbar(estimate.mean, row, xerr=[[low], [high]], color=COLOURS["unlearned"], marker="o", capsize=3)
    for row, runs in enumerate(groups.values()):  # the oracle's is the same for all, a control's is not
        if (reference := over(runs, attacked(cell, "reference"))) is not None:
            axes.plot((reference.mean,) * 2, (row - 0.4, row + 0.4), color=COLOURS["oracle"], linestyle="--")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set(xlabel="highest forget score, 95 % interval (dashed: oracle or control)", ylim=(len(groups) - 0.5, -0.5))
    axes.set_xlim(left=0)
