"""Files that are either whole or absent: written under a temporary name and renamed."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_ssiuu.utils.errors import UserError, causes
from lightning_ssiuu.utils.reading import reading

try:
    import fcntl
except ImportError:  # not on Windows: leftovers of a killed process stay there
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".lightning-ssiuu-partial-"
_OLD = "old"
# What a disk or its owner refuses and a user can mend; the first only happen to those who write. Anything else (a file
# that is not there) may be a defect.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_REFUSALS = {*_NO_ROOM, errno.EACCES, errno.EPERM, errno.EIO, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG}


@contextmanager
def written_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well, what is there becomes ``path``.

    Works for a file or a directory, which the block itself creates; on an exception nothing is left behind. What is
    renamed is on the disk already, not only in its cache, so ``path`` is whole even after a power cut. What a killed
    process left in the same directory is removed; what another one is writing there is not.

    Raises:
        UserError: If the disk refuses: it is full, write-protected, ...; ``path`` is then what it was.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target.parent)
        with _scratch(target.parent) as scratch:
            # The suffix stays: writers choose their format by it.
            temporary = scratch / target.name
            yield temporary
            _to_disk(temporary)
            _put(temporary, target, scratch / _OLD)
            _to_disk(target.parent, deep=False)
    except BaseException as error:  # torch.distributed.checkpoint's is no Exception
        if (refusal := disk_refusal(error, target.parent)) is None:
            raise
        raise refusal from error


def _put(temporary: Path, target: Path, aside: Path) -> None:
    if not target.is_dir() or target.is_symlink():
        temporary.replace(target)
        return
    # A directory cannot be replaced in one step; with the old one aside a crash loses neither (clear_leftovers).
    target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        aside.rename(target)
        raise


def _to_disk(path: Path, deep: bool = True) -> None:
    inside = [entry for entry in path.rglob("*") if not entry.is_symlink()] if deep and path.is_dir() else []
    for entry in [*inside, path]:
        if entry.is_dir() and fcntl is None:
            continue  # Windows opens no directories
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems know no fsync of directories
                raise
        finally:
            os.close(descriptor)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    # A new directory, locked as long as this process lives: the kernel lifts the lock of one that is killed.
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        with suppress(FileNotFoundError):
            lock = _lock(scratch, wait=True)
            if scratch.exists():
                break
            if lock is not None:
                os.close(lock)
        # another process took it for a leftover before it was locked
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, wait: bool) -> int | None:
    # A descriptor that holds the lock on a directory; None if it is held elsewhere or there are no locks here.
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def clear_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what a killed process left half written in ``folder``; finish what it was about to rename."""
    for leftover in Path(folder).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # gone in the meantime, or not ours
            if (lock := _lock(leftover, wait=False)) is None:
                continue
            try:
                if (leftover / _OLD).exists():  # killed between two renames: what stands beside it is whole
                    for whole in leftover.iterdir():
                        if whole.name != _OLD and not (leftover.parent / whole.name).exists():
                            whole.rename(leftover.parent / whole.name)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)


def disk_refusal(error: BaseException, folder: str | os.PathLike[str] | None = None) -> UserError | None:
    """What to tell the user where an exception, or one of its causes, came of a disk that refuses to write, else None.

    Without ``folder``, where it was to be written, only errors count that reading cannot raise.
    """
    for cause in causes(error):  # libraries wrap what the system says, some of them in text only
        if isinstance(cause, UserError):
            return None
        number = cause.errno if isinstance(cause, OSError) else None
        if match := re.search(r"\(os error (\d+)\)", str(cause)):  # of safetensors
            number = int(match[1])
        if number in (_NO_ROOM if folder is None else _REFUSALS):
            given = str(folder or getattr(cause, "filename", None) or os.curdir)
            return UserError("output directory", given, f"one that can be written ({os.strerror(number)})")
    return None


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON with a final newline.

    NaN and infinity are not JSON; they become null, so that a run that diverged still leaves its report.
    """
    text = json.dumps(_finite(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: str | os.PathLike[str], header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a table with a header line."""
    with written_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def refuse_existing(argument: str, folder: str | os.PathLike[str], names: Iterable[str], overwrite: bool) -> None:
    """Raise a :class:`UserError` where one of ``names`` exists in ``folder``, unless overwriting was asked for."""
    for name in names:
        with reading(argument, str(folder), "a directory that can be written"):
            exists = (Path(folder) / name).exists()
        if exists and not overwrite:
            raise UserError(argument, str(folder), f"a directory without {name}, or --overwrite")


@contextmanager
def nothing_left(folder: str | os.PathLike[str]) -> Iterator[None]:
    """When a mistake or an exit ends the block, the empty directories it made in ``folder`` are removed again."""
    # Loggers make their directories before the data and the model have been checked.
    root = Path(folder).absolute()
    missing = [root, *(parent for parent in root.parents if not parent.exists())] if not root.exists() else []
    known = {path for path in root.rglob("*") if path.is_dir()} | {root}
    try:
        yield
    except (UserError, SystemExit):
        made = [path for path in root.rglob("*") if path.is_dir() and path not in known]
        for path in [*sorted(made, reverse=True), *missing]:
            with suppress(OSError):  # not empty, or never made
                path.rmdir()
        raise


def check_space(argument: str, folder: str | os.PathLike[str], needed: int) -> None:
    """Raise a :class:`UserError` unless ``folder`` can be made and ``needed`` bytes are free there; write nothing."""
    with reading(argument, str(folder), "a directory that can be written"):
        existing = Path(folder).absolute()
        while not existing.exists():
            existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(argument, str(folder), "a directory that can be written")
    if (free := shutil.disk_usage(existing).free) < needed:
        raise UserError(argument, str(folder), f"a disk with {needed / 1e6:.0f} MB free ({free / 1e6:.0f} MB are)")


def cache_directory() -> Path:
    """Where what can be made again is kept: ``LIGHTNING_SSIUU_CACHE``, or ``~/.cache/lightning_ssiuu``."""
    return Path(os.environ.get("LIGHTNING_SSIUU_CACHE", "~/.cache/lightning_ssiuu")).expanduser()
