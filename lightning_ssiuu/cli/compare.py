"""``lightning-ssiuu compare``: one table and two pictures from finished runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_ssiuu.reports.compare.reading import check_comparable, read_runs
from lightning_ssiuu.reports.compare.table import Comparison, compare_runs
from lightning_ssiuu.reports.compare.writing import csv_rows, latex, markdown, print_comparison
from lightning_ssiuu.utils.errors import one_line
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
_PLOTS = ("plots/recovery_curves.png", "plots/pareto.png")
_OUTPUTS = ("compare.csv", *_TEXTS, *_PLOTS)
_Path = str | os.PathLike[str]


def compare(
    runs: Sequence[_Path], output: _Path | None = None, score: str | None = None, overwrite: bool = False
) -> Comparison:
    """Put finished runs side by side; print the table and write it as CSV, Markdown, LaTeX and plots.

    Args:
        runs: Run directories. Of several, those that exist and are no finished run are passed over with a note.
        output: Directory for ``compare.csv``, ``compare.md``, ``compare.tex`` and ``plots/``; by default ``compare/``
            in the directory that all runs lie in.
        score: To compare by before an attack; by default the one the runs were stopped by.
        overwrite: Replace an earlier comparison.

    Returns:
        The table.

    Raises:
        UserError: If a path is missing or cannot be read, or the runs do not belong in one table: other data, another
            score, the same configuration and seed twice.
    """
    finished, skipped = read_runs(runs)
    score = check_comparable(finished, score)
    parents = [os.path.dirname(os.path.abspath(run.path)) for run in finished]
    folder = Path(output) if output is not None else Path(os.path.commonpath(parents)) / "compare"
    refuse_links("output", folder, ["plots"])
    refuse_existing("output", folder, _OUTPUTS, overwrite)
    check_space("output", folder, 1 << 20)
    comparison = compare_runs(finished, score)
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


def _write(folder: Path, comparison: Comparison) -> None:
    from lightning_ssiuu.reports.compare.plots import save_pareto, save_recovery_curves  # matplotlib takes a while

    write_csv(folder / "compare.csv", *csv_rows(comparison))
    for name, text in _TEXTS.items():
        with written_atomically(folder / name) as temporary:
            temporary.write_text(text(comparison), encoding="utf-8")
    for name, save in zip(_PLOTS, (save_recovery_curves, save_pareto), strict=True):
        if not save(folder / name, comparison):
            (folder / name).unlink(missing_ok=True)  # of an earlier comparison


def run(args: list[str]) -> None:
    """Parse and run ``compare``."""
    from jsonargparse import ArgumentParser

    text = "Put finished runs side by side: a table on the screen, as CSV, Markdown and LaTeX, and two plots."
    parser = ArgumentParser(prog="lightning-ssiuu compare", description=text, exit_on_error=False)
    parser.add_argument("runs", nargs="+", type=str, help="run directories; those of several seeds become one row")
    text = "directory for the results (default: compare/ in the directory that all runs lie in)"
    parser.add_argument("--output", type=str, help=text)
    parser.add_argument("--score", type=str, help="score to compare by (default: the one the runs were stopped by)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier comparison")
    with parsing():
        config = parser.parse_args(args)
    compare(config.runs, config.output, config.score, config.overwrite)
