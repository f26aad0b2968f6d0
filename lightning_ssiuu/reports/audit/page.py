"""``report.html``: what an audit found, on one page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

from markupsafe import Markup
from torch import Tensor

from lightning_ssiuu.attribution.influence import InfluenceVariation
from lightning_ssiuu.attribution.plots import cumulative_figure, heat_maps
from lightning_ssiuu.evaluation.results import found_by
from lightning_ssiuu.reports.audit.verdict import THRESHOLD
from lightning_ssiuu.reports.curves import Curve, by_epoch, settings_of, strongest
from lightning_ssiuu.reports.pages import attack_title, page
from lightning_ssiuu.utils import figures
from lightning_ssiuu.utils.figures import COLOURS, DASHED, DOTTED, Interval, Series
from lightning_ssiuu.utils.svg import svg

#: Flagged neurons and scatter points that are shown.
SHOWN_NEURONS, SHOWN_POINTS = 50, 2000
_DASHES = {"oracle": DASHED, "control": DASHED, "after_attack": DOTTED}
#: What a piece of evidence says is not yet the verdict.
_SAYS = {"hidden": "comes back", "erased": "stays away", "undecided": "unclear"}
_FIGURES = {
    "d_plus_total": "D⁺, all neurons",
    "d_minus_total": "D⁻, all neurons",
    "d_plus_top100": "D⁺, top 100",
    "d_minus_top100": "D⁻, top 100",
    "n_spurious": "flagged neurons",
}


@dataclass(frozen=True)
class Measured:
    """What the report shows that ``audit.json`` does not hold.

    ``influences`` are ``[2 · n_neurons]`` positive and negative ones before and after the attack; ``n_flagged`` counts
    the table that lies beside the report. Without ``examples`` no text of the forget set is shown.
    """

    models: Mapping[str, str]
    command: str
    variations: Mapping[str, InfluenceVariation]
    influences: tuple[Tensor, Tensor] | None = None
    n_flagged: int = 0
    examples: Sequence[Mapping[str, Any]] = field(default_factory=list)


def report_html(content: Mapping[str, Any], measured: Measured) -> str:
    """The page of an ``audit.json``. Whatever stands in names, data and messages is text on it, never markup."""
    points = _points(measured.influences)
    description = f"{len(points)} attributions after the attack over those before it"
    pictures = {
        "intervals": _intervals(content["verdict"]["grounds"]),
        "heat_maps": [_heat_maps(name, variation) for name, variation in measured.variations.items()],
        "cumulative": svg(cumulative_figure(measured.variations), "Cumulative D⁺ and D⁻ over neurons, largest first"),
        "scatter": svg(figures.scatter(points, "before", "after"), description) if points else None,
        "recovery": _recovery(content["relearning"]),
        "lens": _lens(content.get("logit_lens")),
    }
    tables = {
        "names": list(content["scores"]),
        "correlation": {**(content.get("correlation") or {}), "shown": len(points)},
        "flagged": content["flagged"][:SHOWN_NEURONS],
        "models": {"oracle": None, **measured.models},
    }
    given = {"command": measured.command, "n_flagged": measured.n_flagged, "examples": measured.examples}
    words = {"labels": _FIGURES, "says": _SAYS, "found_by": found_by}
    return page("report.html", **{**content, **pictures, **tables, **given, **words})


def _intervals(grounds: Sequence[Mapping[str, Any]]) -> Markup | None:
    intervals = [
        Interval(
            ground["name"],
            ground["share"],
            -math.inf if ground["low"] is None else ground["low"],
            math.inf if ground["high"] is None else ground["high"],
            COLOURS[ground["says"]],
        )
        for ground in grounds
        if ground["what"] != "forgetting"
    ]
    if not intervals:
        return None
    shown = ", ".join(f"{interval.name}: {100 * interval.value:.0f} %" for interval in intervals)
    figure = figures.interval_plot(intervals, THRESHOLD, "% of what was lost that comes back")
    return svg(figure, f"Share of what was lost that comes back. {shown}")


def _heat_maps(name: str, variation: InfluenceVariation) -> dict[str, Any]:
    pictures: dict[str, Any] = {"name": name}
    for key, symbol, heat_map in zip(("plus", "minus"), ("D⁺", "D⁻"), heat_maps(variation), strict=True):
        layer, kind = max(heat_map.values, key=heat_map.values.__getitem__)
        description = f"{symbol} of the model {name} by module and layer, largest in layer {layer}, {kind}"
        pictures[key] = svg(figures.heat_map_figure([replace(heat_map, title="")]), description)
    return pictures


def _points(influences: tuple[Tensor, Tensor] | None) -> list[tuple[float, float]]:
    # The largest ones and, evenly spaced, some of the rest.
    if influences is None:
        return []
    before, after = (values.tolist() for values in influences)
    pairs = sorted(zip(before, after, strict=True), key=lambda pair: -max(abs(pair[0]), abs(pair[1])))
    head, rest = pairs[: SHOWN_POINTS // 2], pairs[SHOWN_POINTS // 2 :]
    step = max(1, math.ceil(len(rest) / (SHOWN_POINTS // 2)))
    return head + rest[::step]


def _recovery(relearning: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if not relearning:
        return []
    panels: dict[tuple[str, float | None], dict[str, list[Curve]]] = {}
    for curve in relearning["curves"]:
        panels.setdefault((curve["attack"], curve["p"]), {}).setdefault(curve["model"], []).append(curve)
    score = relearning["score"].replace("_", " ")
    shown = []
    for (attack, p), models in panels.items():
        lines = [line for name, curves in models.items() for line in _recovery_lines(name, strongest(curves))]
        title = attack_title(attack, p)
        ends = ", ".join(f"{line.name} ends at {line.points[-1][1]:.1f} %" for line in lines if line.points)
        chart = figures.line_chart(lines, "epochs of the attack", f"forget {score}, %")
        shown.append({"title": title, "picture": svg(chart, f"Forget {score} during the {title}: {ends}")})
    return shown


def _recovery_lines(name: str, curves: Sequence[Curve]) -> list[Series]:
    scores = by_epoch(curves)
    points = [(float(epoch), mean(values)) for epoch, values in scores.items()]
    band = [(float(epoch), min(values), max(values)) for epoch, values in scores.items()] if len(curves) > 1 else []
    lines = [_line(name, f"{name}, {settings_of(curves)}", points, band)]
    if name == "unlearned":  # what is left of the rest meanwhile
        for split, dash in (("retain", "-."), ("test", DOTTED)):
            if kept := by_epoch(curves, split):
                points = [(float(epoch), mean(values)) for epoch, values in kept.items()]
                lines.append(Series(f"{name}, {split} set", points, COLOURS["soft"], dash))
    return lines


def _line(model: str, name: str, points: Sequence[tuple[float, float]], band: Sequence[Any] = ()) -> Series:
    return Series(name, points, COLOURS.get(model, COLOURS["after_attack"]), _DASHES.get(model, "-"), band)


def _lens(lens: Mapping[str, Mapping[str, Sequence[float]]] | None) -> list[dict[str, Any]]:
    if not lens:
        return []
    preferred = [_line(name, name, list(enumerate(values["accuracy"]))) for name, values in lens.items()]
    ends = ", ".join(f"{line.name} {line.points[-1][1]:.0f} %" for line in preferred)
    description = f"How often the true answer is preferred to a wrong one, by layer; after the last one: {ends}"
    chart = figures.line_chart(preferred, "layer", "true answer preferred, %", high=100.0)
    shown = [{"title": "All models: chance is 50 %", "picture": svg(chart, description)}]
    low = min(value for values in lens.values() for key in ("answer", "distractor") for value in values[key])
    for name, values in lens.items():
        kinds = (("answer", "true answer", "-"), ("distractor", "wrong answer", DASHED))
        lines = [replace(_line(name, text, list(enumerate(values[key]))), dash=dash) for key, text, dash in kinds]
        ends = ", ".join(f"{line.name} {line.points[-1][1]:.2f}" for line in lines)
        description = f"Logit lens of the model {name}, nats per token after the last layer: {ends}"
        chart = figures.line_chart(lines, "layer", "mean log-probability per token, nats", low, 0.0)
        shown.append({"title": f"{name}: true and wrong answer", "picture": svg(chart, description)})
    return shown
