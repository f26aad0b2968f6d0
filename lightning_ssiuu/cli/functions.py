"""The commands as functions of Python: models in memory, results to look at, no files unless asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

from lightning_ssiuu.utils.errors import UserError


@dataclass(frozen=True, repr=False)
class Result:
    """What a command found: a table that shows itself, in a notebook too, and all of it under ``content``.

    Args:
        title: What the table shows, with its unit.
        columns: Names of the columns.
        rows: Cells: text, numbers, or None.
        content: What the command writes as JSON.
        note: A line below the table.

    Example:
        >>> Result("Scores, %", ("set", "score"), (("forget", 9.87), ("retain", None)))
        Scores, %
        set     score
        forget    9.9
        retain
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    content: Any = field(default=None)
    note: str = ""

    def to_pandas(self) -> Any:
        """The table as a ``pandas.DataFrame``, with numbers as they are."""
        import pandas

        return pandas.DataFrame(list(self.rows), columns=list(self.columns))

    def __repr__(self) -> str:
        cells = [list(self.columns), *([_shown(value) for value in row] for row in self.rows)]
        widths = [max(len(row[place]) for row in cells) for place in range(len(self.columns))]
        right = [any(isinstance(row[place], float) for row in self.rows) for place in range(len(self.columns))]
        lines = [
            "  ".join(
                text.rjust(w) if r else text.ljust(w) for text, w, r in zip(row, widths, right, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join([self.title, *lines, *([self.note] if self.note else [])])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(_shown(value))}</td>" for value in row) + "</tr>" for row in self.rows
        )
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        table = f"<caption>{escape(self.title)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
        return f"<table>{table}</table>{note}"


@dataclass(frozen=True, repr=False)
class Verdict(Result):
    """An audit: ``label`` is erased, hidden, mixed, collapsed or not unlearned.

    Example:
        >>> Verdict("Scores, %", (), (), {"verdict": {"label": "erased"}}).label
        'erased'
    """

    @property
    def label(self) -> str:
        """The verdict in a word or two."""
        return str(self.content["verdict"]["label"])


def attack(model: Any, oracle: Any = None, tokenizer: Any = None, output: str | None = None, **options: Any) -> Result:
    """Attack a model, a checkpoint or one in memory: before and highest forget score in percent, by p and model.

    Args:
        model: The unlearned model: a checkpoint, or a transformers model with its ``tokenizer``.
        oracle: The same for a model retrained without the forget set; None: invented facts are used instead.
        tokenizer: The tokenizer of models in memory.
        output: Directory for ``attack.json``; None: nothing is written.
        **options: The options of the command ``attack``.

    Raises:
        UserError: As the command does.

    Example:
        >>> from lightning_ssiuu import Facts, Harmful
        >>> weak = Harmful(p=[0.3], learning_rates=[1e-4], seeds=[0], epochs=1)
        >>> attack("tiny", attack=weak, data=Facts(), control="none").to_pandas()["model"].tolist()
        ['unlearned']
    """
    from lightning_ssiuu.cli.attack import attack as command

    with _prepared({"model": model, "oracle": oracle}, tokenizer, output) as (models, folder):
        found = command(**models, output=folder, **options)
    rows = [
        (
            row["attack"],
            row["p"],
            row["variant"],
            name,
            row[name]["before"]["mean"],
            *_spread(row[name]["forget_score"]),
        )
        for row in found
        for name in ("unlearned", "oracle", "control")
        if "before" in (row.get(name) or {})
    ]
    columns = ("attack", "p", "variant", "model", "before", "highest", "s.d.")
    score = found[0]["score"].replace("_", " ") if found else "score"
    return Result(f"Forget {score} under attack, %", columns, tuple(rows), found)


def audit(
    original: Any = None,
    unlearned: Any = None,
    oracle: Any = None,
    tokenizer: Any = None,
    output: str | None = None,
    **options: Any,
) -> Verdict:
    """Judge a model before and after unlearning: scores in percent by set and model, and the verdict.

    Args:
        original: The model before: a checkpoint, or a transformers model with its ``tokenizer``.
        unlearned: The model after.
        oracle: A model retrained without the forget set.
        tokenizer: The tokenizer of models in memory.
        output: Directory for ``audit.json`` and ``report.html``; None: nothing is written.
        **options: The options of the command ``audit``.

    Raises:
        UserError: As the command does.

    Example:
        >>> audit("tiny", "tiny", relearning_probe=False, own_change=False, probe_examples=4).label
        'not unlearned'
    """
    from lightning_ssiuu.cli.audit import audit as command

    given = {"original": original, "unlearned": unlearned, "oracle": oracle}
    with _prepared(given, tokenizer, output) as (models, folder):
        content = command(**models, output=folder, **options)
    scores: Mapping[str, Any] = content["scores"]
    rows = [
        (split, name, *(by_split.get(split, {}).get(name) for by_split in scores.values()))
        for split, measured in next(iter(scores.values())).items()
        for name in measured
    ]
    columns = ("set", "score", *scores)
    return Verdict("Scores, %", columns, tuple(rows), content, content["verdict"]["sentence"])


def utility(model: Any, tokenizer: Any = None, output: str | None = None, **options: Any) -> Result:
    """What a model can do besides: scores of a suite's tasks, in percent.

    Args:
        model: A checkpoint, or a transformers model with its ``tokenizer``.
        tokenizer: Of a model in memory.
        output: Directory for ``utility.json``; None: nothing is written.
        **options: The options of the command ``utility``.

    Raises:
        UserError: As the command does.

    Example:
        >>> utility("tiny", limit=4).columns
        ('task', 'items', 'score')
    """
    from lightning_ssiuu.cli.utility import utility as command

    with _prepared({"model": model}, tokenizer, output) as (models, folder):
        content = command(**models, output=folder, **options)
    rows = [(task, content["n_items"].get(task), value) for task, value in content["tasks"].items()]
    rows.append(("mean", None, content["utility_score"]))
    return Result(f"Utility ({content['suite']}), %", ("task", "items", "score"), tuple(rows), content)


def privacy(model: Any, oracle: Any = None, tokenizer: Any = None, output: str | None = None, **options: Any) -> Result:
    """Membership inference on a model: AUC in percent by attack and model.

    Args:
        model: A checkpoint, or a transformers model with its ``tokenizer``.
        oracle: A model retrained without the forget set.
        tokenizer: The tokenizer of models in memory.
        output: Directory for ``privacy.json``; None: nothing is written.
        **options: The options of the command ``privacy``.

    Raises:
        UserError: As the command does.

    Example:
        >>> privacy("tiny", gradient_norm=False).columns
        ('attack', 'model')
    """
    from lightning_ssiuu.cli.privacy import privacy as command

    with _prepared({"model": model, "oracle": oracle}, tokenizer, output) as (models, folder):
        content = command(**models, output=folder, **options)
    auc: Mapping[str, Mapping[str, float]] = content["membership_auc"]
    rows = [(name, *(of_model.get(name) for of_model in auc.values())) for name in auc["model"]]
    return Result("Membership inference, AUC in %", ("attack", *auc), tuple(rows), content)


def evaluate(
    model: Any, suite: str, reference: Any = None, tokenizer: Any = None, output: str | None = None, **options: Any
) -> Result:
    """A benchmark by its own protocol: figures by name, in the benchmark's units.

    Args:
        model: A checkpoint, or a transformers model with its ``tokenizer``.
        suite: Name of the suite, such as ``"tofu"``.
        reference: A model that did not see the forget set, or the log of one (``TOFU_EVAL.json``).
        tokenizer: The tokenizer of models in memory.
        output: Directory for ``evaluate.json`` and the log; None: nothing is written.
        **options: The options of the command ``evaluate``.

    Raises:
        UserError: As the command does.

    Example:
        >>> evaluate("tiny", "tofu", path="nowhere")
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: path: got 'nowhere', allowed: an existing directory, or a data set of the hub \
(owner/name)
    """
    from lightning_ssiuu.cli.evaluate import evaluate as command

    with _prepared({"model": model, "reference": reference}, tokenizer, output) as (models, folder):
        content = command(models["model"], suite, models["reference"], output=folder, **options)
    rows = tuple(content["figures"].items())
    return Result(f"Suite {suite}", ("figure", "value"), rows, content)


def compare(runs: Sequence[Any], output: str | None = None, **options: Any) -> Result:
    """Finished runs in one table, one row per method.

    Args:
        runs: Run directories.
        output: Directory for the table's files and plots; None: nothing is written.
        **options: The options of the command ``compare``.

    Raises:
        UserError: As the command does.

    Example:
        >>> compare(["nowhere"])
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: runs: got 'nowhere', allowed: directories that exist
    """
    from lightning_ssiuu.cli.compare import compare as command
    from lightning_ssiuu.reports.compare.writing import csv_rows

    with _prepared({}, None, output) as (_, folder):
        comparison = command(runs, output=folder, **options)
    header, rows = csv_rows(comparison)
    return Result(f"Comparison by {comparison.score}", tuple(header), tuple(map(tuple, rows)), comparison)


def leaderboard(runs: Sequence[Any], output: str | None = None, **options: Any) -> Result:
    """Audited models in one table: verdict, gap to the oracle and what is kept, one row per method and data set.

    Args:
        runs: Directories with an ``audit.json``.
        output: Directory for the page and the tables; None: nothing is written.
        **options: The options of the command ``leaderboard``.

    Raises:
        UserError: As the command does.

    Example:
        >>> try:
        ...     leaderboard(["audits/of_nobody"])
        ... except UserError as mistake:
        ...     print(mistake)
        runs: got 'audits/of_nobody', allowed: directories that exist
    """
    from lightning_ssiuu.cli.leaderboard import leaderboard as command
    from lightning_ssiuu.reports.leaderboard.table import COLUMNS

    with _prepared({}, None, output) as (_, folder):
        boards = command(runs, output=folder, **options)
    lines = [(board.title, line) for board in boards for line in board.lines]
    keys = [column.key for column in COLUMNS if any(column.key in line.cells for _, line in lines)]
    figures = [[line.cells[key].mean if key in line.cells else None for key in keys] for _, line in lines]
    told = [(title, line.label, line.n, line.verdict) for title, line in lines]
    rows = tuple((*first, *others) for first, others in zip(told, figures, strict=True))
    return Result("Leaderboard", ("data", "method", "n", "verdict", *keys), rows, boards)


def meta_evaluate(knowing: Sequence[str], ignorant: Sequence[str], output: str | None = None, **options: Any) -> Result:
    """Which scores tell models with the knowledge from those without: figures in percent by score.

    Args:
        knowing: Checkpoints that were taught the forget set.
        ignorant: Checkpoints that never saw it.
        output: Directory for ``meta_evaluation.json``; None: nothing is written.
        **options: The options of the command ``meta-evaluate``.

    Raises:
        UserError: As the command does.

    Example:
        >>> meta_evaluate(["tiny"], ["tiny"], scores=["first_token"])
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: ignorant: got 'tiny', allowed: models that are not among the knowing ones
    """
    from lightning_ssiuu.cli.meta_evaluate import meta_evaluate as command

    with _prepared({}, None, output) as (_, folder):
        content = command(knowing, ignorant, output=folder, **options)
    judged: Mapping[str, Mapping[str, float]] = content["scores"]
    columns = tuple(next(iter(judged.values()), {}))
    rows = tuple((score, *figures.values()) for score, figures in judged.items())
    return Result("Meta-evaluation, %", ("score", *columns), rows, content)


@contextmanager
def _prepared(models: Mapping[str, Any], tokenizer: Any, output: str | None) -> Iterator[tuple[dict[str, Any], str]]:
    # Models in memory lie in a directory as long as the command runs; so do results that nobody asked for as files.
    # What the commands print is what comes back.
    with tempfile.TemporaryDirectory(prefix="lightning_ssiuu_") as folder:
        paths = {name: _saved(name, model, tokenizer, Path(folder)) for name, model in models.items()}
        with redirect_stdout(StringIO()):
            yield paths, output if output is not None else str(Path(folder) / "results")


def _saved(name: str, model: Any, tokenizer: Any, folder: Path) -> Any:
    if model is None or isinstance(model, (str, Path)):
        return None if model is None else str(model)
    from transformers import PreTrainedModel

    from lightning_ssiuu.models.export import save_pretrained

    model = getattr(model, "hf", model)  # AnswerModel's
    if not isinstance(model, PreTrainedModel):
        raise UserError(name, type(model).__name__, "a checkpoint, or a transformers model")
    if tokenizer is None:
        raise UserError("tokenizer", None, f"the tokenizer of {name}, which is a model in memory")
    save_pretrained(model, tokenizer, folder / name)
    return str(folder / name)


def _spread(spread: Mapping[str, Any]) -> tuple[Any, Any]:
    return spread["mean"], spread["std"]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 1 else f"{value:.3g}"
    return "" if value is None else str(value)
