"""The table itself: figures of each run, pooled over training seeds, one row per method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lightning_ssiuu.evaluation.results import attack_order
from lightning_ssiuu.evaluation.retention import Retention
from lightning_ssiuu.reports.compare.grouping import group_by_seed, labels, settings_of_each
from lightning_ssiuu.reports.compare.reading import Run
from lightning_ssiuu.reports.curves import number
from lightning_ssiuu.utils.errors import UserError

_SPLITS = ("forget", "test", "retain")
_INFLUENCE = ("d_plus_total", "d_minus_total", "n_spurious")
_SAME = 0.05  # per cent; scores of one model on two machines differ by rounding
Spread = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One cell: the mean of ``n`` training seeds and, of several, their standard deviation (n − 1).

    ``attack_std`` is over the seeds of the attack, the mean of the runs'; ``edge`` says whether the highest score of
    any run lies at the edge of what the attack tried.
    """

    mean: float
    std: float | None = None
    attack_std: float | None = None
    n: int = 1
    edge: bool = False

    @property
    def spread(self) -> float | None:
        """What is printed after ±: over training seeds, of a single one over the attack's seeds."""
        return self.attack_std if self.std is None else self.std


@dataclass(frozen=True)
class Column:
    """A column: ``key`` is its name in ``compare.csv``, ``title`` in print, ``form`` percent, count or influence.

    ``attacked`` says whether its figures come from an attack, ``relearned`` whether from one that has a grid.
    """

    key: str
    title: str
    form: str = "percent"
    attacked: bool = False
    relearned: bool = False

    @property
    def is_gap(self) -> bool:
        """Whether it holds gaps to the oracle, or to a control."""
        return self.key.endswith("_gap")


@dataclass
class Row:
    """A row of ``kind`` ``method``, ``original`` or ``oracle``; ``n`` is None where it is not from runs of its own."""

    label: str
    n: int | None = None
    cells: dict[str, Figure] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    kind: str = "method"


@dataclass
class Comparison:
    """A finished table: ``score`` is that of FS and RS, ``notes`` what a reader should know of it.

    ``chosen`` are the columns to show, in their order (None: all that are not empty); ``settings`` has for each method,
    by its label, the options that are not the same in all of them.
    """

    score: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    chosen: list[Column] | None = None
    settings: dict[str, dict[str, str]] = field(default_factory=dict)

    def choose(self, names: Sequence[str]) -> None:
        """Show these columns alone, by their keys (``harmful_*``: all such) or titles.

        Raises:
            UserError: If there is no such column.
        """
        chosen: dict[str, Column] = {}
        for name in names:
            found = [c for c in self.columns if fnmatchcase(c.key, name) or (c.title == name and not c.is_gap)]
            if not found:
                raise UserError("columns", name, f"some of {', '.join(column.key for column in self.columns)}")
            chosen |= {column.key: column for column in found}
        self.chosen = list(chosen.values())


def pool(figures: Iterable[Figure]) -> Figure:
    """One figure from those of several training seeds."""
    figures = list(figures)
    values = [figure.mean for figure in figures]
    spreads = [figure.attack_std for figure in figures if figure.attack_std is not None]
    std, attack_std = stdev(values) if len(values) > 1 else None, mean(spreads) if spreads else None
    return Figure(mean(values), std, attack_std, len(values), any(figure.edge for figure in figures))


def attack_column(attack: str, p: float | None, variant: str | None, part: str = "", relearned: bool = False) -> Column:
    """The column of an attack; ``part`` is ``""``, ``"gap"`` (to the oracle, else the control) or ``"control"``."""
    options = [text for text in ("" if p is None else f"{p:g}", variant, part) if text]
    title = part if part == "gap" else " ".join([attack.replace("_lora", " LoRA"), *options])
    return Column("_".join([attack, *options]), title.replace("_", " "), attacked=True, relearned=relearned)


