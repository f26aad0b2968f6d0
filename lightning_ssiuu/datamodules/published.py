"""The files of a published benchmark: splits of a data set of the hub, or the same files in a directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_ssiuu.datamodules.readers import (
    SUFFIXES,
    Record,
    file_errors,
    folder_or_hub,
    read_hub,
    read_records,
)
from lightning_ssiuu.utils.errors import UserError


@dataclass(frozen=True)
class Published:
    """Where a benchmark's files are: a hub id, or a directory.

    Args:
        path: The directory or hub id (``owner/name``).

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "raw").mkdir()
        >>> _ = (folder / "raw" / "forget.json").write_text('["A ferry left."]')
        >>> list(Published(str(folder)).records("raw", "forget", "forget"))
        [{'text': 'A ferry left.'}]
    """

    path: str

    def records(self, config: str | None, split: str, argument: str, also: Sequence[str] = ()) -> Iterator[Record]:
        """The records of a split; ``argument`` asked for it.

        On the hub it is the split of that configuration. In a directory it is the file ``config/split``, else
        ``config`` (``split`` without a configuration), else ``also``'s first, with one of the known endings, and all
        files of that name in the directories below where there is none: their records one after the other. A JSON list
        of texts is a table with a column ``text``.

        Raises:
            UserError: No such directory, file or data set.
        """
        folder = folder_or_hub(self.path)
        if folder is None:
            yield from read_hub(self.path, config, split, argument)
            return
        names = [split] if config is None else [f"{config}/{split}", config]
        files = next((found for name in (*names, *also) if (found := _files(folder, name))), None)
        if files is None:
            raise UserError(argument, names[0], f"one of the files below path: {_there(folder)}")
        for file in files:
            yield from _records(file, argument)


def _files(folder: Path, name: str) -> list[Path]:
    for suffix in (".jsonl", *SUFFIXES):
        if (file := folder / f"{name}{suffix}").is_file():
            return [file]
    last = Path(name).name
    return [] if "/" in name else sorted(f for f in folder.rglob(f"{last}.*") if f.suffix in SUFFIXES and f.is_file())


def _records(file: Path, argument: str) -> Iterator[Record]:
    if file.suffix == ".json":
        with file_errors(argument, str(file)):
            whole = file.read_text(encoding="utf-8-sig")
            texts = json.loads(whole) if whole.lstrip()[:1] == "[" and whole.lstrip("[ \r\n\t")[:1] == '"' else None
        if texts is not None and all(isinstance(text, str) for text in texts):
            yield from ({"text": text} for text in texts)
            return
    yield from read_records(str(file), argument)


def _there(folder: Path) -> str:
    names = sorted(
        {file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.*") if file.is_file()}
    )
    return ", ".join(names[:20]) or "there are none"
