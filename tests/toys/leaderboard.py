"""Audits as ``leaderboard`` reads them, written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toys.compare import attacked, write_json, write_run

from lightning_ssiuu.reports.leaderboard.reading import read_audits
from lightning_ssiuu.reports.leaderboard.table import boards
from lightning_ssiuu.reports.leaderboard.writing import leaderboard_html

HOSTILE = "<script>window.hacked=1</script>"


def write_audit(
    folder: Path,
    highest: float = 40.0,
    oracle: float | None = 4.0,
    label: str = "hidden",
    share: float = 0.3,
    weights: str | None = None,
    run: dict[str, Any] | None = None,
    suite: dict[str, Any] | None = None,
    data: str = "d" * 64,
) -> Path:
    """A directory as ``audit`` leaves it: of a run with these options of :func:`write_run`, else without ``fit``."""
    if run is None:
        folder.mkdir(parents=True)
    else:
        write_run(folder, **run)
    models = {"original": (90.0, 80.0, 95.0), "unlearned": (10.0, 72.0, 76.0)}
    models |= {"oracle": (3.0, 80.0, 95.0)} if oracle is not None else {}
    splits = ("forget", "test", "retain")
    scores = {m: {s: {"probability": v} for s, v in zip(splits, of, strict=True)} for m, of in models.items()}
    grounds = [
        {"what": "forgetting", "name": "forget probability", "text": "", "says": "unlearned", "share": 0.9},
        {"what": "relearning", "name": "harmful", "text": "", "says": label, "share": share, "low": None, "high": None},
    ]
    digests = {"original": "o" * 64, "unlearned": weights or folder.name} | ({"oracle": "r" * 64} if oracle else {})
    content = {
        "verdict": {"label": label, "sentence": "", "grounds": grounds, "oracle_retains": None},
        "scores": scores,
        "influence": {"unlearned": {}},
        "score": "probability",
        "command": f"lightning-ssiuu audit --original tiny --unlearned {folder.name}/model",
        "relearning": {"source": "probe", "score": "probability", "options": {"p": 0.2}, "curves": []}
        | {"attacks": [attacked(0.2, highest, oracle)]},
        "provenance": {"data_sha256": data, "weights_sha256": digests, "versions": {"lightning-ssiuu": "0.1.0"}},
    }
    write_json(folder / "audit.json", content | ({"suite": suite} if suite else {}))
    return folder


def board_page(folder: Path) -> str:
    """A page with rows of every kind, and names that are markup or longer than a phone is wide."""
    suite = {"name": "tofu", "split": "forget10", "model": "L" * 80, "method": HOSTILE, "settings": {"lr": "1e-05"}}
    paths = [write_audit(folder / f"suite_{n}", 40.0 + n, suite=suite, weights=f"{n}") for n in range(3)]
    paths.append(write_audit(folder / "alone", suite=suite | {"method": "M" * 80, "settings": {"beta": "0.1" * 30}}))
    for seed, label in enumerate(("collapsed", "erased", "mixed", "not unlearned")):
        paths.append(write_audit(folder / f"run_{seed}", label=label, run={"seed": seed}))
    return leaderboard_html(boards(read_audits(paths)[0]))
