"""How runs that differ are named."""

from __future__ import annotations

from pathlib import Path

from toys.compare import write_run

from lightning_ssiuu.reports.compare.grouping import differences, group_by_seed, labels
from lightning_ssiuu.reports.compare.reading import read_runs


def test_long_differences_give_way_to_directories(tmp_path: Path) -> None:
    a, b = (dict.fromkeys("abcd", f"{value}" * 12) for value in (1, 2))
    paths = [write_run(tmp_path / "narrow", options=a), write_run(tmp_path / "wide", options=b)]
    assert labels(group_by_seed(read_runs(paths)[0])) == ["SSIUU (narrow)", "SSIUU (wide)"]


def test_a_class_differs_by_its_name_or_by_its_options() -> None:
    plain = {"model": {"class_path": "NPO", "init_args": {"beta": 0.1, "regularizer": None}}}
    other = {"model": {"class_path": "NPO", "init_args": {"beta": 0.5, "regularizer": {"class_path": "a.L2"}}}}
    assert differences([plain, other]) == [{"beta": "beta=0.1"}, {"beta": "beta=0.5", "regularizer": "L2"}]
