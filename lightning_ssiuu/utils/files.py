"""Files that are either whole or absent: written under a temporary name and renamed."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_ssiuu.utils.errors import UserError, causes, one_line
from lightning_ssiuu.utils.reading import reading

try:
    import fcntl
except ImportError:  # not on Windows: leftovers of a killed process stay there
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".lightning-ssiuu-partial-"
_OLD = "old"
_LONGEST = 200  # bytes of a name: file systems take 255, and some are added
# What a disk or its owner refuses and a user can mend; the first only happen to those who write. Anything else (a file
# that is not there) may be a defect.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_REFUSALS = {*_NO_ROOM, errno.EACCES, errno.EPERM, errno.EIO, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG}


@contextmanager
def written_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well, what is there becomes ``path``.

    Works for a file or a directory, which the block itself creates; on an exception nothing is left behind. A symbolic
    link in that place is replaced, never followed. What is
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
    if not (temporary.is_dir() if target.is_symlink() else target.is_dir()):
        temporary.replace(target)  # a symbolic link itself, not what it leads to
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
                if os.path.lexists(leftover / _OLD):  # killed between two renames: what stands beside it is whole
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


def print_written(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Say where results lie: a directory, and those of ``names`` that are in it.

    Example:
        >>> with tempfile.TemporaryDirectory() as run:
        ...     (Path(run) / "plots").mkdir()
        ...     print_written(run, ["plots", "audit.json"])  # doctest: +ELLIPSIS
        Written to ...: plots/
    """
    paths, here = [Path(folder) / name for name in names], Path.cwd()
    shown = Path(folder).absolute()
    shown = shown.relative_to(here) if shown.is_relative_to(here) else Path(folder)
    there = [f"{path.name}/" if path.is_dir() else path.name for path in paths if path.exists()]
    print(one_line(f"Written to {shown}: {', '.join(there)}"), flush=True)


def refuse_existing(argument: str, folder: str | os.PathLike[str], names: Iterable[str], overwrite: bool) -> None:
    """Raise a :class:`UserError` where one of ``names`` exists in ``folder``, unless overwriting was asked for.

    A symbolic link is refused in any case.
    """
    for name in names:
        refuse_links(argument, folder, [name])
        with reading(argument, str(folder), "a directory that can be written"):
            exists = (Path(folder) / name).exists()
        if exists and not overwrite:
            raise UserError(argument, str(folder), f"a directory without {name}, or --overwrite")


def refuse_links(argument: str, folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Raise a :class:`UserError` where one of ``names``, which will be written in ``folder``, is a symbolic link."""
    for name in names:
        if (Path(folder) / name).is_symlink():
            raise UserError(argument, str(folder), f"a directory in which {name} is no symbolic link")


def same_place(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether both are there and are one file or directory."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def check_name(argument: str, name: str, taken: Iterable[str] = ()) -> None:
    """Raise a :class:`UserError` unless ``name`` can be that of an entry of a directory, and is not one of ``taken``.

    Upper and lower case count as the same, as they do for some file systems.

    Example:
        >>> check_name("saving.folder", "../model")
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: saving.folder: got '../model', allowed: one plain name, without / and leading dot
    """
    plain = name.isprintable() and not name.startswith(".") and not set(name) & set("/\\")
    if not plain or not 0 < len(name.encode()) <= _LONGEST:
        raise UserError(argument, name, "one plain name, without / and leading dot")
    if name.casefold() in {one.casefold() for one in taken}:
        raise UserError(argument, name, "a name that nothing else in that directory has")


@contextmanager
def nothing_left(
    folder: str | os.PathLike[str], logs: Iterable[str | os.PathLike[str]] = (), begun: Callable[[], bool] = bool
) -> Iterator[None]:
    """When a mistake or an exit ends the block before it has ``begun``, what loggers made in it is removed again.

    That is every file in ``logs``, directories of loggers, that was not there before, and every empty directory, also
    elsewhere in ``folder``.
    """
    # Loggers make their directories before the data and the model have been checked.
    root, places = Path(folder).absolute(), [Path(log).absolute() for log in logs]
    missing = {path for place in (root, *places) for path in (place, *place.parents) if not path.exists()}
    known = {root, *(path for path in root.rglob("*") if path.is_dir())}
    known |= {path for place in places for path in place.rglob("*")}
    try:
        yield
    except (UserError, SystemExit):
        if not begun():
            made = {path for path in root.rglob("*") if path.is_dir()}
            made |= {path for place in places for path in place.rglob("*")}
            for path in sorted((made - known) | missing, reverse=True):
                with suppress(OSError):  # not empty, or never made
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
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


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
