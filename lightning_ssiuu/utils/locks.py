"""One command at a time works in a directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_ssiuu.utils.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows: nobody is kept out there
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()


@contextmanager
def only_here(argument: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, every other command that asks for ``folder`` is refused; it is made, and if still empty removed again.

    It is the directory that is locked, so nothing lies in it, and the kernel lifts the lock of a process that is gone,
    however it ended. Where the file system does not lock directories (NFS) nobody is kept out.

    Raises:
        UserError: If another process is inside, or the directory cannot be made or written.
    """
    place = Path(folder).absolute()
    missing: list[Path] = []
    try:
        try:
            missing = [path for path in (place, *place.parents) if not path.exists()]
            descriptor = _locked(place)
        except OSError as error:
            raise UserError(argument, str(folder), f"a directory that can be written ({error.strerror})") from error
        if descriptor is None:
            raise UserError(argument, str(folder), "a directory in which no other command is at work")
        _held.add(descriptor)
        try:
            yield
        finally:
            if descriptor in _held:  # not in a process that was forked inside
                _held.remove(descriptor)
                os.close(descriptor)
    finally:
        for path in missing:
            with suppress(OSError):  # not empty, or never made
                path.rmdir()


def _locked(place: Path) -> int | None:
    # A descriptor of the directory, locked as long as it is open; None if another process has it.
    while True:
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place if fcntl else os.devnull, os.O_RDONLY)  # Windows opens no directories
        if fcntl is None:
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                os.close(descriptor)
                return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(place)):
                return descriptor
        os.close(descriptor)  # of a directory that another one has just removed


def _let_go() -> None:
    # What was forked (a dataloader's worker) and lives on a little would hold the lock on.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
