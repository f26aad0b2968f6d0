"""``report.html``: what an audit found, on one page that needs nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import mean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor

from lightning_ssiuu.attribution.influence import InfluenceVariation
from lightning_ssiuu.attribution.plots import cumulative_figure, heat_maps
from lightning_ssiuu.reports.audit.verdict import THRESHOLD
from lightning_ssiuu.reports.curves import Curve, by_epoch, strongest
from lightning_ssiuu.utils.figures import (
    COLOURS,
    DASHED,
    DOTTED,
    PALETTE,
    Interval,
    Series,
    clean,
    heat_map_figure,
    interval_plot,
    line_chart,
    scatter,
)
from lightning_ssiuu.utils.svg import svg

#: Flagged neurons and scatter points that are shown.
SHOWN_NEURONS, SHOWN_POINTS = 50, 2000
_DASHES = {"oracle": DASHED, "after_attack": DOTTED}
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

    Args:
        models: Checkpoints as given, by name.
        command: The command that made the report.
        variations: D⁺ and D⁻ on the forget set, by the model's name.
        influences: ``[2 · n_neurons]`` positive and negative influences before and after the attack; None: not there.
        n_flagged: Flagged neurons in the table that lies beside the report.
        examples: Forget examples with the answers of both models; empty: no text of the forget set is shown.
    """

    models: Mapping[str, str]
    command: str
    variations: Mapping[str, InfluenceVariation]
    influences: tuple[Tensor, Tensor] | None = None
    n_flagged: int = 0
    examples: Sequence[Mapping[str, Any]] = field(default_factory=list)


