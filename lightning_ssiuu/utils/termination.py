"""SIGTERM, with which schedulers end a job: told by the exit status, and gone through like any other exception.

Imports nothing heavy: it acts from a command's first moment on.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED = 128 + signal.SIGTERM  # the exit status: what a shell reports for it
# Seconds in which what the exception passes must be done: an exception can be swallowed, and a rank may wait for one
# that is gone. Most schedulers kill after 30.
_GRACE = 25.0


@contextmanager
def ending_on_sigterm() -> Iterator[threading.Event]:
    """Inside, SIGTERM is a ``SystemExit`` with status :data:`TERMINATED` in the main thread, once.

    Yields an event that is set when the signal has come. A program with a handler of its own, or one that ignores the
    signal, keeps to that.
    """
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield received
        return
    over = threading.Event()

    def watch() -> None:
        if not over.wait(_GRACE):
            os._exit(TERMINATED)

    def end(*_: Any) -> None:
        if received.is_set():
            return  # it is on its way, and must not be disturbed
        received.set()
        threading.Thread(target=watch, name="end-on-sigterm", daemon=True).start()
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, end)
    try:
        yield received
    finally:
        over.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def keep_sigterm(trainer: Any) -> None:
    """Have a Trainer that has not started leave SIGTERM to :func:`ending_on_sigterm`, inside which it runs.

    Lightning's own handler ends the training with status 0, and only between two batches; on several ranks it begins a
    collective amid another one, which can wait for ever.
    """
    connector = trainer._signal_connector
    register = connector.register_signal_handlers

    def register_the_others() -> None:
        ours = signal.getsignal(signal.SIGTERM)
        register()
        if getattr(ours, "__module__", None) == __name__:
            signal.signal(signal.SIGTERM, ours)

    connector.register_signal_handlers = register_the_others
