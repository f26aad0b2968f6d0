"""What a run directory holds: names, links, files of others, results where the disk refuses, and logs."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from toys.cli import (
    BARE,
    DEFAULT,
    PARTIAL,
    SWEEP,
    at,
    attacking,
    command,
    counted,
    csv_logger,
    default_run,
    files,
    fit,
    read_json,
    refused,
    script,
)
from toys.compare import write_run

from lightning_ssiuu.attacks.records import FinishedAttacks
from lightning_ssiuu.callbacks import KeepCheckpoints, RunReport, SavePretrained
from lightning_ssiuu.cli import attack as attacks
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import nothing_left

pytestmark = pytest.mark.usefixtures("few_facts")

FIT = ("fit", "--config", DEFAULT, *BARE, "--trainer.default_root_dir", "run")


@pytest.mark.parametrize("name", [".", "..", "../..", "a/b", "/tmp/x", "", "a\\b", ".git", "a\nb", "x" * 300])
def test_names_that_are_no_plain_ones(name: str) -> None:
    for make in (SavePretrained, partial(KeepCheckpoints, None)):
        with pytest.raises(UserError, match=r"folder: got .* allowed: one plain name"):
            make(name)


@pytest.mark.parametrize(("argument", "name"), [("saving.folder", "."), ("checkpoints.folder", "../..")])
def test_nothing_outside_a_run_is_touched(argument: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refused(fit(tmp_path / "run", *BARE, f"--{argument}={name}", "--overwrite"), argument, "one plain name")
    assert files(tmp_path) == {"run/notes.txt"}


@pytest.mark.parametrize(
    "options",
    [
        {"saving.folder": "metrics.json"},
        {"saving.folder": "kept", "checkpoints.folder": "kept"},
        {"saving.folder": "my", "trainer.logger": "CSVLogger", "trainer.logger.save_dir": "{run}"}
        | {"trainer.logger.name": "my"},
    ],
)
def test_names_that_something_else_has(options: dict[str, str], tmp_path: Path) -> None:
    given = [f"--{name}={value.format(run=tmp_path / 'run')}" for name, value in options.items()]
    argument = next(iter(options))
    refused(fit(tmp_path / "run", *BARE, *given), argument, "a name that nothing else")
    assert not (tmp_path / "run").exists()


def test_no_model_is_replaced_by_what_became_of_it(tmp_path: Path) -> None:
    for name in ("model", "attacked_harmful"):
        shutil.copytree(default_run()[0] / "model", tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    from_there = ("--model.init_args.checkpoint", tmp_path / "model", "--overwrite")
    refused(fit(tmp_path, *BARE, *from_there), "saving.folder", "not the checkpoint this run begins from")
    given = ("--model", tmp_path / "attacked_harmful", "--output", tmp_path, "--save_attacked", "--overwrite")
    refused(command(*SWEEP, *given), "save_attacked", "attacked_harmful there is under attack itself")
    assert before == {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}


@pytest.mark.parametrize("name", ["metrics.json", "Plots", "lightning_logs", "attacked_harmful", PARTIAL])
def test_names_of_results(name: str) -> None:
    for make in (SavePretrained, partial(KeepCheckpoints, None)):
        with pytest.raises(UserError, match="a name that nothing else"):
            make(name)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fit", {"limit_train_batches": "0"}, "trainer.limit_train_batches: got 0"),
        ("fit", {"limit_train_batches": "0.01"}, "trainer.limit_train_batches: got 0.01, allowed: at least 0.33"),
        ("fit", {"overfit_batches": "0.01"}, "trainer.overfit_batches: got 0.01, allowed: at least 0.33"),
        ("fit", {"limit_val_batches": "0.001"}, "trainer.limit_val_batches: got 0.001, allowed: at least 1"),
        ("fit", {"fast_dev_run": "true"}, "trainer.fast_dev_run: got True, allowed: false"),
        ("validate", {"limit_val_batches": "0"}, "trainer.limit_val_batches: got 0"),
        ("test", {"limit_test_batches": "0"}, "trainer.limit_test_batches: got 0"),
    ],
)
def test_nothing_to_do_is_no_success(name: str, options: dict[str, str], said: str, tmp_path: Path) -> None:
    given = [f"--trainer.{option}={value}" for option, value in options.items()]
    result = command(name, *FIT[1:], "--trainer.default_root_dir", tmp_path / "run", *given)
    refused(result, said.partition(":")[0], said)
    assert not (tmp_path / "run").exists()


FOREIGN = ("[]", "null", "3", '{"attacks": 1}', "{", '"' + "x" * 9, '{"attacks": [1], "curves": [], "outcomes": []}')


@pytest.mark.parametrize("content", [*FOREIGN, '{"attacks": [], "curves": [{}], "outcomes": [], "settings": {}}'])
def test_a_foreign_report_is_found_before_the_attack(content: str, tmp_path: Path) -> None:
    (tmp_path / "attack.json").write_text(content)
    for arguments in (SWEEP, (*SWEEP, "--overwrite")):
        with counted(FinishedAttacks, "add") as added:
            refused(command(*arguments, "--output", tmp_path), "output", "attack.json is of this version")
        assert not added
    assert (tmp_path / "attack.json").read_text() == content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("metrics.json", content) for content in (*FOREIGN, '{"score": 3}', '{"objective": "A", "score": null}')),
        *(("config.yaml", content) for content in ("[]", "a: [", "3", "data: 3", "data: {class_path: no.where}")),
        ("config.yaml", "model: {init_args: {architecture: 3}}"),
    ],
)
def test_a_damaged_run_is_found_before_the_attack(name: str, content: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(default_run()[0] / "model")
    for file in ("metrics.json", "config.yaml"):
        (run / file).write_text((default_run()[0] / file).read_text())
    (run / name).write_text(content)
    few = attacking(seeds=[0], epochs=1, learning_rates=[1e-4], p=[0.3])
    with counted(FinishedAttacks, "add") as added:
        result = command("attack", "--model", run / "model", "--output", tmp_path / "out", *few)
    refused(result, "data" if content.startswith("data:") else "model", str(run))
    assert not added
    assert files(tmp_path / "out") == set()


@pytest.mark.parametrize("content", [b"my notes", b"my\nnotes\n", b"{}\n", b"[]\n", b"\xff\n", b'{"fingerprint": 3}\n'])
def test_a_foreign_file_in_the_place_of_a_sweeps_is_kept(content: bytes, tmp_path: Path) -> None:
    (tmp_path / PARTIAL).write_bytes(content)
    for arguments in (SWEEP, (*SWEEP, "--overwrite")):
        refused(command(*arguments, "--output", tmp_path), "output", PARTIAL)
    assert (tmp_path / PARTIAL).read_bytes() == content


@pytest.mark.parametrize(
    ("content", "finished"),
    [
        (b"", {}),
        (b'{"finger', {}),
        (b'{"fingerprint": "ab', {}),
        (b'{"fingerprint": "abc"}\n{"model": "unl', {}),
        (b'{"fingerprint": "abd"}\n', None),
        (b'{"fingerprint": "abc"}\n{"model": 3}\n', None),
        (b'{"fingerprint": "abc"}\n[]\n', None),
    ],
)
def test_what_a_killed_sweep_leaves(content: bytes, finished: Any, tmp_path: Path) -> None:
    (tmp_path / PARTIAL).write_bytes(content)
    assert FinishedAttacks(tmp_path / PARTIAL, "abc").read() == finished


def test_a_sweep_whose_directory_vanishes(tmp_path: Path) -> None:
    def vanish() -> None:
        (tmp_path / "out" / PARTIAL).unlink()
        (tmp_path / "out").rmdir()

    result = script(tmp_path, *SWEEP, first=at(FinishedAttacks, "add", vanish))
    assert result.status == 0, result.err
    assert len(read_json(tmp_path / "out" / "attack.json")["curves"]) == 2


def test_what_was_found_is_shown_and_kept_where_the_disk_refuses(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    result = script(tmp_path, *SWEEP, first=at(attacks, "merge_attacks", full))
    refused(result, "output directory", "No space left on device")
    assert "unlearned" in result.out
    assert files(tmp_path) == {f"out/{PARTIAL}"}
    result = script(tmp_path, *SWEEP, first=at(FinishedAttacks, "add", lambda: sys.exit(9)))
    assert result.status == 0, result.err  # nothing was left to do


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (FIT, ("model", "plots", "lightning_logs")),
        (SWEEP, ("attack.json", PARTIAL, "attacked_harmful")),
        (("audit", "--original", "tiny", "--unlearned", "tiny", "--output", "."), ("plots", "report.html")),
        (("utility", "--model", "tiny", "--output", "."), ("utility.json",)),
        (("compare", "a", "--output", "."), ("plots", "compare.md")),
    ],
    ids=["fit", "attack", "audit", "utility", "compare"],
)
def test_nothing_is_written_through_a_link(
    arguments: tuple[Any, ...], names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "compare":
        write_run(tmp_path / "a")
    argument = "trainer.default_root_dir" if arguments[0] == "fit" else "output"
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).symlink_to(tmp_path / "elsewhere")
        more = ("--overwrite",) if number else ()
        result = command(*arguments, f"--{argument}", folder, *more)
        refused(result, argument, f"a directory in which {name} is no symbolic link")
        assert not (tmp_path / "elsewhere").exists()
        assert files(folder) == set()


def test_the_run_directory_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "large disk")
    assert fit(tmp_path / "run", *BARE).status == 0
    assert (tmp_path / "large disk" / "metrics.json").exists()


def test_a_refused_run_leaves_no_log_and_what_was_there(tmp_path: Path) -> None:
    root = tmp_path / "run"
    old = root / "lightning_logs" / "version_0" / "metrics.csv"
    old.parent.mkdir(parents=True)
    old.write_text("of an earlier run")
    (root / "notes.txt").write_text("mine")
    met = ("--stopping.score", "probability", "--stopping.threshold", "99")
    with counted(CSVLogger, "save") as written:
        refused(fit(root, *BARE, *met, *csv_logger(root)), "stopping.threshold")
    assert written
    assert files(root) == {"lightning_logs/version_0/metrics.csv", "notes.txt"}
    assert [path.name for path in (root / "lightning_logs").iterdir()] == ["version_0"]


def test_a_run_that_is_refused_after_it_began_keeps_its_log(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    logger = csv_logger(Path("run"))
    result = script(tmp_path, *FIT, *logger, first=at(RunReport, "on_train_end", full))
    assert result.status == 2, result.err
    assert "run/lightning_logs/version_0/metrics.csv" in files(tmp_path)
    assert "run/config.yaml" in files(tmp_path)


def test_what_was_not_there_before_is_removed(tmp_path: Path) -> None:
    def run(begun: bool) -> None:
        logs = [tmp_path / "run" / "logs" / "v0", tmp_path / "elsewhere" / "v1"]
        with nothing_left(tmp_path / "run", logs, lambda: begun):
            for name in ("run/logs/v0/events", "run/logs/v0/old", "elsewhere/v1/events", "run/others"):
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).touch()
            (tmp_path / "run" / "empty" / "inside").mkdir(parents=True, exist_ok=True)
            sys.exit(1)

    (tmp_path / "run" / "logs" / "v0").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "v0" / "old").touch()
    with pytest.raises(SystemExit):
        run(begun=False)
    assert files(tmp_path) == {"run/logs/v0/old", "run/others"}
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "run" / "empty").exists()
    with pytest.raises(SystemExit):
        run(begun=True)
    assert files(tmp_path) == {"run/logs/v0/old", "run/others", "run/logs/v0/events", "elsewhere/v1/events"}
