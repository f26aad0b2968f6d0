"""Files that are either whole or absent: written under a temporary name and renamed."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_ssiuu.errors import UserError


@contextmanager
def written_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well, what is there becomes ``path``.

    Works for a file or a directory, which the block itself creates; on an exception nothing is left behind.

    Example:
        >>> folder = tempfile.mkdtemp()
        >>> with written_atomically(Path(folder) / "a.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> os.listdir(folder)
        ['a.txt']
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
        # The suffix stays: writers choose their format by it.
        temporary = Path(scratch) / target.name
        yield temporary
        if target.is_dir() and not target.is_symlink():
            # A directory cannot be replaced in one step; move the old one aside, so that a crash loses neither.
            target.rename(Path(scratch) / "old")
        temporary.replace(target)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    r"""Write a mapping as indented JSON with a final newline.

    NaN and infinity are not JSON; they become null, so that a run that diverged still leaves its report.

    Example:
        >>> target = Path(tempfile.mkdtemp()) / "a.json"
        >>> write_json(target, {"n": 1, "diverged": [float("nan")]})
        >>> json.loads(target.read_text())
        {'n': 1, 'diverged': [None]}
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
    """Raise unless none of ``names`` exists in ``folder``, or overwriting was asked for.

    Raises:
        UserError: Naming the first that exists.
    """
    for name in names:
        if not overwrite and (Path(folder) / name).exists():
            raise UserError(argument, str(folder), f"a directory without {name}, or --overwrite")


@contextmanager
def nothing_left(folder: str | os.PathLike[str]) -> Iterator[None]:
    """When a :class:`UserError` ends the block, the empty directories it made in ``folder`` are removed again.

    Loggers make their directories before the data and the model have been checked.

    Example:
        >>> folder = Path(tempfile.mkdtemp()) / "run"
        >>> try:
        ...     with nothing_left(folder):
        ...         (folder / "logs" / "version_0").mkdir(parents=True)
        ...         raise UserError("threshold", 1, "more")
        ... except UserError:
        ...     print(folder.exists())
        False
    """
    root = Path(folder).absolute()
    missing = [root, *(parent for parent in root.parents if not parent.exists())] if not root.exists() else []
    known = {path for path in root.rglob("*") if path.is_dir()} | {root}
    try:
        yield
    except UserError:
        made = [path for path in root.rglob("*") if path.is_dir() and path not in known]
        for path in [*sorted(made, reverse=True), *missing]:
            with suppress(OSError):  # not empty, or never made
                path.rmdir()
        raise


def check_space(argument: str, folder: str | os.PathLike[str], needed: int) -> None:
    """Raise unless ``folder`` can be made and its disk has ``needed`` bytes free; writes nothing.

    Raises:
        UserError: If not.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(argument, str(folder), "a directory that can be written")
    if (free := shutil.disk_usage(existing).free) < needed:
        raise UserError(argument, str(folder), f"a disk with {needed / 1e6:.0f} MB free ({free / 1e6:.0f} MB are)")
