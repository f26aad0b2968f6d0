"""Commands in processes of their own: their mistakes are told, and none outlives the one that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_ssiuu.cli.steps import CommandRefused, Steps


def test_a_mistake_is_the_line_that_the_command_prints(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    with pytest.raises(CommandRefused, match=r"^COMMAND: got 'nothing'"):
        steps.run("nothing", ["nothing"])
    assert steps.left({"nothing": 1}) is None
    steps.run("version", ["--version"])
    assert (tmp_path / "log.txt").read_text().splitlines()[-1].startswith("0.1.0")
    assert steps.left({"version": 2, "nothing": 0}) == 2 * steps.seconds["version"][0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_command_ends_when_the_one_that_started_it_was_killed(tmp_path: Path) -> None:
    words = ["fit", "--config", "ssiuu", "--stopping.threshold", "null", "--trainer.max_epochs", "10000"]
    words += ["--trainer.default_root_dir", str(tmp_path / "run")]
    code = "import sys; from pathlib import Path; from lightning_ssiuu.cli.steps import Steps; "
    code += "Steps(Path(sys.argv[1])).run('fit', sys.argv[2:])"
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *words])
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "config.yaml").exists():  # it trains
            assert time.monotonic() < deadline
            assert parent.poll() is None
            time.sleep(0.2)
        (child,) = children(parent.pid)
        parent.kill()
        parent.wait()
        while is_alive(child):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        parent.kill()
        parent.wait()


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(entry.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIG_DFL)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
