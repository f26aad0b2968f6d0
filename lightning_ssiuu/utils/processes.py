"""The processes of a run end together: none waits for one that died, and what the dead one said is what is seen.

For runs whose processes Lightning started from one command. Under torchrun or a cluster's scheduler that is their task.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import lightning as L

from lightning_ssiuu.utils.messages import user_error
from lightning_ssiuu.utils.termination import keep_sigterm

MISTAKE = 2  # exit status of a command whose user made a mistake
# Seconds: until a process that lost one of the others is ended; until one that failed takes itself for the first.
_NOTICING, _DYING = 5.0, 3.0


#: In the environment of a command that another one started and waits for.
STARTED_BY = "LIGHTNING_SSIUU_STARTED_BY"


def end_with_parent() -> None:
    """In a process that a launcher or another command started: end when that has ended, however that came about."""
    # A rank that waits for others would wait until the process group's timeout, on devices that the next run needs.
    if os.environ.get("LOCAL_RANK", "0") == "0" and STARTED_BY not in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


class EndTogether(L.Callback):
    """In the process that started the others: ends it, and them, when one of them dies, with that one's exit status.

    Takes the place of Lightning's observer, which kills this process outright, status and message included.
    """

    def __init__(self) -> None:
        self._others: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()

    @classmethod
    @contextmanager
    def around(cls, trainer: L.Trainer) -> Iterator[None]:
        """Inside, a run of ``trainer`` ends with all its processes."""
        keep_sigterm(trainer)
        watch = cls()
        trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        try:
            with watch.ending():
                yield
        finally:
            trainer.callbacks.remove(watch)  # type: ignore[attr-defined]

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Inside, what ends this process ends the others (those taken over until then) too."""
        try:
            yield
        except BaseException as error:
            self._over.set()
            if self._end(error):
                raise SystemExit(MISTAKE) from None
            raise
        finally:
            self._over.set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.take_over(trainer.strategy.launcher)

    def take_over(self, launcher: Any) -> None:
        """Watch the processes a launcher has started, if it has, in place of Lightning's observer."""
        processes = getattr(launcher, "procs", None)
        if not processes or not isinstance(processes[0], subprocess.Popen) or self._others:
            return
        self._others = list(processes)
        launcher.procs = self._others  # Lightning ends these on Ctrl-C
        processes.clear()  # its observer looks at this list, and has nothing to do with an empty one
        threading.Thread(target=self._watch, name="end-together", daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            if any(process.poll() for process in self._others):
                # Usually this process's next communication fails at once, and it ends by itself.
                if not self._over.wait(_NOTICING):
                    status = _status(self._others) or 1
                    if status != MISTAKE:
                        print(f"lightning-ssiuu: error: {_deaths(self._others)}", file=sys.stderr, flush=True)
                    _kill(self._others)
                    os._exit(status)
                return

    def _end(self, error: BaseException) -> bool:
        # Ends the others after this process failed; whether one of them has told the user's mistake already.
        if not isinstance(error, (KeyboardInterrupt, SystemExit)) and user_error(error) is None:
            # Was it the first to fail, or did another one's death make it?
            last = time.monotonic() + _DYING
            while self._others and time.monotonic() < last and all(p.poll() is None for p in self._others):
                time.sleep(0.05)
        mistake = _status(self._others) == MISTAKE
        if deaths := _deaths(self._others):
            error.add_note(f"{deaths}; what it said stands above")
        _kill(self._others)
        return mistake


def _status(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    # The highest of those that ended by themselves; 0 if there is none.
    return max((p.returncode for p in processes if p.poll() and p.returncode > 0), default=0)


def _deaths(processes: Sequence[subprocess.Popen[bytes]]) -> str:
    def end(status: int) -> str:
        return f"was killed ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"

    ends = [(rank, process.poll()) for rank, process in enumerate(processes, start=1)]
    return ", ".join(f"rank {rank} {end(status)}" for rank, status in ends if status)


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with suppress(OSError):
            process.kill()
        process.wait()