def attack_columns(runs: Sequence[Run], score: str) -> list[Column]:
    """Columns of every attack that any of the runs has been put under, with their gaps and controls.

    A score other than ``score`` is told in the title.
    """
    rows = [row for run in runs for row in run.attack["attacks"]]
    names = {(row["attack"], row["p"], row["variant"]) for row in rows}
    columns = []
    for attack, p, variant in sorted(names, key=lambda n: (attack_order(n[0]), n[1] or 0.0, n[2] or "")):
        same = [row for row in rows if (row["attack"], row["p"], row["variant"]) == (attack, p, variant)]
        parts = [part for part in ("control", "gap") if any(row.get(part) for row in same)]
        other = "" if same[0]["score"] == score else f" ({same[0]['score']})"
        relearned = same[0].get("n_attack") is not None
        first = attack_column(attack, p, variant, relearned=relearned)
        columns.append(replace(first, title=first.title + other))
        columns += [attack_column(attack, p, variant, part) for part in parts]
    return columns


def run_figures(run: Run, score: str, utility: str = "utility_score") -> dict[str, Figure]:
    """The figures of one run by column key; what is missing, or null because the run diverged, is left out.

    ``utility`` is the key of its utility score.
    """
    influence = run.metrics["after"].get("influence") or run.audit.get("influence", {}).get("unlearned", {})
    values = {
        "steps": run.metrics.get("steps"),
        **{f"{split}_score": run.scores.get(split, {}).get(score) for split in _SPLITS},
        utility: run.utility.get("utility_score"),
        **{key: influence.get(key) for key in _INFLUENCE},
        "attribution_correlation": run.audit.get("attribution_correlation"),
    }
    figures = {key: Figure(value) for key, given in values.items() if (value := number(given)) is not None}
    return figures | _attacked(run, "unlearned")


def _attacked(run: Run, model: str) -> dict[str, Figure]:
    figures = {}
    for row in run.attack["attacks"]:
        name = (row["attack"], row["p"], row["variant"])
        summary = row.get(model, {})
        parts: dict[str, Spread | None] = {"": summary.get("forget_score")}
        if model == "unlearned":
            parts |= {"gap": row.get("gap"), "control": (row.get("control") or {}).get("forget_score")}
        for part, spread in parts.items():
            if spread and (value := number(spread.get("mean"))) is not None:
                edge = not part and summary.get("inside_grid") is False
                # Where nothing is random there is one figure, and no spread.
                std = number(spread.get("std")) if len(spread.get("per_seed") or ()) > 1 else None
                figures[attack_column(*name, part).key] = Figure(value, None, std, 1, edge)
    return figures


def _utility_columns(runs: Sequence[Run]) -> dict[str, Column]:
    # By suite: scores of different ones are not compared.
    suites = sorted({run.suite for run in runs if run.utility}) or [""]
    keys = [
        "_".join(["utility_score", *(suite.replace(",", "").split() if len(suites) > 1 else ())]) for suite in suites
    ]
    return {s: Column(key, f"US ({s})" if s else "US") for s, key in zip(suites, keys, strict=True)}


