"""``lightning-ssiuu leaderboard``: a page of audited models, several training seeds of a method in one row."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_ssiuu.cli.compare import named_rows, row_label, tables_folder
from lightning_ssiuu.reports.leaderboard.reading import read_audits
from lightning_ssiuu.reports.leaderboard.table import Board, boards
from lightning_ssiuu.reports.leaderboard.writing import csv_rows, leaderboard_html, markdown, print_boards
from lightning_ssiuu.utils.errors import one_line
from lightning_ssiuu.utils.files import print_written, write_csv, written_atomically
from lightning_ssiuu.utils.messages import parsing

_TEXTS = {"leaderboard.html": leaderboard_html, "leaderboard.md": markdown}
_OUTPUTS = ("leaderboard.csv", *_TEXTS)
_Path = str | os.PathLike[str]


def leaderboard(
    runs: Sequence[_Path],
    output: _Path | None = None,
    overwrite: bool = False,
    labels: Mapping[str, str] | Mapping[Path, str] | None = None,
) -> list[Board]:
    """Put audited models into tables, one for each data set; print them and write a page, CSV and Markdown.

    Args:
        runs: Directories with an ``audit.json``. Of several, those that exist and have none are passed over with a
            note.
        output: Directory for ``leaderboard.html``, ``leaderboard.csv`` and ``leaderboard.md``; by default
            ``leaderboard/`` in the directory that all runs lie in.
        overwrite: Replace an earlier leaderboard.
        labels: Names of rows, each by one of its runs; by default what differs between the runs.

    Returns:
        The tables.

    Raises:
        UserError: If a path is missing or cannot be read, one model is audited twice, or there is no such run to name.
    """
    audited, skipped = read_audits(runs)
    folder = tables_folder(audited, output, "leaderboard", _OUTPUTS, overwrite)
    found = boards(audited, named_rows(audited, labels or {}))
    try:
        write_csv(folder / "leaderboard.csv", *csv_rows(found))
        for name, text in _TEXTS.items():
            with written_atomically(folder / name) as temporary:
                temporary.write_text(text(found), encoding="utf-8")
    finally:  # also where the disk refuses
        print_boards(found)
    notes = [f"{path} has no audit, passed over" for path in skipped if Path(path).resolve() != folder.resolve()]
    for note in [*notes, *(f"{board.title}: {note}" for board in found for note in board.notes)]:
        print(f"lightning-ssiuu: note: {one_line(note)}", file=sys.stderr)
    print_written(folder, _OUTPUTS)
    return found


def run(args: list[str]) -> None:
    """Parse and run ``leaderboard``."""
    from jsonargparse import ArgumentParser

    text = "Put audited models into tables: on the screen, on a page, as CSV and Markdown."
    parser = ArgumentParser(prog="lightning-ssiuu leaderboard", description=text, exit_on_error=False)
    parser.add_argument("runs", nargs="+", type=str, help="directories with audit.json; several seeds become one row")
    text = "directory for the results (default: leaderboard/ in the directory that all runs lie in)"
    parser.add_argument("--output", type=str, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier leaderboard")
    text = "names of rows, each by one of its runs (default: what differs between the runs)"
    parser.add_argument("--label", nargs="+", type=str, metavar="RUN=NAME", help=text)
    with parsing():
        config = parser.parse_args(args)
    leaderboard(config.runs, config.output, config.overwrite, dict(map(row_label, config.label or [])))
