"""Distributed runs of forked processes: Lightning's launcher starts the ranks, but none imports anything anew."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies.launchers import subprocess_script

Command = Callable[[], int]


@dataclass
class End:
    """How a run ended."""

    status: int  # minus the signal's number, if one ended it
    err: str
    seconds: float
    left: list[int]  # processes that are still there


class _Forked(subprocess.Popen):  # type: ignore[type-arg]
    """Stands for the Popen of Lightning's launcher."""

    def __init__(self, command: Command, pids: Path, env: dict[str, str]) -> None:
        self.args, self.returncode, self._child_created = "rank", None, True
        self.stdin = self.stdout = self.stderr = None
        self._waitpid_lock = threading.Lock()
        self.pid = _forked(command, pids, env)


def _forked(command: Command, pids: Path, env: dict[str, str]) -> int:
    if (pid := os.fork()) != 0:
        return pid
    status = 1
    try:
        with pids.open("a") as file:
            file.write(f"{os.getpid()}\n")
        os.environ.clear()
        os.environ.update(env)
        status = command()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ranks(command: Command, folder: Path, timeout: float) -> End:
    """Run ``command`` in a process whose launcher has every other rank run it too; all of them write to one stderr.

    Args:
        command: Gives the exit status; what it raises counts as 1, traceback shown, as in a program.
        folder: For what they write.
        timeout: Seconds until everything is ended by force and the test fails.
    """
    folder.mkdir(exist_ok=True)
    pids, err = folder / "pids", folder / "err"

    def first() -> int:
        descriptor = os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # not the one that pytest captures
        replaced: Any = type("subprocess", (), {"Popen": lambda _, env, cwd: _Forked(command, pids, env)})
        from lightning.fabric.strategies.launchers import subprocess_script as fabric

        subprocess_script.subprocess = fabric.subprocess = replaced
        return command()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    unset = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR")
    begin = time.monotonic()
    pid = _forked(first, pids, {k: v for k, v in os.environ.items() if k not in unset} | {"MASTER_PORT": port})
    status = None
    while status is None and time.monotonic() - begin < timeout:
        done, code = os.waitpid(pid, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else None
        time.sleep(0.02)
    seconds = time.monotonic() - begin
    left = [one for one in map(int, pids.read_text().split()) if _lives(one)]
    for _ in range(50):  # the kernel takes a moment to end what was killed
        left = [one for one in left if _lives(one)]
        if not left:
            break
        time.sleep(0.05)
    for one in left:
        os.kill(one, signal.SIGKILL)
    assert status is not None, f"hangs after {timeout} s:\n{err.read_text()}"
    return End(status, err.read_text(), seconds, left)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
