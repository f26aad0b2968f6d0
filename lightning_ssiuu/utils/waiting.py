"""What libraries log and warn waits until it is known that the user made no mistake, whose line then stands alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


class _Waiting:
    def __init__(self) -> None:
        self.over = False
        self._calls: list[Callable[[], object]] = []

    def later(self, call: Callable[[], object]) -> None:
        self._calls.append(call)

    def end(self, show: bool) -> None:
        self.over = True
        calls, self._calls = self._calls, []
        for call in calls if show else ():
            call()


_running: list[_Waiting] = []


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, records of loggers that print, and warnings, wait: shown at the end, or dropped after a UserError."""
    from lightning_ssiuu.utils.messages import user_error

    waiting = _Waiting()
    with ExitStack() as at_the_end:
        _hold_records(waiting, at_the_end)
        _hold_warnings(waiting, at_the_end)
        _running.append(waiting)
        at_the_end.callback(_running.remove, waiting)
        try:
            yield
        except BaseException as error:
            mistake = user_error(error) is not None
            at_the_end.close()
            waiting.end(show=not mistake)
            raise
    waiting.end(show=True)


def release() -> None:
    """Show what waits, and let everything that follows pass: what could be refused has been checked."""
    for waiting in reversed(_running):
        waiting.end(show=True)


def _hold_records(waiting: _Waiting, at_the_end: ExitStack) -> None:
    loggers = [logging.root, *(logger for logger in logging.root.manager.loggerDict.values())]
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", ())} | {logging.lastResort}
    for handler in handlers:
        # Those alone that print: not files, and not what a test or a program reads.
        if handler is not None and type(handler) in (logging.StreamHandler, type(logging.lastResort)):

            def hold(record: logging.LogRecord, handler: logging.Handler = handler) -> bool:
                if not waiting.over:
                    waiting.later(lambda: handler.handle(record))
                return waiting.over

            handler.addFilter(hold)
            at_the_end.callback(handler.removeFilter, hold)


def _hold_warnings(waiting: _Waiting, at_the_end: ExitStack) -> None:
    show = warnings.showwarning

    def hold(*warning: Any) -> None:
        if waiting.over:
            show(*warning)
        else:
            waiting.later(lambda: show(*warning))

    warnings.showwarning = hold  # type: ignore[assignment]
    at_the_end.callback(_put_back, hold, show)


def _put_back(ours: Any, theirs: Any) -> None:
    if warnings.showwarning is ours:
        warnings.showwarning = theirs
