"""Read finished runs: what ``fit`` wrote, and what ``attack``, ``utility`` and ``audit`` put beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ssiuu.evaluation.results import check_attacks, check_metrics, read_config, read_result
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.reading import only

_FINISHED, _CONFIG = "metrics.json", "config.yaml"


@dataclass
class Run:
    """A finished run: its directory as it was given, and the contents of its files.

    Where there is no such file ``attack`` is ``{"attacks": [], "curves": []}``, ``utility`` and ``audit`` are ``{}``.
    ``config`` is ``{}`` for the run of a Trainer of one's own, which with ``RunReport`` writes ``metrics.json`` alone.
    """

    path: Path
    metrics: dict[str, Any]
    config: dict[str, Any]
    attack: dict[str, Any]
    utility: dict[str, Any]
    audit: dict[str, Any]

    @property
    def data(self) -> str | None:
        """Digest of its data; None where its data module has none."""
        return (self.metrics.get("provenance") or {}).get("data_sha256")

    @property
    def rendered(self) -> bool:
        """Whether that digest is of the data as token ids; earlier versions had no date in the configuration, and took
        the digest of the text.
        """
        data = self.config.get("data")
        return not self.config or (isinstance(data, dict) and "date" in (data.get("init_args") or {}))

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """``{split: {score: percent}}`` after training."""
        return self.metrics["after"]["scores"]

    @property
    def suite(self) -> str:
        """What its utility was measured on: a suite, or tasks of lm-eval; empty where nobody knows."""
        suite = str(self.utility.get("suite") or "")
        return ", ".join(self.utility.get("tasks") or {}) if suite == "lm_eval" else suite

    @property
    def is_oracle(self) -> bool:
        """Whether it was fine-tuned on the retain set alone."""
        data = self.config.get("data")
        options = (data.get("init_args") or {}) if isinstance(data, dict) else {}
        return self.metrics["objective"] == "FineTuning" and options.get("train_on") == "retain"


def read_runs(
    paths: Sequence[str | os.PathLike[str]],
    read: Callable[[Path], Run] | None = None,
    finished: str = _FINISHED,
    wanted: str = f"run directories written by fit, or by a Trainer with RunReport (with {_FINISHED})",
) -> tuple[list[Run], list[str]]:
    """The runs in the order given, each once, and the paths passed over because they are no finished run.

    That is one with the file ``finished``; ``wanted`` says so where there is none, ``read`` reads one (by default
    :func:`read_run`). A shell's ``runs/*`` names whatever else lies there too. A path that does not exist is a
    :class:`UserError`.
    """
    runs: dict[Path, Run] = {}
    skipped = []
    for given in map(Path, paths):
        if not given.exists():
            raise UserError("runs", str(given), "directories that exist")
        if (given / finished).is_file():
            if given.resolve() not in runs:
                runs[given.resolve()] = (read or read_run)(given)
        else:
            skipped.append(str(given))
    if not runs:
        raise UserError("runs", skipped[0] if len(skipped) == 1 else skipped, wanted)
    return list(runs.values()), skipped


def read_run(path: Path) -> Run:
    """Read one run directory; a :class:`UserError` names the file that is not what it should be."""
    metrics = _json(path / _FINISHED, check_metrics)
    config = read_config(path, "runs") if os.path.lexists(path / _CONFIG) else {}
    attack = {"attacks": [], "curves": []} | _json(path / "attack.json", check_attacks)
    utility, audit = _json(path / "utility.json", _check_utility), _json(path / "audit.json", _check_audit)
    return Run(path, metrics, config, attack, utility, audit)


def check_comparable(runs: Sequence[Run], score: str | None = None) -> str:
    """The score to compare by, by default the one the runs were stopped by, if they can stand in one table.

    A :class:`UserError` if they have different data, were stopped or attacked by different scores, or one lacks the
    score asked for.
    """
    firsts: dict[bool, Run] = {}
    for run in (run for run in runs if run.data is not None):
        first = firsts.setdefault(run.rendered, run)
        if run.data != first.data:
            alike = ", rendered alike (template, tokenizer, date)" if run.rendered else ""
            raise UserError("runs", str(run.path), f"runs on the same data as {first.path}{alike}; compare them apart")
    _check_attack_scores(runs)
    if score is not None:
        common = set.intersection(*(set(split) for run in runs for split in run.scores.values()))
        if score not in common:
            raise UserError("score", score, f"one that every run has: {', '.join(sorted(common)) or 'there is none'}")
        return score
    for run in runs:
        if run.metrics["score"] != runs[0].metrics["score"]:
            others = f"{runs[0].path} ({runs[0].metrics['score']}, not {run.metrics['score']})"
            allowed = f"runs with the score of {others}, or --score and one that all have"
            raise UserError("runs", str(run.path), " ".join(allowed.split()))
    return str(runs[0].metrics["score"])


def _check_attack_scores(runs: Sequence[Run]) -> None:
    given: dict[tuple[Any, ...], tuple[str, Path]] = {}
    for run in runs:
        for row in run.attack["attacks"]:
            score, path = given.setdefault((row["attack"], row["p"], row["variant"]), (row["score"], run.path))
            if row["score"] != score:
                allowed = f"runs attacked with the score of {path} ({row['attack']}: {score}, not {row['score']})"
                raise UserError("runs", str(run.path), " ".join(allowed.split()))


def _json(path: Path, check: Callable[[Any], object]) -> dict[str, Any]:
    return read_result(path, "runs", check) if os.path.lexists(path) else {}


def _check_utility(content: Mapping[str, Any]) -> None:
    only((int, float, type(None)), content["utility_score"])
    only(dict, content.get("tasks") or {}, content.get("n_items") or {})


def _check_audit(content: Mapping[str, Any]) -> None:
    only(dict, content["scores"], *content["influence"].values(), content.get("verdict") or {})
    for scores in content["scores"].values():
        only(dict, *scores.values())
