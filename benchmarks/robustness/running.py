"""Run stages one after the other, each in a process of its own, within a time budget."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from .stages import Stage, Store

_GRACE = 60.0  # seconds in which a stage that is ended may end by itself
_MISTAKE = 2  # exit status of a command whose options or data are at fault: trying again changes nothing
_KILL_WITH_PARENT = 1  # prctl(2), PR_SET_PDEATHSIG


class Interrupted(BaseException):
    """This process is to end."""


class Runner:
    """Runs stages until ``deadline`` (by ``time.monotonic``; None: as long as it takes)."""

    def __init__(self, store: Store, deadline: float | None = None) -> None:
        self.store, self.deadline = store, deadline
        self._begun = False

    def left(self) -> float:
        """Seconds of the budget."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def fits(self, stage: Stage) -> bool:
        """Whether there is time for it, by the longest of its kind so far.

        The first one is begun in any case: where the whole budget is too short for it, it goes on from call to call.
        """
        return not self._begun or max(self.store.past_seconds(stage.kind), default=0.0) < self.left()

    def run(self, stage: Stage) -> bool:
        """Run a stage; whether it finished. One that the deadline ends goes on from where it was the next time.

        Raises:
            Interrupted: After SIGTERM, when the stage has ended.
            KeyboardInterrupt: The same after Ctrl-C.
            RuntimeError: The command has a defect, which its log shows.
        """
        self._begun = True
        words, folder = self.store.words(stage), self.store.begin(stage)
        begin, pid = time.monotonic(), _forked(words, folder / "log.txt")
        status, cpu_seconds = self._wait(pid)
        if status == 0:
            self.store.end(stage, cpu_seconds, time.monotonic() - begin)
        elif status == _MISTAKE:
            self.store.end(stage, cpu_seconds, time.monotonic() - begin, failed=_last_line(folder / "log.txt"))
        elif self.left() > 0:
            raise RuntimeError(f"{stage.kind} {stage.name} ended with status {status}: see {folder / 'log.txt'}")
        return status == 0

    def _wait(self, pid: int) -> tuple[int, float]:
        asked, force = False, float("inf")
        handler = signal.signal(signal.SIGTERM, _interrupt)
        try:
            while True:
                done, code, usage = os.wait4(pid, os.WNOHANG)
                if done:
                    return os.waitstatus_to_exitcode(code), usage.ru_utime + usage.ru_stime
                if self.left() <= 0 and not asked:
                    os.kill(pid, signal.SIGTERM)
                    asked, force = True, time.monotonic() + _GRACE
                if time.monotonic() > force:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)
        except BaseException:
            os.kill(pid, signal.SIGKILL)  # it goes on from what it has written, as after a power cut
            os.waitpid(pid, 0)
            raise
        finally:
            signal.signal(signal.SIGTERM, handler)


def _interrupt(*_: object) -> None:
    raise Interrupted


def _forked(words: Sequence[str], log: Path) -> int:
    """Run a command in a fork of this process, which has imported what takes time; the fork dies with it."""
    _import_all()
    parent = os.getpid()
    if pid := os.fork():
        return pid
    status = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)
        if os.getppid() == parent:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            status = _command(words)()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else _MISTAKE
        if not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _import_all() -> None:
    # Imports alone: after arithmetic in this process OpenMP's threads would be missing in a fork.
    for name in ("fit", "attack", "audit"):
        import_module(f"lightning_ssiuu.cli.{name}")
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(import_module("transformers"), name)


def _command(words: Sequence[str]) -> Callable[[], int]:
    if words[0] == "lightning-ssiuu":
        return lambda: import_module("lightning_ssiuu.__main__").main(list(words[1:]))
    _, flag, module, *arguments = words  # python -m MODULE ...
    assert flag == "-m"
    return lambda: import_module(module).main(arguments)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no message")[:500]