def compare_runs(runs: Sequence[Run], score: str, given: Mapping[Path, str] | None = None) -> Comparison:
    """Make the table of runs that :func:`.reading.check_comparable` has passed.

    The first row is the original model's, where all methods began with the same one; the last is the oracle's: its
    figures under attack from ``attack.json``, its scores from a run on the retain set alone if there is one among
    ``runs``, else from ``audit.json``. ``given`` are names of runs by their resolved paths.
    """
    groups, utilities = group_by_seed(runs), _utility_columns(runs)
    figures = {id(run): run_figures(run, score, utilities[run.suite].key if run.utility else "") for run in runs}
    oracles = [group for group in groups if group[0].is_oracle]
    oracle_runs = oracles[0] if len(oracles) == 1 else []
    groups = [group for group in groups if group is not oracle_runs]
    names = labels(groups, given) if groups else []
    rows = []
    for label, group in zip(names, groups, strict=True):
        rows.append(_row(label, group, [figures[id(run)] for run in group]))
    columns = [
        *(Column("steps", "steps", "count"), Column("forget_score", "FS"), Column("test_score", "RS")),
        *(Column("retain_score", "retain"), *utilities.values()),
        *attack_columns(runs, score),
        *(Column("d_plus_total", "D⁺", "influence"), Column("d_minus_total", "D⁻", "influence")),
        *(Column("n_spurious", "spurious", "count"), Column("attribution_correlation", "corr.", "influence")),
    ]
    methods = [run for group in groups for run in group]
    original = _original([run for run in methods if run.metrics["objective"] != "FineTuning"], score)
    oracle = _oracle(_row("oracle", oracle_runs, [figures[id(run)] for run in oracle_runs], "oracle"), methods, score)
    table = [*([original] if original else []), *rows, *([oracle] if oracle else [])]
    notes = [note for row in rows for note in _gaps_in(row, columns)] + _collapsed(runs) + unlike_attacks(runs)
    notes += _unlike_utility(runs) + _oracles(runs, original, oracle, score)
    settings = dict(zip(names, settings_of_each(groups), strict=True)) if groups else {}
    return Comparison(score, columns, table, notes, settings=settings)


def _row(label: str, runs: list[Run], figures: Sequence[Mapping[str, Figure]], kind: str = "method") -> Row:
    keys = dict.fromkeys(key for cells in figures for key in cells)
    pooled = {key: pool(cells[key] for cells in figures if key in cells) for key in keys}
    return Row(label, len(runs), pooled, runs, kind)


def _original(runs: Sequence[Run], score: str) -> Row | None:
    cells = {}
    for split in _SPLITS:
        given = [number(run.metrics["before"]["scores"].get(split, {}).get(score)) for run in runs]
        values = [value for value in given if value is not None]
        if len(values) < len(runs) or (values and max(values) - min(values) > _SAME):
            return None
        if values:
            cells[f"{split}_score"] = Figure(values[0])
    return Row("original", None, cells, kind="original") if cells else None


def _oracle(own: Row, methods: Sequence[Run], score: str) -> Row | None:
    beside = []
    for run in methods:
        scores = run.audit.get("scores", {}).get("oracle", {})
        values = {f"{split}_score": number(scores.get(split, {}).get(score)) for split in _SPLITS}
        influence = run.audit.get("influence", {}).get("oracle", {})
        values |= {key: number(influence.get(key)) for key in _INFLUENCE}
        beside.append({k: Figure(v) for k, v in values.items() if v is not None} | _attacked(run, "oracle"))
    cells = {}
    for key in dict.fromkeys(key for given in beside for key in given):
        figures = [given[key] for given in beside if key in given]
        # One oracle, put beside several runs, is one figure.
        cells[key] = figures[0] if len(set(figures)) == 1 else pool(figures)
    # A run's own influence is against the model its fine-tuning began with.
    known = {*_INFLUENCE, *(key for key in cells if not key.endswith("_score"))}
    cells |= {key: figure for key, figure in own.cells.items() if key not in known and not key.endswith("_gap")}
    return Row("oracle", own.n or None, cells, own.runs, "oracle") if cells else None


def _gaps_in(row: Row, columns: Sequence[Column]) -> list[str]:
    counts = [(column, row.cells[column.key].n) for column in columns if column.key in row.cells and not column.is_gap]
    return [f"{row.label}: {column.title} is from {n} of {row.n} runs" for column, n in counts if n != row.n]


def _collapsed(runs: Sequence[Run]) -> list[str]:
    return [f"{run.path}: the retain score fell to chance (collapsed)" for run in runs if run.metrics.get("collapsed")]


