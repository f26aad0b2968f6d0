"""The tables on the screen, on a page, as CSV and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_ssiuu.reports.compare.writing import csv_text, markdown_text, shown
from lightning_ssiuu.reports.leaderboard.table import COLUMNS, Board, Line, provenance_of
from lightning_ssiuu.utils.errors import one_line
from lightning_ssiuu.utils.terminal import text_console

_SINGLE = "one model"
_ON_SCREEN = ("gap", "relearned", "forget_score", "kept")
_MEANING = {
    "gap": "gap: points that the attack finds beyond the oracle under the same attack (without one: the control).",
    "relearned": "comes back: share of what was lost that the verdict's strongest attack brings back.",
    "attacked": "attacked: the highest forget score under that attack.",
    "forget_score": "FS: forget score after unlearning.",
    "kept": "kept: retain score, per cent of the original's.",
    "test_score": "RS: test score.",
    "utility_score": "US: utility score.",
    "seconds": "seconds: of fit, on the machine that ran it.",
}


def caption(board: Board) -> str:
    """What the columns mean, in as many sentences as the table needs."""
    keys = {column.key for column in board.columns}
    said = [f"Per cent; scores are {board.score.replace('_', ' ')}."]
    said += [text for key, text in _MEANING.items() if key in keys]
    said += ["±: standard deviation over training seeds (n − 1), of one model over the attack's seeds."]
    edge = any(figure.edge for line in board.lines for figure in line.cells.values())
    return " ".join(said + ["(edge): at the edge of what the attack tried; a stronger one may find more."] * edge)


def name_of(line: Line) -> str:
    """The row's name; that it is of one model is part of it."""
    return f"{line.label} ({_SINGLE})" if line.single else line.label


def print_boards(boards: Sequence[Board], console: Console | None = None) -> None:
    """Print the tables, each below its title: of the columns those that a narrow screen has room for."""
    console = console or text_console()
    for board in boards:
        columns = [column for column in board.columns if column.key in _ON_SCREEN]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
        for title in ("method", "n", "verdict", *(column.title for column in columns)):
            table.add_column(
                Text(title), justify="left" if title in ("method", "verdict") else "right", overflow="fold"
            )
        for line in board.lines:
            figures = (shown(column, line.cells.get(column.key)) for column in columns)
            table.add_row(*map(Text, (one_line(name_of(line)), str(line.n), line.verdict, *figures)))
        console.print(Text(board.title))
        console.print(table)
        console.print(Text(caption(board)))
        console.print()


def _cells(board: Board, line: Line) -> list[str]:
    cells = [shown(column, line.cells.get(column.key)) for column in board.columns]
    return [one_line(name_of(line)), str(line.n), line.verdict, *cells]


def leaderboard_html(boards: Sequence[Board]) -> str:
    """The page: a table for each data set, and where each row comes from; no text of any data set."""
    from lightning_ssiuu.reports.pages import page  # matplotlib takes a while

    shown_boards = [
        {
            "title": board.title,
            "caption": caption(board),
            "notes": board.notes,
            "columns": [column.title for column in board.columns],
            "rows": [_row(board, line) for line in board.lines],
        }
        for board in boards
    ]
    return page("leaderboard.html", boards=shown_boards)


def _row(board: Board, line: Line) -> dict[str, Any]:
    named = [column.title for column in board.columns]
    cells = dict(zip(named, _cells(board, line)[3:], strict=True))
    return {
        **{"label": line.label, "n": line.n, "kind": line.kind, "single": line.single, "cells": cells},
        "verdicts": [(verdict, "" if line.n == 1 else n) for verdict, n in line.verdicts.items()],
        "settings": "; ".join(board.settings.get(line.label, {}).values()),
        "models": provenance_of(line),
    }


def csv_rows(boards: Sequence[Board]) -> tuple[list[str], list[list[object]]]:
    """Header and rows of ``leaderboard.csv``: full precision, spreads in columns of their own."""
    header = ["data", "score", "method", "kind", "n", "single", "verdicts"]
    for column in COLUMNS:
        header += [column.key, f"{column.key}_std"] + [f"{column.key}_attack_std"] * column.attacked
    header += ["settings", "runs", "seeds", "weights_sha256", "oracle_sha256", "data_sha256", "commands", "version"]
    return header, [_csv_row(board, line) for board in boards for line in board.lines]


def _csv_row(board: Board, line: Line) -> list[object]:
    row: list[object] = [csv_text(board.title), board.score, csv_text(line.label), line.kind, line.n]
    row += [str(line.single).lower(), csv_text(line.verdict)]
    for column in COLUMNS:
        figure = line.cells.get(column.key)
        row += [figure.mean, figure.std] if figure else [None, None]
        row += [figure.attack_std if figure else None] * column.attacked
    models = provenance_of(line)
    texts = ["; ".join(board.settings.get(line.label, {}).values()) if line.kind == "method" else ""]
    texts += ["; ".join(str(model[key]) for model in models) for key in ("run", "seed", "weights", "oracle", "data")]
    texts += ["; ".join(command for model in models for command in model["commands"])]
    texts += ["; ".join(dict.fromkeys(str(model["versions"].get("lightning-ssiuu")) for model in models))]
    return row + [csv_text(text) for text in texts]


def markdown(boards: Sequence[Board]) -> str:
    """``leaderboard.md``: the tables, and the commands of each row."""
    parts = []
    for board in boards:
        header = ["method", "n", "verdict", *(column.title for column in board.columns)]
        lines = [header, ["---", "---:", "---", *["---:"] * len(board.columns)]]
        lines += [[markdown_text(cell) for cell in _cells(board, line)] for line in board.lines]
        parts += [f"## {markdown_text(board.title)}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
        parts += [markdown_text(note) for note in (caption(board), *board.notes)]
        for line in board.lines:
            if commands := [one_line(command) for model in provenance_of(line) for command in model["commands"]]:
                parts.append(f"**{markdown_text(line.label)}**")
                parts.append("\n".join(["```text", *commands, "```"]))
    return "\n\n".join(parts) + "\n"
