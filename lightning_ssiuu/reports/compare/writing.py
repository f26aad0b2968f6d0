"""The table on the screen, as CSV, Markdown and LaTeX. Names are text in all of them, whatever they contain."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_ssiuu.reports.compare.table import Column, Comparison, Figure, Row
from lightning_ssiuu.utils.errors import one_line
from lightning_ssiuu.utils.terminal import text_console

_WIDEST_NAME = 30
#: What the controls of attacks without training are.
_CONTROLS = {
    "ablation": "as many random neurons",
    "layer_probes": "probes of labels of which half are turned round",
}
_TEX = {
    **{"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{character: f"\\{character}" for character in "&%$#_"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"},
    **{"⁺": "$^{+}$", "⁻": "$^{-}$", "±": r"$\pm$", "−": "$-$"},
}


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|!$~&@])", r"\\\1", one_line(text))


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(_TEX.get(character, character) for character in one_line(text))


def csv_text(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    text = one_line(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def shown(column: Column, figure: Figure | None) -> str:
    """A cell in print."""
    if figure is None:
        return ""
    alone = column.form == "count" and figure.spread is None
    text = format(figure.mean, ".0f" if alone else ".3g" if column.form == "influence" else ".1f")
    text = text.lstrip("-") if float(text) == 0 else text
    if figure.spread is not None:
        text += f" ± {figure.spread:{'.2g' if column.form == 'influence' else '.1f'}}"
    return text + (" (edge)" if figure.edge else "")


def columns_with_figures(comparison: Comparison) -> list[Column]:
    """The columns that were chosen, else those that are not empty."""
    if comparison.chosen is not None:
        return comparison.chosen
    return [column for column in comparison.columns if any(column.key in row.cells for row in comparison.rows)]


def caption(comparison: Comparison) -> str:
    """What the columns mean, in as many sentences as the table needs."""
    keys = {column.key for column in columns_with_figures(comparison)}
    attacked = any(column.attacked for column in comparison.columns)
    taught = {f"{column.key}_control" for column in comparison.columns if column.relearned} & keys
    controls = [key for key in keys - taught if key.endswith("_control")]
    others = [name for name in _CONTROLS if any(key.startswith(f"{name}_") for key in controls)]
    of = "control of {}" if taught or len(others) > 1 else "control"
    edge = any(figure.edge for row in comparison.rows for figure in row.cells.values())
    found = "found at the largest learning rate or in the last epoch"
    sentences = (
        (True, f"Per cent; FS, RS and retain: {comparison.score} on the forget, test and retain set."),
        (
            any(key.startswith("utility_score") for key in keys),
            "US: utility score, mean over the tasks of the suite named.",
        ),
        (attacked and not taught, "Attacks: the highest forget score; gap: minus the oracle's, seed by seed."),
        (taught, "Attacks: the highest forget score; gap: minus the oracle's, else the control's, seed by seed."),
        (attacked, "±: standard deviation over training seeds, of a single run over the attack's seeds."),
        (not attacked, "±: standard deviation over training seeds."),
        (taught, "control: the same attack on facts nobody was taught."),
        *((True, f"{of.format(name.replace('_', ' '))}: {_CONTROLS[name]}.") for name in others),
        (edge, f"(edge): {found}; a stronger attack may find more."),
        ("d_plus_total" in keys, "D⁺, D⁻: influence erased and hidden; spurious: neurons flagged."),
        ("attribution_correlation" in keys, "corr.: of attributions before and after the attack."),
    )
    return " ".join(sentence for applies, sentence in sentences if applies)


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the table, cut into as many as the screen's width asks for; what is empty is left out."""
    console = console or text_console()
    names = [one_line(row.label) for row in comparison.rows]
    name_width = min(max(map(cell_len, ["method", *names])), _WIDEST_NAME)
    for part in _parts(comparison, console.width - name_width - 2 - 3):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
        table.add_column("method", width=name_width, overflow="fold")
        table.add_column("n", justify="right")
        for column in part:
            table.add_column(Text(one_line(column.title)), justify="right", max_width=_width(comparison, column))
        for name, row in zip(names, comparison.rows, strict=True):
            if not any(column.key in row.cells for column in part):
                continue
            n = "" if row.n is None else str(row.n)
            table.add_row(Text(name), n, *(shown(column, row.cells.get(column.key)) for column in part))
        console.print(table)
        console.print()
    console.print(Text(caption(comparison)))


