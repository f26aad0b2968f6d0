"""Read audits: those of runs, and those of models of others, which have nothing but an ``audit.json``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_ssiuu.evaluation.results import check_attacks, read_result
from lightning_ssiuu.reports.compare.reading import Run, read_run, read_runs
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.reading import only

AUDIT = "audit.json"


def read_audits(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[Run], list[str]]:
    """The audited directories in the order given, each once, and the paths passed over because they have no audit.

    Raises:
        UserError: If a path is missing, nothing is audited, a file is not what it should be, or a model is there twice.
    """
    runs, skipped = read_runs(paths, read_audit, AUDIT, f"directories that audit wrote (with {AUDIT})")
    seen: dict[tuple[str | None, str | None], Path] = {}
    for run in runs:
        weights = (run.audit["provenance"].get("weights_sha256") or {}).get("unlearned")
        other = seen.setdefault((weights, run.data), run.path)
        if weights is not None and other is not run.path:  # counted twice, a spread would be too small
            raise UserError("runs", str(run.path), f"one audit per model: that of {other} has the same weights")
    return runs, skipped


def read_audit(path: Path) -> Run:
    """One audited directory as a run. Its attacks are those of the verdict, not all that were made.

    Where ``fit`` wrote no ``metrics.json`` the scores are the audit's, and the method's name and settings are those of
    the audit's ``suite``, else the directory's name.
    """
    audit = read_result(path / AUDIT, "runs", _check)
    if (path / "metrics.json").is_file():
        run = read_run(path)
    else:
        suite = audit.get("suite") or {}
        scores = {name: {"scores": audit["scores"][model]} for name, model in _MOMENTS.items()}
        metrics: dict[str, Any] = {
            "objective": suite.get("method") or path.resolve().name,
            "score": _score(audit),
            **scores,
        }
        metrics["after"]["influence"] = audit["influence"].get("unlearned", {})
        model = {"class_path": suite.get("method"), "init_args": suite.get("settings") or {}}
        run = Run(path, metrics, {"model": model} if suite else {}, {}, {}, audit)
    run.metrics["score"] = _score(audit) or run.metrics["score"]
    run.metrics["provenance"] = {"wall_s": None, **(run.metrics.get("provenance") or {})}
    run.metrics["provenance"]["data_sha256"] = audit["provenance"].get("data_sha256")
    relearning = audit.get("relearning") or {}
    rows: list[Any] = relearning.get("attacks", [])
    made: dict[str, Any] = {row["attack"]: {"options": relearning.get("options"), "provenance": {}} for row in rows}
    settings = (run.attack.get("settings") or {}) if relearning.get("source") == "attack.json" else made
    return replace(run, attack={"attacks": rows, "curves": relearning.get("curves", []), "settings": settings})


_MOMENTS = {"before": "original", "after": "unlearned"}


def _score(audit: Mapping[str, Any]) -> str:
    return str(audit.get("score") or (audit.get("relearning") or {}).get("score") or "")


def _check(content: Mapping[str, Any]) -> None:
    only(dict, content["provenance"], content["influence"], content["verdict"], content.get("suite") or {})
    only(dict, *(content["scores"][model] for model in _MOMENTS.values()))
    for scores in content["scores"].values():
        only(dict, *scores.values())
    only(str, content["verdict"]["label"], content.get("command") or "")
    for ground in content["verdict"]["grounds"]:
        only(str, ground["what"])
        only((int, float, type(None)), ground["share"])
    check_attacks(content.get("relearning") or {})
