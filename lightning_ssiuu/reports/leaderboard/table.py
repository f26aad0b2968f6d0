"""The tables: one for each data set, rows of several training seeds in the order of their gaps to the oracle."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ssiuu.reports.compare.grouping import group_by_seed, labels, settings_of_each
from lightning_ssiuu.reports.compare.reading import Run
from lightning_ssiuu.reports.compare.table import Column, Figure, Row, pool, unlike_attacks
from lightning_ssiuu.reports.curves import number

COLUMNS = (
    Column("gap", "gap", attacked=True),
    Column("relearned", "comes back"),
    Column("attacked", "attacked", attacked=True, relearned=True),
    Column("forget_score", "FS"),
    Column("kept", "kept"),
    Column("test_score", "RS"),
    Column("utility_score", "US"),
    Column("steps", "steps", "count"),
    Column("seconds", "seconds", "count"),
)
#: Verdicts from the best to the worst.
VERDICTS = ("erased", "mixed", "hidden", "collapsed", "not unlearned")
_UNLEARNED = VERDICTS[:3]


@dataclass
class Line(Row):
    """A row with its audits' verdicts, and how often each was given; ``single`` says whether it is of one model."""

    verdicts: dict[str, int] = field(default_factory=dict)

    @property
    def single(self) -> bool:
        """Whether there is one model only: how it varies with the training seed is then not known."""
        return self.kind == "method" and self.n == 1

    @property
    def verdict(self) -> str:
        """In print: ``"hidden"``, of several models ``"hidden 2, mixed 1"``."""
        return next(iter(self.verdicts), "") if self.n == 1 else ", ".join(f"{v} {n}" for v, n in self.verdicts.items())


@dataclass
class Board:
    """A finished table: ``title`` names the data, ``settings`` what differs between the rows, by their labels."""

    title: str
    score: str
    lines: list[Line]
    notes: list[str]
    settings: dict[str, dict[str, str]]

    @property
    def columns(self) -> list[Column]:
        """Those that are not empty."""
        return [column for column in COLUMNS if any(column.key in line.cells for line in self.lines)]


def boards(runs: Sequence[Run], given: Mapping[Path, str] | None = None) -> list[Board]:
    """A table for each data set and score that the audits are of, by their titles.

    Rows of several models come first, by their mean gap to the oracle, those after all others in which a model
    collapsed or was not unlearned. Rows of one model follow by their names: one training seed ranks nothing. ``given``
    are names of rows by their runs' resolved paths.

    Raises:
        UserError: If names do not fit the rows.
    """
    tasks: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        tasks.setdefault((_title(run), str(run.data), run.metrics["score"]), []).append(run)
    titles = Counter(title for title, _, _ in tasks)
    found = []
    for (title, data, score), of_task in sorted(tasks.items()):
        named = f"{title}, {data[:8]}, {score.replace('_', ' ')}" if titles[title] > 1 else title
        own = {path: name for path, name in (given or {}).items() if path in {run.path.resolve() for run in of_task}}
        found.append(_board(named, score, of_task, own))
    return found


def _title(run: Run) -> str:
    suite, data = run.audit.get("suite") or {}, run.config.get("data")
    if suite:
        return f"{str(suite.get('name')).upper()} {suite.get('split')}, {suite.get('model')}"
    return str(data.get("class_path", "")).rpartition(".")[2] if isinstance(data, dict) else f"data {run.data}"[:13]


def _board(title: str, score: str, runs: Sequence[Run], given: Mapping[Path, str]) -> Board:
    for run in runs:  # without a configuration a given name says which are one method
        if not run.config and (name := given.get(run.path.resolve())):
            run.config, run.metrics["objective"] = {"name": name}, name
    groups = group_by_seed(runs)
    names = labels(groups, given)
    lines = [_line(name, group) for name, group in zip(names, groups, strict=True)]
    lines.sort(key=_place)
    settings = dict(zip(names, settings_of_each(groups), strict=True))
    ends = [line for kind in ("original", "oracle") if (line := _reference(kind, runs, score)) is not None]
    table = [*ends[:1], *lines, *ends[1:]] if ends and ends[0].kind == "original" else [*lines, *ends]
    return Board(title, score, table, _notes(lines, runs), settings)


def _line(name: str, group: list[Run]) -> Line:
    figures = [_figures(run) for run in group]
    keys = dict.fromkeys(key for cells in figures for key in cells)
    cells = {key: pool(one[key] for one in figures if key in one) for key in keys}
    counted = Counter(run.audit["verdict"]["label"] for run in group)
    order = [*(verdict for verdict in VERDICTS if verdict in counted), *sorted(set(counted) - {*VERDICTS})]
    return Line(name, len(group), cells, group, verdicts={verdict: counted[verdict] for verdict in order})