def report_html(content: Mapping[str, Any], measured: Measured) -> str:
    """The page. Whatever stands in names, data and messages is text on it, never markup.

    Args:
        content: Of ``audit.json``.
        measured: The rest.
    """
    names = list(content["scores"])
    flagged = content["flagged"]
    points = _points(measured.influences)
    return (
        _environment()
        .get_template("report.html")
        .render(
            models={"oracle": None, **{name: clean(text) for name, text in measured.models.items()}},
            command=clean(measured.command),
            verdict=content["verdict"],
            intervals=_intervals(content["verdict"]["grounds"]),
            names=names,
            scores=_score_rows(content["scores"], names),
            influence=_influence_rows(content["influence"]),
            target=content["target"],
            method=content["method"],
            alpha=content["alpha"],
            heat_maps=[_heat_maps(name, variation) for name, variation in measured.variations.items()],
            cumulative=_picture(
                cumulative_figure(measured.variations), "Cumulative D⁺ and D⁻ over neurons, largest first"
            ),
            scatter=_scatter(points),
            correlation={**(content.get("correlation") or {}), "shown": len(points)},
            recovery=_recovery(content["relearning"]),
            relearning_source=_source(content["relearning"]),
            attacks=_attack_rows(content["relearning"]),
            lens=_lens(content.get("logit_lens")),
            flagged=flagged[:SHOWN_NEURONS],
            columns=list(flagged[0]) if flagged else [],
            ablation=content["ablation"],
            n_flagged=measured.n_flagged,
            examples=[{name: clean(str(value)) for name, value in one.items()} for one in measured.examples],
            palette=PALETTE,
            provenance=_provenance(content["provenance"]),
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lightning_ssiuu.reports.audit"),
        autoescape=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = lambda text: clean(str(text)).replace("_", " ")
    environment.filters["unbroken"] = lambda text: re.sub(r"(?<=\d) %", "\u00a0%", clean(text))
    environment.filters["says"] = lambda says: _SAYS.get(says, says)
    environment.filters["one_decimal"] = lambda value: "–" if _missing(value) else f"{value:.1f}"
    environment.filters["three_digits"] = lambda value: "–" if _missing(value) else f"{value:.3g}".replace("inf", "∞")
    return environment


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _picture(figure: Figure, description: str) -> Markup:
    return Markup(svg(figure, description))


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
    figure = interval_plot(intervals, THRESHOLD, "% of what was lost that comes back")
    return _picture(figure, f"Share of what was lost that comes back. {shown}")


def _score_rows(scores: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"split": split, "score": score, "values": [scores[name].get(split, {}).get(score) for name in names]}
        for split, measured in scores[names[0]].items()
        for score in measured
    ]


def _influence_rows(influence: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    names = list(influence)
    rows = [
        {"label": _FIGURES.get(figure, figure), "values": [influence[name].get(figure) for name in names]}
        for figure in influence[names[0]]
    ]
    return {"names": names, "rows": rows}


def _heat_maps(name: str, variation: InfluenceVariation) -> dict[str, Any]:
    pictures: dict[str, Any] = {"name": name}
    for key, symbol, heat_map in zip(("plus", "minus"), ("D⁺", "D⁻"), heat_maps(variation), strict=True):
        layer, kind = max(heat_map.values, key=heat_map.values.__getitem__)
        description = f"{symbol} of the model {name} by module and layer, largest in layer {layer}, {kind}"
        pictures[key] = _picture(heat_map_figure([replace(heat_map, title="")]), description)
    return pictures


def _points(influences: tuple[Tensor, Tensor] | None) -> list[tuple[float, float]]:
    """The largest ones and, evenly spaced, some of the rest."""
    if influences is None:
        return []
    before, after = (values.tolist() for values in influences)
    pairs = sorted(zip(before, after, strict=True), key=lambda pair: -max(abs(pair[0]), abs(pair[1])))
    head, rest = pairs[: SHOWN_POINTS // 2], pairs[SHOWN_POINTS // 2 :]
    step = max(1, math.ceil(len(rest) / (SHOWN_POINTS // 2)))
    return head + rest[::step]


def _scatter(points: Sequence[tuple[float, float]]) -> Markup | None:
    if not points:
        return None
    description = f"{len(points)} attributions after the attack over those before it"
    return _picture(scatter(points, "before", "after"), description)


def _recovery(relearning: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if not relearning:
        return []
    panels: dict[tuple[str, float | None], dict[str, list[Curve]]] = {}
    for curve in relearning["curves"]:
        panels.setdefault((curve["attack"], curve["p"]), {}).setdefault(curve["model"], []).append(curve)
    score = relearning["score"].replace("_", " ")
    figures = []
    for (attack, p), models in panels.items():
        lines = [_recovery_line(name, strongest(curves)) for name, curves in models.items()]
        title = _attack_title(attack, p)
        ends = ", ".join(f"{line.name} ends at {line.points[-1][1]:.1f} %" for line in lines if line.points)
        chart = line_chart(lines, "epochs of the attack", f"forget {score}, %")
        figures.append({"title": title, "picture": _picture(chart, f"Forget {score} during the {title}: {ends}")})
    return figures


def _recovery_line(name: str, curves: Sequence[Curve]) -> Series:
    scores = by_epoch(curves)
    points = [(float(epoch), mean(values)) for epoch, values in scores.items()]
    band = [(float(epoch), min(values), max(values)) for epoch, values in scores.items()] if len(curves) > 1 else []
    return _line(name, f"{name}, lr {curves[0]['learning_rate']:g}", points, band)


def _line(model: str, name: str, points: Sequence[tuple[float, float]], band: Sequence[Any] = ()) -> Series:
    return Series(name, points, COLOURS.get(model, COLOURS["after_attack"]), _DASHES.get(model, "-"), band)


def _attack_title(attack: str, p: float | None) -> str:
    name = attack.replace("_", " ")
    return f"{name} attack" if p is None else f"{name} attack with {100 * p:g} % of the forget set"


def _source(relearning: Mapping[str, Any] | None) -> str:
    if not relearning:
        return ""
    if relearning["source"] == "probe":
        return "A small attack made by the audit itself."
    return "From the run's attack.json."


def _attack_rows(relearning: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [
        {
            "attack": _attack_title(row["attack"], row["p"]),
            "model": name,
            "before": row[name]["before"]["mean"],
            "highest": row[name]["forget_score"]["mean"],
            "std": row[name]["forget_score"]["std"],
            "seeds": len(row[name]["forget_score"]["per_seed"]),
        }
        for row in (relearning or {}).get("attacks", [])
        for name in ("unlearned", "oracle")
        if name in row
    ]


def _lens(lens: Mapping[str, Mapping[str, Sequence[float]]] | None) -> list[dict[str, Any]]:
    if not lens:
        return []
    preferred = [_line(name, name, list(enumerate(values["accuracy"]))) for name, values in lens.items()]
    ends = ", ".join(f"{line.name} {line.points[-1][1]:.0f} %" for line in preferred)
    description = f"How often the true answer is preferred to a wrong one, by layer; after the last one: {ends}"
    chart = line_chart(preferred, "layer", "true answer preferred, %", high=100.0)
    figures = [{"title": "All models: chance is 50 %", "picture": _picture(chart, description)}]
    low = min(value for values in lens.values() for key in ("answer", "distractor") for value in values[key])
    for name, values in lens.items():
        answer, distractor = (list(enumerate(values[key])) for key in ("answer", "distractor"))
        lines = [_line(name, "true answer", answer), replace(_line(name, "wrong answer", distractor), dash=DASHED)]
        lines[0] = replace(lines[0], dash="-")
        ends = ", ".join(f"{line.name} {line.points[-1][1]:.2f}" for line in lines)
        description = f"Logit lens of the model {name}, nats per token after the last layer: {ends}"
        chart = line_chart(lines, "layer", "mean log-probability per token, nats", low, 0.0)
        figures.append({"title": f"{name}: true and wrong answer", "picture": _picture(chart, description)})
    return figures


def _provenance(block: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in block["versions"].items())
    others = [(name, "none" if value is None else str(value)) for name, value in block.items() if name != "versions"]
    labels = {"config_sha256": "options, SHA-256", "data_sha256": "data, SHA-256", "wall_s": "seconds"}
    return [("versions", versions), *((labels.get(name, name), value) for name, value in others)]
