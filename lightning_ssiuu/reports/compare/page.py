"""``compare.html``: a comparison on one page that needs nothing else."""

from __future__ import annotations

from lightning_ssiuu.reports.compare.plots import attack_scores, pareto_figure, recovery_lines
from lightning_ssiuu.reports.compare.table import Comparison
from lightning_ssiuu.reports.compare.writing import caption, columns_with_figures, shown
from lightning_ssiuu.reports.pages import attack_title, page
from lightning_ssiuu.utils import figures
from lightning_ssiuu.utils.svg import svg


def comparison_html(comparison: Comparison) -> str:
    """The page: the table, what differs between the methods, and the plots; no text of any data set."""
    columns = columns_with_figures(comparison)
    rows = [
        {"label": row.label, "n": row.n, "kind": row.kind}
        | {"cells": [shown(column, row.cells.get(column.key)) for column in columns]}
        for row in comparison.rows
    ]
    score = attack_scores(comparison).replace("_", " ")
    recovery = [
        {"title": title, "picture": svg(figures.line_chart(lines, "epoch of the attack", f"forget {score}, %"), title)}
        for (attack, p), lines in recovery_lines(comparison).items()
        for title in [attack_title(attack, p)]
    ]
    front = pareto_figure(comparison)
    return page(
        "compare.html",
        score=comparison.score,
        columns=[column.title for column in columns],
        rows=rows,
        caption=caption(comparison),
        notes=comparison.notes,
        settings={label: "; ".join(given.values()) for label, given in comparison.settings.items() if given},
        paths={row.label: [run.path.as_posix() for run in row.runs] for row in comparison.rows if row.runs},
        recovery=recovery,
        front=None if front is None else svg(front, "Retention against recovery of each method"),
    )
