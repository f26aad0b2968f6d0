"""How runs that differ are named."""

from __future__ import annotations

from pathlib import Path

from toys.compare import write_run

from lightning_ssiuu.reports.compare.grouping import differences, group_by_seed, labels, settings_of_each
from lightning_ssiuu.reports.compare.reading import read_runs


def test_of_many_differences_the_first_are_in_the_name_and_all_in_the_settings(tmp_path: Path) -> None:
    a, b = (dict.fromkeys("abcd", f"{value}" * 12) for value in (1, 2))
    paths = [write_run(tmp_path / "narrow", options=a), write_run(tmp_path / "wide", options=b)]
    groups = group_by_seed(read_runs(paths)[0])
    assert labels(groups) == ["SSIUU, a=111111111111, b=111111111111, …", "SSIUU, a=222222222222, b=222222222222, …"]
    assert [list(given) for given in settings_of_each(groups)] == [list("abcd")] * 2


def test_directories_tell_apart_what_no_short_setting_does(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, prompt=name * 30) for name in ("narrow", "wide")]
    assert labels(group_by_seed(read_runs(paths)[0])) == ["SSIUU, … (narrow)", "SSIUU, … (wide)"]


def test_objectives_that_differ_in_their_options_and_in_the_rest(tmp_path: Path) -> None:
    ours = write_run(tmp_path / "a", weight=0.1, lr=1e-3)
    groups = group_by_seed(read_runs([ours, write_run(tmp_path / "b", objective="NPO", beta=0.5, lr=1e-4)])[0])
    assert labels(groups) == ["SSIUU", "NPO"]
    assert [list(given.values()) for given in settings_of_each(groups)] == [
        ["lr=0.001", "weight=0.1"],
        ["lr=0.0001", "beta=0.5"],
    ]


def test_runs_without_a_configuration_are_rows_of_their_own(tmp_path: Path) -> None:
    """As a Trainer in Python leaves them: nobody knows whether they differ in more than the seed."""
    paths = [write_run(tmp_path / name) for name in ("wide", "narrow", "fitted")]
    for path in paths[:2]:
        (path / "config.yaml").unlink()
    groups = group_by_seed(read_runs(paths)[0])
    assert labels(groups) == ["SSIUU (wide)", "SSIUU (narrow)", "SSIUU (fitted)"]
    assert settings_of_each(groups) == [{}, {}, {}]
    assert [run.rendered for (run,) in groups] == [True, True, False]


def test_a_class_differs_by_its_name_or_by_its_options() -> None:
    plain = {"model": {"class_path": "NPO", "init_args": {"beta": 0.1, "regularizer": None}}}
    other = {"model": {"class_path": "NPO", "init_args": {"beta": 0.5, "regularizer": {"class_path": "a.L2"}}}}
    assert differences([plain, other]) == [{"beta": "beta=0.1"}, {"beta": "beta=0.5", "regularizer": "L2"}]
