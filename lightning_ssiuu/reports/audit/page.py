"""``report.html``: what an audit found, on one page that needs nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import mean
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from lightning_ssiuu.attribution.influence import InfluenceVariation, cumulative_curve, module_layer_means
from lightning_ssiuu.models.architectures import KINDS
from lightning_ssiuu.reports.audit.charts import Interval, Series, clean, heat_map, interval_plot, line_chart, scatter
from lightning_ssiuu.reports.audit.verdict import THRESHOLD

#: Flagged neurons and scatter points that are shown.
SHOWN_NEURONS, SHOWN_POINTS = 50, 2000
_STYLES = {"original": "s0", "unlearned": "s1", "oracle": "s2", "after_attack": "s3"}
_DASHES = {"original": "", "unlearned": "", "oracle": "6 3", "after_attack": "2 3"}
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
            heat_maps=_heat_maps(measured.variations),
            cumulative=_cumulative(measured.variations),
            scatter=scatter(
                f"{len(points)} attributions after the attack over those before it", points, "before", "after"
            )
            if points
            else None,
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


def _intervals(grounds: Sequence[Mapping[str, Any]]) -> Markup | None:
    intervals = [
        Interval(
            one["name"],
            one["share"],
            -math.inf if one["low"] is None else one["low"],
            math.inf if one["high"] is None else one["high"],
            one["says"],
        )
        for one in grounds
        if one["what"] != "forgetting"
    ]
    if not intervals:
        return None
    shown = ", ".join(f"{one.name}: {100 * one.value:.0f} %" for one in intervals)
    return interval_plot(f"Share of what was lost that comes back. {shown}", intervals, THRESHOLD)


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


def _heat_maps(variations: Mapping[str, InfluenceVariation]) -> list[dict[str, Any]]:
    maps = []
    for name, variation in variations.items():
        sites = variation.before.sites
        kinds: list[str] = [kind for kind in KINDS if any(site.kind == kind for site in sites)]
        plus, minus = (
            module_layer_means(variation.before.by_site(values), 100)
            for values in (variation.d_plus, variation.d_minus)
        )
        highest = max([*plus.values(), *minus.values()])
        pictures: dict[str, Any] = {"name": name}
        for style, symbol, means in (("plus", "D⁺", plus), ("minus", "D⁻", minus)):
            layer, kind = max(means, key=means.__getitem__)
            label = f"{symbol} of the model {name} by module and layer, largest in layer {layer}, {kind}"
            pictures[style] = heat_map(label, means, kinds, highest, style)
        maps.append(pictures)
    return maps


def _cumulative(variations: Mapping[str, InfluenceVariation]) -> Markup:
    lines = []
    for (name, variation), dash in zip(variations.items(), ("", "6 3"), strict=False):
        for style, symbol, values in (("plus", "D⁺", variation.d_plus), ("minus", "D⁻", variation.d_minus)):
            curve = cumulative_curve(values).tolist()
            places = sorted({round(place) for place in np.linspace(0, len(curve) - 1, 150)})
            lines.append(Series(f"{symbol} {name}", [(place + 1, curve[place]) for place in places], style, dash))
    label = "Cumulative D⁺ and D⁻ over neurons, largest first"
    return line_chart(label, lines, "neurons", "sum of D, units of the target")


def _points(influences: tuple[Tensor, Tensor] | None) -> list[tuple[float, float]]:
    """The largest ones and, evenly spaced, some of the rest."""
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
    figures = []
    curves = relearning["curves"]
    score = relearning["score"].replace("_", " ")
    for attack, p in dict.fromkeys((curve["attack"], curve["p"]) for curve in curves):
        mine = [curve for curve in curves if (curve["attack"], curve["p"]) == (attack, p)]
        lines = []
        for name in dict.fromkeys(curve["model"] for curve in mine):
            lines.append(_recovery_line(name, [curve for curve in mine if curve["model"] == name]))
        title = _attack_title(attack, p)
        ends = ", ".join(f"{line.name} ends at {line.points[-1][1]:.1f} %" for line in lines)
        label = f"Forget {score} during the {title}: {ends}"
        picture = line_chart(label, lines, "epochs of the attack", f"forget {score}, %")
        figures.append({"title": title, "picture": picture})
    return figures


def _recovery_line(name: str, curves: Sequence[Mapping[str, Any]]) -> Series:
    rates = sorted({curve["learning_rate"] for curve in curves})
    best = max(rates, key=lambda rate: mean(max(c["forget_scores"]) for c in curves if c["learning_rate"] == rate))
    chosen = [curve for curve in curves if curve["learning_rate"] == best]
    by_epoch = {
        epoch: [c["forget_scores"][c["epochs"].index(epoch)] for c in chosen if epoch in c["epochs"]]
        for epoch in chosen[0]["epochs"]
    }
    points = [(float(epoch), mean(scores)) for epoch, scores in by_epoch.items()]
    band = [(float(epoch), min(scores), max(scores)) for epoch, scores in by_epoch.items()] if len(chosen) > 1 else []
    return Series(f"{name}, lr {best:g}", points, _STYLES.get(name, "s3"), _DASHES.get(name, ""), band)


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
    preferred = [
        Series(name, list(enumerate(one["accuracy"])), _STYLES.get(name, "s3"), _DASHES.get(name, ""))
        for name, one in lens.items()
    ]
    ends = ", ".join(f"{line.name} {line.points[-1][1]:.0f} %" for line in preferred)
    label = f"How often the true answer is preferred to a wrong one, by layer; after the last one: {ends}"
    picture = line_chart(label, preferred, "layer", "true answer preferred, %", 100.0)
    figures = [{"title": "All models: chance is 50 %", "picture": picture}]
    low = min(value for one in lens.values() for name in ("answer", "distractor") for value in one[name])
    for name, one in lens.items():
        lines = [
            Series(title, list(enumerate(one[key])), _STYLES.get(name, "s3"), dash)
            for title, key, dash in (("true answer", "answer", ""), ("wrong answer", "distractor", "6 3"))
        ]
        ends = ", ".join(f"{line.name} {line.points[-1][1]:.2f}" for line in lines)
        label = f"Logit lens of the model {name}, nats per token after the last layer: {ends}"
        picture = line_chart(label, lines, "layer", "mean log-probability per token, nats", 0.0, low)
        figures.append({"title": f"{name}: true and wrong answer", "picture": picture})
    return figures


def _provenance(block: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in block["versions"].items())
    others = [(name, "none" if value is None else str(value)) for name, value in block.items() if name != "versions"]
    labels = {"config_sha256": "options, SHA-256", "data_sha256": "data, SHA-256", "wall_s": "seconds"}
    return [("versions", versions), *((labels.get(name, name), value) for name, value in others)]
