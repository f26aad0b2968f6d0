"""A report of everything that a report can show, with figures made up and names as hostile as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from lightning_ssiuu.attacks.curves import RecoveryCurve, table
from lightning_ssiuu.attribution.activation_gradient import NeuronAttribution
from lightning_ssiuu.attribution.influence import InfluenceVariation
from lightning_ssiuu.models.architectures import KINDS, NeuronSite
from lightning_ssiuu.reports.audit.evidence import neuron_evidence, relearning_evidence
from lightning_ssiuu.reports.audit.page import Measured, report_html
from lightning_ssiuu.reports.audit.verdict import Forgetting, decide
from lightning_ssiuu.utils.provenance import provenance

#: Each breaks out of another place: text, attribute, style, SVG, comment, template, control characters.
HOSTILE = (
    "<script>window.hacked=1</script>",
    "\"'><img src=x onerror=window.hacked=2>",
    "</style><script>window.hacked=3</script>",
    '</svg></text><svg onload="window.hacked=4">',
    "--><script>window.hacked=5</script><!--",
    "{{ 7 * 191 }}{% raw %}",
    "]]>&lt;script&gt;\x00\x1b[31m",
    "javascript:window.hacked=6 " + "W" * 300,
)


def variation(seed: int) -> InfluenceVariation:
    generator = torch.Generator().manual_seed(seed)
    sites = [NeuronSite(kind, layer, "module", 40) for layer in range(3) for kind in KINDS]
    attribution = NeuronAttribution.empty(sites)
    plus, minus = (torch.rand(len(attribution.minimum), generator=generator).double() for _ in range(2))
    return InfluenceVariation(plus * 1e-3, minus * 3e-3, attribution, attribution)


def curves(top: float, name: str, fractions: Sequence[float] = (0.1, 0.3), **more: Any) -> list[RecoveryCurve]:
    scores = [[9.0, 9 + top / 2 + seed, 9 + top + seed] for seed in range(3)]
    return [
        RecoveryCurve(name, "harmful", p, rate, seed, 4, 32, [0, 1, 2], scores[seed], **more)
        for p in fractions
        for rate in (1e-4, 3e-4)
        for seed in range(3)
    ]


def audit_content(hostile: bool = True) -> dict[str, Any]:
    """What ``audit.json`` would hold."""
    score, *others = HOSTILE if hostile else ("probability",)
    found = [*curves(40.0, "unlearned"), *curves(2.0, "oracle")]
    rows = [{"attack": "harmful", "score": score, **row} for row in table(found)]
    forgetting = Forgetting(score, 88.0, 9.0, 7.0, "the oracle's")
    control = {"mean": 10.0, "std": 1.0, "per_seed": [9.0, 10.0, 11.0]}
    undone = [
        {"flags": "D⁻", "which": "all", "variant": variant, "n_neurons": 4, "before": 9.0, "forget_score": 30.0}
        | {"control": control}
        for variant in ("original", "zero")
    ]
    ablation = {"score": score, "rows": undone}
    evidence = [*relearning_evidence(rows, forgetting), *neuron_evidence(ablation, 88.0)]
    names = ("original", "unlearned", "oracle", "after_attack")
    splits = ("forget", "retain", others[0] if others else "test")
    origin = provenance(12.3, "cpu", "options", "0" * 64)
    origin["versions"] |= {name: name for name in others}
    neuron = {"module": others[1] if others else "mlp_up", "layer": 1, "index": 3, "d_minus": 0.5, "z": float("inf")}
    lens = {
        "answer": [-9.0, -5.0, -2.5, -4.0],
        "distractor": [-9.0, -6.0, -4.0, -1.5],
        "accuracy": [50.0, 70.0, 95.0, 9.0],
    }
    influence = {"d_plus_total": 0.4, "d_minus_total": 0.7, "n_spurious": 60}
    return {
        "verdict": decide(forgetting, evidence).content(),
        "scores": {name: {split: {score: 50.0, "none": float("nan")} for split in splits} for name in names},
        "influence": dict.fromkeys(("unlearned", "oracle"), influence),
        "flagged": [neuron] * 50,
        "relearning": {
            "source": "probe",
            "score": score,
            "attacks": rows,
            "curves": [{"attack": "harmful", **asdict(curve)} for curve in found],
        },
        "ablation": ablation,
        "logit_lens": dict.fromkeys([names[0], others[2] if others else "unlearned"], lens),
        "target": "length_normalised",
        "method": "gradient_x_activation",
        "alpha": 1e-3,
        "correlation": {"rho": 0.91, "low": 0.88, "high": 0.93},
        "provenance": origin,
    }


def report(hostile: bool = True, examples: bool = True) -> str:
    """The page."""
    names = ("original", "unlearned", "oracle", "after_attack")
    texts = HOSTILE if hostile else ("text",)
    shown = [
        {"example_id": number, "question": text, "answer": text, "original": text, "unlearned": text}
        for number, text in enumerate(texts)
    ]
    models = {name: texts[number % len(texts)] for number, name in enumerate(names)}
    influences = (torch.randn(800, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 800))
    variations = {name: variation(seed) for seed, name in enumerate(("unlearned", "oracle"))}
    measured = Measured(models, f"audit {' '.join(texts)}", variations, influences, 60, shown if examples else [])
    return report_html(audit_content(hostile), measured)


def report_without_oracle(control: bool) -> str:
    """The page of an audit whose one attack also scored the rest, with a control or with nothing beside it."""
    content = audit_content(hostile=False)
    utility = {"retain": [90.0, 80.0, 70.0], "test": [80.0, 70.0, 60.0]}
    found = curves(40.0, "unlearned", [0.2], utility=utility)
    found += curves(4.0, "control", [0.2], utility=utility) if control else []
    content["relearning"]["attacks"] = [{"attack": "harmful", "score": "probability", **row} for row in table(found)]
    content["relearning"]["curves"] = [{"attack": "harmful", **asdict(curve)} for curve in found]
    for name in ("scores", "influence"):
        del content[name]["oracle"]
    return report_html(content, Measured({"original": "o", "unlearned": "u"}, "audit", {"unlearned": variation(0)}))
