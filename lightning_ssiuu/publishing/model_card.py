"""The model card of a finished run: all that its records say, and nothing of the forget set or of the machine.

Scores have one decimal, as in the certificate: a mean to its last digit is a fingerprint of the rows behind it. For the
same reason no digest of data or configuration is in a card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lightning_ssiuu.evaluation.results import ATTACKS, attack_order
from lightning_ssiuu.models.loading import hub_options
from lightning_ssiuu.publishing.findings import Findings
from lightning_ssiuu.publishing.shown_settings import class_name, shown_settings
from lightning_ssiuu.utils.errors import UserError, one_line

_TASK = "text-generation"
_BESIDE = ("oracle", "control")
_NOT_AUDITED = (
    "Not audited: whether the knowledge was erased or only hidden is not known. "
    "Scores after unlearning do not tell the two apart."
)
#: Of what is made with the package alone: the embedded model.
_LICENSES = {"tiny": "apache-2.0"}


@dataclass(frozen=True)
class Base:
    """The model before unlearning, as far as a card may name it.

    Args:
        name: A hub id, ``tiny``, or ``package:NAME/FILE``; None: it is not named.
        revision: Of a hub id.

    Example:
        >>> base_of("runs/mine/model")
        Base(name=None, revision=None)
        >>> Base("org/model", "v1").checkpoint
        'org/model@v1'
    """

    name: str | None = None
    revision: str | None = None

    @property
    def checkpoint(self) -> str | None:
        """As ``fit`` takes it: with its revision."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def hub_id(self) -> str | None:
        """The name, if it is one of the hub's."""
        return None if self.name is None or self.name == "tiny" or self.name.startswith("package:") else self.name


