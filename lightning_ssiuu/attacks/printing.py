"""The table that ``attack`` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_attacks(rows: Sequence[Mapping[str, Any]], score: str, console: Console | None = None) -> None:
    """Print rows of ``attack.json`` as a table.

    Args:
        rows: Of one score.
        score: Its name.
        console: Where to.

    Example:
        >>> cell = {"before": {"mean": 5.0, "std": 0.0}, "forget_score": {"mean": 30.0, "std": 1.0}}
        >>> row = {"attack": "harmful", "p": 0.1, "variant": None, "unlearned": {**cell, "inside_grid": True}}
        >>> print_attacks([row], "probability", Console(width=70, color_system=None))  # doctest: +NORMALIZE_WHITESPACE
        Highest forget probability under attack, %
        attack       model      before  highest
        harmful 0.1  unlearned  5.0      30.0 ± 1.0
    """
    console = console or Console()
    swept = any("inside_grid" in row.get("unlearned", {}) for row in rows)
    console.print(f"{'Highest forget' if swept else 'Forget'} {score} under attack, %")
    output = Table(box=None)
    for column in ("attack", "model", "before", "highest" if swept else "after"):
        output.add_column(column)
    for row in rows:
        detail = row["p"] if row["variant"] is None else row["variant"]
        label = row["attack"] if detail is None else f"{row['attack']} {detail}"
        for name in ("unlearned", "oracle"):
            if name in row:
                one = row[name]
                edge = "" if one.get("inside_grid", True) else "  (at the edge of the grid)"
                output.add_row(label, name, f"{one['before']['mean']:.1f}", f"{_shown(one['forget_score'])}{edge}")
                if control := row.get("control") if name == "unlearned" else one.get("control"):
                    output.add_row(label, f"{name}, control", "", _shown(control["forget_score"]))
        if "gap" in row:
            output.add_row(label, "gap", "", _shown(row["gap"]))
    console.print(output)


def _shown(spread: Mapping[str, Any]) -> str:
    return f"{spread['mean']:.1f} ± {spread['std']:.1f}"