def _figures(run: Run) -> dict[str, Figure]:
    score, after = run.metrics["score"], run.audit["scores"]["unlearned"]
    shares = [ground["share"] for ground in run.audit["verdict"]["grounds"] if ground["what"] == "relearning"]
    known = [share for share in map(number, shares) if share is not None]
    values = {
        **{f"{split}_score": after.get(split, {}).get(score) for split in ("forget", "test")},
        "relearned": 100 * max(known) if known else None,
        "kept": _kept(run, "unlearned", score),
        "utility_score": run.utility.get("utility_score"),
        "steps": run.metrics.get("steps"),
        "seconds": run.metrics["provenance"]["wall_s"],
    }
    figures = {key: Figure(value) for key, given in values.items() if (value := number(given)) is not None}
    return figures | _strongest(run, "unlearned")


def _strongest(run: Run, model: str) -> dict[str, Figure]:
    # Under the attack that finds most beyond the oracle, or beyond the control; with neither, the highest.
    found = []
    for row in run.attack["attacks"]:
        highest, gap = (row.get(model) or {}).get("forget_score") or {}, row.get("gap") or {}
        if (value := number(highest.get("mean"))) is not None:
            beyond = number(gap.get("mean"))
            edge = row[model].get("inside_grid") is False
            figures = {"attacked": Figure(value, None, number(highest.get("std")), 1, edge)}
            if beyond is not None and model == "unlearned":
                figures["gap"] = Figure(beyond, None, number(gap.get("std")))
            found.append((value if beyond is None else beyond, figures))
    return max(found, key=lambda pair: pair[0])[1] if found else {}


def _reference(kind: str, runs: Sequence[Run], score: str) -> Line | None:
    # The original or the oracle: each audit's, and each model once.
    models: dict[str, dict[str, Figure]] = {}
    for run in runs:
        if (scores := run.audit["scores"].get(kind)) is None:
            continue
        digest = (run.audit["provenance"].get("weights_sha256") or {}).get(kind, str(run.path))
        values = {f"{split}_score": number(scores.get(split, {}).get(score)) for split in ("forget", "test")}
        values["kept"] = _kept(run, kind, score)
        cells = {key: Figure(value) for key, value in values.items() if value is not None}
        models.setdefault(digest, cells | (_strongest(run, kind) if kind == "oracle" else {}))
    if not models:
        return None
    keys = dict.fromkeys(key for cells in models.values() for key in cells)
    pooled = {key: pool(cells[key] for cells in models.values() if key in cells) for key in keys}
    return Line(kind, len(models), pooled, kind=kind)


def _kept(run: Run, model: str, score: str) -> float | None:
    own, before = (number(run.audit["scores"][m].get("retain", {}).get(score)) for m in (model, "original"))
    return 100 * own / before if own is not None and before else None


def _place(line: Line) -> tuple[bool, bool, float, str]:
    broken = any(verdict not in _UNLEARNED for verdict in line.verdicts)
    gap = line.cells["gap"].mean if "gap" in line.cells else math.inf
    return line.single, broken and not line.single, 0.0 if line.single else gap, line.label


def _notes(lines: Sequence[Line], runs: Sequence[Run]) -> list[str]:
    notes = []
    if alone := [line.label for line in lines if line.single]:
        told = (
            "of one model each, by their names: how they vary with the training seed is not known, so they rank nothing"
        )
        notes.append(f"{'; '.join(alone)}: {told}")
    without = [str(run.path) for run in runs if run.attack["attacks"] and "oracle" not in run.audit["scores"]]
    if without:
        notes.append(f"no oracle: the gap is to the control, facts nobody was taught: {', '.join(without)}")
    lost = [str(run.path) for run in runs if run.audit["verdict"].get("oracle_retains") is False]
    if lost:
        notes.append(f"the oracle does not retain, and is no floor: {', '.join(lost)}")
    return notes + unlike_attacks(runs)


def provenance_of(line: Line) -> list[dict[str, Any]]:
    """Where each model of a row comes from: path, seed, digests, versions, and the commands that made it."""
    told = []
    for run in line.runs:
        block = run.audit["provenance"]
        weights = block.get("weights_sha256") or {}
        config = shlex.quote(f"{run.path.as_posix()}/config.yaml")
        fitted = [f"lightning-ssiuu fit --config {config}"] * bool(run.metrics.get("steps"))
        told.append(
            {
                "run": run.path.as_posix(),
                "verdict": run.audit["verdict"]["label"],
                "seed": run.config.get("seed_everything"),
                "commands": fitted + [run.audit["command"]] * bool(run.audit.get("command")),
                "weights": weights.get("unlearned"),
                "oracle": weights.get("oracle"),
                "data": block.get("data_sha256"),
                "versions": block.get("versions") or {},
            }
        )
    return told