def _parts(comparison: Comparison, room: int) -> list[list[Column]]:
    # Columns cut into tables that fit; what belongs to an attack stays with it.
    units: list[list[Column]] = []
    for column in columns_with_figures(comparison):
        if units and column.attacked and (column.is_gap or column.key.endswith("_control")):
            units[-1].append(column)
        else:
            units.append([column])
    parts: list[list[Column]] = [[]]
    for unit in units:
        if parts[-1] and sum(_width(comparison, column) + 2 for column in [*parts[-1], *unit]) > room:
            parts.append([])
        parts[-1] += unit
    return parts


def _width(comparison: Comparison, column: Column) -> int:
    cells = [shown(column, row.cells.get(column.key)) for row in comparison.rows]
    return max(cell_len(text) for text in [*cells, *one_line(column.title).split()])


def csv_rows(comparison: Comparison) -> tuple[list[str], list[list[object]]]:
    """Header and rows of ``compare.csv``: full precision, spreads in columns of their own, all scores' columns."""
    shown = columns_with_figures(comparison)
    columns = shown if comparison.chosen else [c for c in comparison.columns if not c.attacked or c in shown]
    header = ["method", "n"]
    for column in columns:
        header += [column.key, f"{column.key}_std"]
        header += [f"{column.key}_attack_std"] if column.attacked else []
        header += [f"{column.key}_inside_grid"] if column.relearned else []
    return [csv_text(name) for name in [*header, "score", "settings", "runs"]], [
        [
            csv_text(row.label),
            row.n,
            *_csv_cells(row, columns),
            csv_text(comparison.score),
            _settings(comparison, row),
            _paths(row),
        ]
        for row in comparison.rows
    ]


def _csv_cells(row: Row, columns: Sequence[Column]) -> list[object]:
    cells: list[object] = []
    for column in columns:
        figure = row.cells.get(column.key)
        cells += [figure.mean, figure.std] if figure else [None, None]
        if column.attacked:
            cells.append(figure.attack_std if figure else None)
        if column.relearned:
            cells.append(str(not figure.edge).lower() if figure else None)
    return cells


def _settings(comparison: Comparison, row: Row) -> str:
    return csv_text("; ".join(comparison.settings.get(row.label, {}).values()) if row.kind == "method" else "")


def _paths(row: Row) -> str:
    return csv_text("; ".join(run.path.as_posix() for run in row.runs))


def _texts(comparison: Comparison, text: Callable[[str], str]) -> list[list[str]]:
    columns = columns_with_figures(comparison)
    lines = [["method", "n", *(text(column.title) for column in columns)]]
    for row in comparison.rows:
        cells = [text(shown(column, row.cells.get(column.key))) for column in columns]
        lines.append([text(row.label), "" if row.n is None else str(row.n), *cells])
    return lines


def markdown(comparison: Comparison) -> str:
    """``compare.md``: one table and its caption."""
    header, *rows = _texts(comparison, markdown_text)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = [markdown_text(note) for note in [caption(comparison), *comparison.notes]]
    return "\n\n".join([text, *notes]) + "\n"


def latex(comparison: Comparison) -> str:
    """``compare.tex``: a ``tabular`` for the package booktabs, its caption as a comment."""
    cells = _texts(comparison, latex_text)
    header, *rows = [" & ".join(line) + r" \\" for line in cells]
    if len(rows) > 1 and comparison.rows[-1].kind == "oracle":
        rows.insert(-1, r"\midrule")
    texts = [r"needs \usepackage{booktabs}", caption(comparison), *comparison.notes]
    layout = rf"\begin{{tabular}}{{l{'r' * (len(cells[0]) - 1)}}}"
    comments = [f"% {one_line(text)}" for text in texts]
    return "\n".join([*comments, layout, r"\toprule", header, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", ""])
