"""Ended by a scheduler, and two at once in one directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from toys.cli import (
    BARE,
    DEFAULT,
    PARTIAL,
    SWEEP,
    at,
    command,
    counted,
    files,
    refused,
    script,
)
from toys.compare import write_run

import lightning_ssiuu.__main__
from lightning_ssiuu.callbacks import RunReport
from lightning_ssiuu.cli import attack as attacks
from lightning_ssiuu.cli import audit, compare, privacy, utility
from lightning_ssiuu.objectives import UnlearningModule
from lightning_ssiuu.training.checkpoints import newest_checkpoint
from lightning_ssiuu.utils import locks

pytestmark = pytest.mark.usefixtures("few_facts")

FIT = ("fit", "--config", DEFAULT, *BARE, "--trainer.default_root_dir", "run")
SCORED = ("--data", "Facts", "--output", "out")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


ENDED: dict[str, tuple[tuple[Any, ...], Callable[[], None]]] = {
    "fit, before the first step": (FIT, at(RunReport, "on_train_start", terminate)),
    "validate": (("validate", *FIT[1:]), at(UnlearningModule, "validation_step", terminate)),
    "test": (("test", *FIT[1:]), at(UnlearningModule, "test_step", terminate)),
    "audit": (("audit", "--original", "tiny", "--unlearned", "tiny", *SCORED), at(audit, "measure", terminate)),
    "utility": (("utility", "--model", "tiny", *SCORED), at(utility, "score_tasks", terminate)),
    "privacy": (("privacy", "--model", "tiny", *SCORED), at(privacy, "measure", terminate)),
    "compare": (("compare", "a", "--output", "out"), at(compare, "compare_runs", terminate)),
}


@pytest.mark.parametrize("name", ENDED)
def test_sigterm_ends_a_command_with_143(name: str, tmp_path: Path) -> None:
    arguments, prepare = ENDED[name]
    if name == "compare":
        write_run(tmp_path / "a")
    before = files(tmp_path)
    result = script(tmp_path, *arguments, first=prepare)
    assert result.status == 143, result.err
    assert result.err.splitlines()[-1] == "lightning-ssiuu: ended by SIGTERM"
    assert "Traceback" not in result.err
    assert files(tmp_path) == before


def test_a_reader_that_has_ended_is_no_defect() -> None:
    """As ``recipes | head`` has it; without a traceback, and with the status of a program that SIGPIPE ends."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "lightning_ssiuu", "recipes"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_sigterm_while_libraries_are_imported(tmp_path: Path) -> None:
    def prepare() -> None:
        def late(_: str) -> None:
            terminate()

        lightning_ssiuu.__main__.import_module = late  # type: ignore[attr-defined, assignment]

    assert script(tmp_path, *FIT, first=prepare).status == 143


def test_sigterm_that_an_import_swallows(tmp_path: Path) -> None:
    def prepare() -> None:
        load = lightning_ssiuu.__main__.import_module  # type: ignore[attr-defined]

        def swallowing(name: str) -> Any:
            with suppress(BaseException):
                terminate()
            return load(name)

        lightning_ssiuu.__main__.import_module = swallowing  # type: ignore[attr-defined, assignment]

    assert script(tmp_path, *FIT, first=prepare).status == 143
    assert not files(tmp_path)


def test_sigterm_that_something_swallows_ends_all_the_same(tmp_path: Path) -> None:
    def prepare() -> None:
        from lightning_ssiuu.utils import termination

        termination._GRACE = 0.2

        def deaf(*_: Any) -> None:
            try:
                terminate()
            except SystemExit:
                time.sleep(60)

        RunReport.on_train_start = deaf  # type: ignore[method-assign]

    assert script(tmp_path, *FIT, first=prepare).status == 143