def unlike_attacks(runs: Sequence[Run]) -> list[str]:
    """A note on each attack whose options, data or score are not the same in all runs."""
    notes = []
    given: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for attack, settings in (run.attack.get("settings") or {}).items():
            own = {
                key: _set(value)
                for key, value in settings.items()
                if key not in ("provenance", "collapsed", "oracle_retains")
            }
            if attack == "quantization" and "quantization" in own:
                own["widths"] = own.pop("quantization")  # as earlier versions called it
            # The digests of earlier versions are of the text.
            data = "data" if run.rendered else "data of earlier versions"
            given.setdefault(attack, []).append(own | {data: settings.get("provenance", {}).get("data_sha256")})
    for attack, each in given.items():
        keys = sorted(set().union(*each))
        # An option that only some of the runs' versions had is not compared.
        values = {key: [settings[key] for settings in each if key in settings] for key in keys}
        if unlike := [key for key in keys if any(value != values[key][0] for value in values[key])]:
            notes.append(f"{attack}: the runs were attacked with different {', '.join(unlike)}")
    return notes


def _set(value: Any) -> Any:
    # Without options that are not set: an earlier version may not have had them.
    return {key: inner for key, inner in value.items() if inner is not None} if isinstance(value, dict) else value


def _unlike_utility(runs: Sequence[Run]) -> list[str]:
    counts: dict[str, list[Any]] = {}
    for run in runs:
        if run.utility.get("n_items"):
            counts.setdefault(run.suite, []).append(run.utility["n_items"])
    return [
        f"utility: the runs were measured on different numbers of items of {suite}"
        for suite, given in counts.items()
        if any(items != given[0] for items in given)
    ]


def _oracles(runs: Sequence[Run], original: Row | None, oracle: Row | None, score: str) -> list[str]:
    # An oracle that lost what it was to keep is no floor, and no gap to it tells anything.
    told = []
    for run in runs:
        settings = (run.attack.get("settings") or {}).values()
        told += [f"that beside {run.path}"] * any(row.get("oracle_retains") is False for row in settings)
        told += [f"that of the audit of {run.path}"] * ((run.audit.get("verdict") or {}).get("oracle_retains") is False)
    if original and oracle and all("retain_score" in row.cells for row in (original, oracle)):
        before, after = (row.cells["retain_score"].mean for row in (original, oracle))
        kept = Retention(score, before, after, 0.0, n=None)
        told += [f"that of the table ({kept.change})"] * kept.lost
    return [f"an oracle does not retain, and is no floor: {one}" for one in dict.fromkeys(told)]


def front_of(row: Row, attacks: Sequence[str]) -> tuple[float, float] | None:
    """Retention and recovery of a row: its test score, and the highest of its forget scores under these attacks."""
    if "test_score" not in row.cells or not attacks or not all(key in row.cells for key in attacks):
        return None
    return row.cells["test_score"].mean, max(row.cells[key].mean for key in attacks)


def common_attacks(comparison: Comparison) -> list[str]:
    """Relearning attacks that every method has been put under: only these tell whose highest score is lower.

    Of these, those that the oracle has been put under too, if there are any.
    """
    attacks = [column.key for column in comparison.columns if column.relearned]
    attacked = [row for row in comparison.rows if row.kind == "method" and any(key in row.cells for key in attacks)]
    common = [key for key in attacks if attacked and all(key in row.cells for row in attacked)]
    oracle = next((row.cells for row in comparison.rows if row.kind == "oracle"), {})
    return [key for key in common if key in oracle] or common


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the ``(retention, recovery)`` that no other one beats in both: as high, and as low, as it can be.

    By falling retention; of equal points all.
    """
    beaten = [any(x >= a and y <= b and (x, y) != (a, b) for x, y in points) for a, b in points]
    front = (i for i, is_beaten in enumerate(beaten) if not is_beaten)
    return sorted(front, key=lambda i: (-points[i][0], points[i][1], i))
