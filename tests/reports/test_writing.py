"""The texts that a comparison is written as."""

from __future__ import annotations

from pathlib import Path

from toys.compare import write_run

from lightning_ssiuu.reports.compare.reading import read_run
from lightning_ssiuu.reports.compare.table import compare_runs
from lightning_ssiuu.reports.compare.writing import latex, markdown


def test_markdown_and_latex_of_a_small_table(tmp_path: Path) -> None:
    comparison = compare_runs([read_run(write_run(tmp_path / "run", utility=50.0))], "probability")
    assert markdown(comparison).splitlines()[:4] == [
        "| method | n | steps | FS | RS | retain | US (embedded) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| original |  |  | 90.0 | 91.0 | 92.0 |  |",
        "| SSIUU | 1 | 20 | 10.0 | 70.0 | 95.0 | 50.0 |",
    ]
    assert latex(comparison).splitlines()[2:] == [
        r"\begin{tabular}{lrrrrrr}",
        r"\toprule",
        r"method & n & steps & FS & RS & retain & US (embedded) \\",
        r"\midrule",
        r"original &  &  & 90.0 & 91.0 & 92.0 &  \\",
        r"SSIUU & 1 & 20 & 10.0 & 70.0 & 95.0 & 50.0 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
