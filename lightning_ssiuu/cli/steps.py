"""Commands of this package, each in a process of its own, and how long they take."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from lightning_ssiuu.utils.processes import MISTAKE, STARTED_BY


class CommandRefused(Exception):  # noqa: N818 (as UserError, it says what is wrong)
    """A command ended with a mistake of the user's; the text is its error line, without the program's name."""


class Steps:
    """Runs commands one after the other; their output goes to a file, or to the terminal too where there is one.

    ``seconds`` are the times they took, by kind.
    """

    def __init__(self, folder: Path, seconds: Mapping[str, Sequence[float]] | None = None) -> None:
        self.folder = folder
        self.seconds = {kind: list(times) for kind, times in (seconds or {}).items()}

    def run(self, kind: str, words: Sequence[str]) -> None:
        """Run ``lightning-ssiuu`` with these words; it dies with this process.

        Raises:
            CommandRefused: If the command ends with a mistake.
            RuntimeError: If it has a defect.
        """
        begin, log = time.monotonic(), self.folder / "log.txt"
        with log.open("a", encoding="utf-8") as file:
            command, environment = [sys.executable, "-m", "lightning_ssiuu", *words], os.environ | {STARTED_BY: "erase"}
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            try:
                status = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if status == MISTAKE:
            raise CommandRefused(_last_line(log).partition("error: ")[2])
        if status:
            raise RuntimeError(f"{words[0]} ended with status {status}: see {log}")
        self.seconds.setdefault(kind, []).append(time.monotonic() - begin)

    def left(self, ahead: Mapping[str, float]) -> float | None:
        """Seconds that so many more commands of each kind will take; None where a kind was never seen."""
        if any(count and kind not in self.seconds for kind, count in ahead.items()):
            return None
        return sum(count * mean(self.seconds[kind]) for kind, count in ahead.items() if count)


def minutes(seconds: float | None) -> str:
    """Time left, in words.

    >>> minutes(40.0), minutes(200.0), minutes(9000.0), minutes(None)
    ('about 40 seconds left', 'about 3 minutes left', 'about 2.5 hours left', 'time left is not known yet')
    """
    if seconds is None:
        return "time left is not known yet"
    if seconds < 90:
        return f"about {seconds:.0f} seconds left"
    return f"about {seconds / 60:.0f} minutes left" if seconds < 5400 else f"about {seconds / 3600:.1f} hours left"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if "error: " in line), "error: no message")
