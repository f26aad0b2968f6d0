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

#: The file that is locked. One that a killed process left is locked by nobody, and goes with the next command.
LOCK = ".lightning-ssiuu.lock"


@contextmanager
def only_here(argument: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, every other command that asks for ``folder`` is refused; it is made, and if still empty removed again.

    The kernel lifts the lock of a process that is gone, however it ended. Where the file system knows no locks nobody
    is kept out.

    Raises:
        UserError: If another process is inside, or the directory cannot be made or written.
    """
    place, process = Path(folder).absolute(), os.getpid()
    missing = [path for path in (place, *place.parents) if not path.exists()]
    descriptor = None
    try:
        place.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(place / LOCK)
        if descriptor is None:
            raise UserError(argument, str(folder), "a directory in which no other command is at work")
        yield
    except OSError as error:
        if descriptor is not None:
            raise  # of what is done inside
        raise UserError(argument, str(folder), f"a directory that can be written ({error.strerror})") from error
    finally:
        if os.getpid() == process:
            if descriptor is not None:
                (place / LOCK).unlink(missing_ok=True)
                os.close(descriptor)
            for path in missing:
                with suppress(OSError):  # not empty, or never made
                    path.rmdir()


def _locked(path: Path) -> int | None:
    # A descriptor, locked as long as it is open and this process lives; None if another one has it.
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if fcntl is not None:
                # Not flock: what is forked (a dataloader's worker) would hold it on, and NFS has none of its own.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                os.close(descriptor)
                return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # of one that has just gone, with its file
