"""``lightning-ssiuu compare``: one table, one page and two pictures from finished runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_ssiuu.reports.compare.reading import Run, check_comparable, read_runs
from lightning_ssiuu.reports.compare.table import Comparison, compare_runs
from lightning_ssiuu.reports.compare.writing import csv_rows, latex, markdown, print_comparison
from lightning_ssiuu.utils.errors import UserError, one_line
from lightning_ssiuu.utils.files import (
    check_space,
    print_written,
    refuse_existing,
    refuse_links,
    write_csv,
    written_atomically,
)
from lightning_ssiuu.utils.messages import parsing

_TEXTS = {"compare.md": markdown, "compare.tex": latex}
_PLOTS = ("plots/recovery_curves.pdf", "plots/pareto.pdf")
_OUTPUTS = ("compare.html", "compare.csv", *_TEXTS, *_PLOTS)
_Path = str | os.PathLike[str]


def compare(
    runs: Sequence[_Path],
    output: _Path | None = None,
    score: str | None = None,
    overwrite: bool = False,
    columns: Sequence[str] | None = None,
    labels: Mapping[str, str] | Mapping[Path, str] | None = None,
) -> Comparison:
    """Put finished runs side by side; print the table and write it as a page, CSV, Markdown, LaTeX and plots.

    Args:
        runs: Run directories. Of several, those that exist and are no finished run are passed over with a note.
        output: Directory for ``compare.html``, ``compare.csv``, ``compare.md``, ``compare.tex`` and ``plots/``; by
            default ``compare/`` in the directory that all runs lie in.
        score: To compare by before an attack; by default the one the runs were stopped by.
        overwrite: Replace an earlier comparison.
        columns: Columns of the table, in their order, by their names in ``compare.csv`` (``harmful_*``: all such) or
            in print; by default all that are not empty.
        labels: Names of rows, each by one of its runs; by default what differs between the runs.

    Returns:
        The table.

    Raises:
        UserError: If a path is missing or cannot be read, or the runs do not belong in one table: other data, another
            score, the same configuration and seed twice; if there is no such column, or no such run to name.
    """
    finished, skipped = read_runs(runs)
    score = check_comparable(finished, score)
    folder = tables_folder(finished, output, "compare", _OUTPUTS, overwrite)
    refuse_links("output", folder, ["plots"])
    comparison = compare_runs(finished, score, named_rows(finished, labels or {}))
    if columns is not None:
        comparison.choose(columns)
    try:
        _write(folder, comparison)
    finally:  # also where the disk refuses
        print_comparison(comparison)
    passed_over = [
        f"{path} is no finished run, passed over" for path in skipped if Path(path).resolve() != folder.resolve()
    ]
    for note in [*passed_over, *comparison.notes]:
        print(f"lightning-ssiuu: note: {one_line(note)}", file=sys.stderr)
    print_written(folder, _OUTPUTS)
    return comparison


def tables_folder(
    runs: Sequence[Run], output: _Path | None, name: str, outputs: Sequence[str], overwrite: bool
) -> Path:
    """Where tables of runs go: ``output``, else the folder ``name`` where all runs lie; a UserError if it cannot be."""
    parents = [os.path.dirname(os.path.abspath(run.path)) for run in runs]
    folder = Path(output) if output is not None else Path(os.path.commonpath(parents)) / name
    refuse_links("output", folder, [])
    refuse_existing("output", folder, outputs, overwrite)
    check_space("output", folder, 1 << 20)
    return folder


def named_rows(runs: Sequence[Run], labels: Mapping[str, str] | Mapping[Path, str]) -> dict[Path, str]:
    """The names of rows by their runs' resolved paths; a UserError where one is given to what is no row."""
    methods = {run.path.resolve() for run in runs if not run.is_oracle}
    for path in labels:
        if Path(path).resolve() not in methods:
            raise UserError("label", os.fspath(path), "RUN=NAME with one of the runs that is no oracle")
    return {Path(path).resolve(): name for path, name in labels.items()}


def row_label(text: str) -> tuple[str, str]:
    """``RUN=NAME`` as a pair. A path may hold the sign, too: the first part that exists counts."""
    parts = text.split("=")
    for end in range(1, len(parts)):
        if (path := "=".join(parts[:end])) and Path(path).exists() and (name := "=".join(parts[end:]).strip()):
            return path, name
    raise UserError("label", text, "RUN=NAME, with a run directory that exists")


def _write(folder: Path, comparison: Comparison) -> None:
    # matplotlib takes a while
    from lightning_ssiuu.reports.compare.page import comparison_html
    from lightning_ssiuu.reports.compare.plots import pareto_figure, recovery_figure
    from lightning_ssiuu.utils.figures import save_pdf

    write_csv(folder / "compare.csv", *csv_rows(comparison))
    for name, text in {"compare.html": comparison_html, **_TEXTS}.items():
        with written_atomically(folder / name) as temporary:
            temporary.write_text(text(comparison), encoding="utf-8")
    for name, figure in zip(_PLOTS, (recovery_figure(comparison), pareto_figure(comparison)), strict=True):
        if figure is not None:
            save_pdf(figure, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier comparison


def run(args: list[str]) -> None:
    """Parse and run ``compare``."""
    from jsonargparse import ArgumentParser

    text = (
        "Put finished runs side by side: a table on the screen, on a page, as CSV, Markdown and LaTeX, and two plots."
    )
    parser = ArgumentParser(prog="lightning-ssiuu compare", description=text, exit_on_error=False)
    parser.add_argument("runs", nargs="+", type=str, help="run directories; those of several seeds become one row")
    text = "directory for the results (default: compare/ in the directory that all runs lie in)"
    parser.add_argument("--output", type=str, help=text)
    parser.add_argument("--score", type=str, help="score to compare by (default: the one the runs were stopped by)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier comparison")
    text = "columns of the table, by their names in compare.csv (harmful_*: all such) or in print (default: all)"
    parser.add_argument("--columns", nargs="+", type=str, metavar="COLUMN", help=text)
    text = "names of rows, each by one of its runs (default: what differs between the runs)"
    parser.add_argument("--label", nargs="+", type=str, metavar="RUN=NAME", help=text)
    with parsing():
        config = parser.parse_args(args)
    labels = dict(map(row_label, config.label or []))
    compare(config.runs, config.output, config.score, config.overwrite, config.columns, labels)