def base_of(checkpoint: Any, revision: str | None = None) -> Base:
    """The base of a model by the checkpoint it was trained from: only a name that means the same to everybody.

    A relative path looks like a hub id. So one counts only with its configuration in the hub's cache, where loading it
    has put that.
    """
    if not isinstance(checkpoint, str) or not checkpoint:
        return Base()
    if checkpoint == "tiny" or checkpoint.startswith("package:"):
        return Base(checkpoint)
    try:
        name, of_name = hub_options(checkpoint)
    except UserError:  # a path that leads nowhere from here
        return Base()
    revision = of_name.get("revision") or revision
    if Path(name).exists() or not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return Base()
    return Base(name, revision)


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Args:
        name: The model's name, ``owner/name`` on the hub; None: it has none yet.
        base: The model before unlearning.
        adapter: Whether it is adapters alone.
        hashes: SHA-256 of the weights' files, by name.
        license: Identifier of its licence; None: unknown, but for the embedded model.
    """

    name: str | None = None
    base: Base = field(default_factory=Base)
    adapter: bool = False
    hashes: Mapping[str, str] = field(default_factory=dict)
    license: str | None = None


def model_card(findings: Findings, subject: Subject) -> str:
    """The text of ``README.md``: a header for the hub, the verdict first, figures, limits, how to load and check.

    Args:
        findings: What the run left about this model.
        subject: Its name, its base and its files.

    Returns:
        Markdown with a YAML header that ``huggingface_hub.ModelCard`` reads.
    """
    metrics, base = findings.metrics, subject.base
    verdict = findings.audit.get("verdict") or {}
    kinds = {row["attack"].removesuffix("_lora") for row in findings.attacks}
    options = (findings.config.get("model") or {}).get("init_args") or {}
    versions = (metrics.get("provenance") or {}).get("versions") or {}
    content = {
        "findings": findings,
        "subject": subject,
        "verdict": verdict.get("sentence") or _NOT_AUDITED,
        "uncertainty": verdict.get("uncertainty"),
        **{name: metrics.get(name) for name in ("objective", "steps", "collapsed")},
        "scores": _score_rows(metrics),
        "attacks": [_attack_row(row, findings) for row in _in_order(findings.attacks)],
        "not_tried": [name.replace("_", " ") for name in ATTACKS if name not in kinds],
        "base": "tiny (the embedded model)" if base.name == "tiny" else base.name or "a model that is not named here",
        "versions": [f"{name} {version}" for name, version in versions.items()],
        "data": class_name(findings.config.get("data")),
        "width": options.get("quantization"),
        "lora": options.get("lora") is not None,
        "settings": Markup(yaml.safe_dump(shown_settings(findings.config, base.checkpoint), sort_keys=False)),
    }
    data = ModelCardData(
        base_model=base.hub_id,
        eval_results=_results(findings) or None,
        library_name="peft" if subject.adapter else "transformers",
        license=subject.license or _LICENSES.get(base.name or ""),
        model_name=(subject.name or "unlearned").rpartition("/")[2],
        pipeline_tag=_TASK,
        tags=["unlearning", "lightning_ssiuu"],
    )
    # Markup: the header is YAML, written by a library that quotes what needs it.
    text = _template().render(header=Markup(data.to_yaml()), **content)
    return str(ModelCard(text))


@cache
def _template() -> Any:
    environment = Environment(
        finalize=lambda value: _escaped(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.from_string((files(__package__) / "model_card.md").read_text(encoding="utf-8"))


def _escaped(text: str) -> str:
    # Whatever stands in names is text on one line: neither markup, nor a link, nor another cell of a table.
    found = one_line(text).replace("<", "&lt;")
    return "".join(f"\\{sign}" if sign in "|[]`*" else sign for sign in found)


def _number(value: Any) -> float | None:
    # The hub takes no NaN.
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return round(float(value), 1) if known else None


def _shown(value: Any) -> str:
    number = _number(value)
    return "–" if number is None else f"{number:.1f}"


def _spread(block: Mapping[str, Any] | None) -> str:
    if block is None or _number(block.get("mean")) is None:
        return "–"
    return _shown(block["mean"]) + (f" ± {_shown(block['std'])}" if len(block.get("per_seed") or ()) > 1 else "")


def _score_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if not metrics:
        return []
    before, after = metrics["before"]["scores"], metrics["after"]["scores"]
    rows = [
        (f"{split} {score}", _shown(value), _shown(after.get(split, {}).get(score)))
        for split, scores in before.items()
        for score, value in scores.items()
    ]
    elicited = metrics["after"].get("elicited") or {}
    return rows + [
        (f"forget {score}, after a few steps of relearning", "–", _shown(v)) for score, v in elicited.items()
    ]


def _in_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: (*attack_order(row["attack"]), row["p"] or 0.0))


def _title(row: Mapping[str, Any]) -> str:
    p = None if row["p"] is None else f"p {row['p']:g}"
    return ", ".join(filter(None, (row["attack"].replace("_", " "), p, row.get("variant"))))


def _beside(row: Mapping[str, Any]) -> str | None:
    return next((name for name in _BESIDE if "forget_score" in (row.get(name) or {})), None)


def _attack_row(row: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    own, beside = row["unlearned"], _beside(row)
    return {
        "title": _title(row),
        "score": row["score"],
        "before": _spread(own.get("before")),
        "highest": _spread(own["forget_score"]),
        "edge": own.get("inside_grid") is False,
        "beside": f"{beside} {_spread(row[beside]['forget_score'])}" if beside else "–",
        "gap": _spread(row.get("gap")),
        "seeds": ", ".join(map(str, findings.seeds(row))),
        "counted": findings.counted(row),
    }


def _results(findings: Findings) -> list[EvalResult]:
    name = class_name(findings.config.get("data"))
    found: list[EvalResult] = []

    def add(split: str, kind: str, title: str, value: Any, args: dict[str, Any] | None = None) -> None:
        if (number := _number(value)) is not None:
            slug = f"lightning-ssiuu-{name.replace(' ', '-').lower()}"  # of no data set on the hub
            more: dict[str, Any] = {"metric_name": title, "metric_args": args, "dataset_split": split}
            found.append(EvalResult(_TASK, slug, name, kind, number, **more))

    for moment, words in (("before", "before unlearning"), ("after", "after unlearning")):
        for split, scores in ((findings.metrics.get(moment) or {}).get("scores") or {}).items():
            for score, value in scores.items():
                add(split, score, f"{score} {words}, percent", value)
    for row in _in_order(findings.attacks):
        for what, block in (("highest under attack", row["unlearned"]["forget_score"]), ("gap", row.get("gap") or {})):
            args = {"seeds": findings.seeds(row), "std": _number(block.get("std"))}
            kind = f"{row['score']}_gap" if what == "gap" else row["score"]
            words = f"gap to the {_beside(row)}, points" if what == "gap" else f"{what}, percent"
            add("forget", kind, f"{row['score']}, {_title(row)}: {words}", block.get("mean"), args)
    return found