def test_a_run_ended_by_sigterm_goes_on(tmp_path: Path) -> None:
    kept = (*FIT, "--checkpoints.every_n_steps", "1", "--trainer.max_steps", "3")
    result = script(tmp_path, *kept, first=at(UnlearningModule, "training_step", terminate, 3))
    assert result.status == 143, result.err
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "step=2.ckpt"
    assert list((tmp_path / "run" / "lightning_logs" / "version_0").iterdir())
    with counted(UnlearningModule, "training_step") as steps:
        result = command(*kept[:-4], *kept[-4:], "--ckpt_path", "last", "--trainer.default_root_dir", tmp_path / "run")
    assert result.status == 0, result.err
    assert len(steps) == 1


def test_a_sweep_ended_by_sigterm_goes_on(tmp_path: Path) -> None:
    result = script(tmp_path, *SWEEP, first=at(attacks.FinishedAttacks, "add", terminate, 2))
    assert result.status == 143, result.err
    assert files(tmp_path) == {f"out/{PARTIAL}"}
    result = script(tmp_path, *SWEEP, first=at(attacks.FinishedAttacks, "add", lambda: sys.exit(9), 2))
    assert result.status == 0, result.err  # one was left to do
    assert files(tmp_path) == {"out/attack.json"}


@contextmanager
def at_work(folder: Path, *args: str | Path, where: Any, name: str) -> Iterator[int]:
    """A command in a process of its own that has come as far as a function, and waits there; it is killed at last."""
    reached = folder / "reached"

    def wait() -> None:
        if os.fork() == 0:  # as a dataloader's worker, it outlives its parent a little
            time.sleep(4)
            os._exit(0)
        reached.touch()
        time.sleep(60)

    if (pid := os.fork()) == 0:
        try:
            print(script(folder, *args, first=at(where, name, partial(_tell_parent, wait))).err)
        finally:
            os._exit(0)
    while not reached.exists():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the command ended before it came that far"
        time.sleep(0.02)
    inner = int((folder / "pid").read_text())
    try:
        yield inner
    finally:
        os.kill(inner, signal.SIGKILL)
        os.waitpid(pid, 0)
        reached.unlink()


def _tell_parent(wait: Callable[[], None]) -> None:
    Path("pid").write_text(str(os.getpid()))
    wait()


def test_two_runs_in_one_directory(tmp_path: Path) -> None:
    beside = ("--output", tmp_path / "run")
    with at_work(tmp_path, *FIT, where=RunReport, name="on_train_start"):
        there = files(tmp_path / "run")
        where = ("--trainer.default_root_dir", tmp_path / "run")
        refused(command(*FIT, *where, "--overwrite"), "trainer.default_root_dir", "no other command is at work")
        refused(command(*SWEEP, *beside), "output", "no other command is at work")
        assert files(tmp_path / "run") == there
        with locks.only_here("output", tmp_path / "other"):
            pass  # what works elsewhere
    result = command(*FIT, *where)  # the first was killed; a process it forked still lives
    assert result.status == 0, result.err


@pytest.mark.parametrize(
    ("arguments", "where", "name"),
    [
        (SWEEP, attacks.FinishedAttacks, "add"),
        (("audit", "--original", "tiny", "--unlearned", "tiny", *SCORED), audit, "measure"),
        (("utility", "--model", "tiny", *SCORED), utility, "score_tasks"),
        (("privacy", "--model", "tiny", *SCORED), privacy, "measure"),
    ],
    ids=["attack", "audit", "utility", "privacy"],
)
def test_two_commands_with_one_output(arguments: tuple[Any, ...], where: Any, name: str, tmp_path: Path) -> None:
    with at_work(tmp_path, *arguments, where=where, name=name):
        result = command("utility", "--model", "tiny", "--output", tmp_path / "out")
        refused(result, "output", "a directory in which no other command is at work")
    with locks.only_here("output", tmp_path / "out"):
        pass


def test_a_lock_makes_and_removes_its_directory(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    with locks.only_here("output", deep):
        assert deep.is_dir()
    assert list(tmp_path.iterdir()) == []
    with locks.only_here("output", deep):
        (deep / "result").touch()
    assert (deep / "result").exists()
