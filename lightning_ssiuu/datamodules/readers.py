"""Reading records from files (JSON, CSV, Parquet) and data sets of the hub; errors name the place, never the text.

Files are not read by the library ``datasets``: it copies them into its cache, where a forget set would stay, and makes
numbers of what looks like one (an id of ``007`` would be 7). Data sets of the hub are read by it.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any

from lightning_ssiuu.utils.errors import Given, UserError
from lightning_ssiuu.utils.reading import reading
from lightning_ssiuu.utils.registry import nearest

Record = dict[str, Any]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".json", ".jsonl", *_DELIMITERS, ".parquet")
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+(@[\w./-]+)?)(:(?P<config>[\w.-]*))?(:(?P<split>[^:/]+))?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")  # what a column is called, and answers seldom are
_MOST_NAMES = 40
_ROWS = 1024  # of a Parquet file that are in memory at a time
_LONGEST_CELL = 2**31 - 1  # characters
_FILE = "an existing .json, .jsonl, .csv, .tsv or .parquet file"
_ALLOWED = f"{_FILE}, or a data set of the hub (owner/name@revision:config:split)"
FOLDER_OR_HUB = "an existing directory, or a data set of the hub (owner/name)"


def read_records(source: str, argument: str) -> Iterator[Record]:
    """Read records one by one; ``argument`` is what ``source`` was given for, for error messages.

    The source is a ``.json`` or ``.jsonl`` file (JSON, a list or an object whose ``"data"`` is one, or JSON Lines: its
    content tells), a ``.csv`` or ``.tsv`` file with a header (without a comma in it, semicolons or tabs may be between
    cells), a ``.parquet`` file, or a data set of the hub as ``owner/name``, ``owner/name:config`` or
    ``owner/name:config:split`` (split ``train`` unless given), each with ``@revision`` after the name where that is not
    to be the newest. Only JSON that is a single value is read at once, and of files no copy is left in a cache.
    """
    with reading(argument, source, _ALLOWED):  # no path at all: too long, no such user, a zero byte
        path = Path(source).expanduser()
        is_file, is_known = path.is_file(), path.suffix.lower() in SUFFIXES
    if is_file and is_known:
        return _read_file(path, source, argument)
    hub_id = _HUB_ID.fullmatch(source)
    if is_file or is_known or hub_id is None:
        raise UserError(argument, source, _ALLOWED)
    return read_hub(hub_id["name"], hub_id["config"] or None, hub_id["split"] or "train", argument)


def read_hub(name: str, config: str | None, split: str, argument: str) -> Iterator[Record]:
    """Read a split of a data set of the hub (``owner/name@revision``), from its cache where it is there."""
    import datasets  # slow to import and not needed for most files

    called, _, revision = name.partition("@")
    at = {"revision": revision} if revision else {}
    with hub_errors(argument, ":".join(part for part in (name, config, split) if part), _ALLOWED):
        rows = datasets.load_dataset(called, config, split=split, **at)
    return map(dict, rows)


@contextmanager
def hub_errors(argument: str, given: str, allowed: str) -> Iterator[None]:
    """Turn what the hub's libraries raise for a missing or unreachable data set into a :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(argument, given, f"{allowed}; the hub said {type(error).__name__}") from error


@contextmanager
def file_errors(argument: str, source: str) -> Iterator[None]:
    """Turn what reading and parsing a file raises into a :class:`UserError`."""
    try:
        yield
    except json.JSONDecodeError as error:
        # `from None` here and below: the error's own text may quote the data
        raise UserError(argument, source, f"valid JSON: it breaks in line {error.lineno}") from None
    except UnicodeDecodeError:
        raise UserError(argument, source, "text in UTF-8") from None
    except csv.Error:
        raise UserError(argument, source, "valid CSV with a header line") from None
    except OSError as error:
        raise UserError(argument, source, f"a readable file ({error.strerror})") from None
    except UserError:
        raise
    except Exception as error:  # nested too deep, a number of too many digits, ...
        raise UserError(argument, source, f"a file that can be read ({type(error).__name__})") from None


def folder_or_hub(path: str) -> Path | None:
    """The directory that ``path`` is, or None where it can be a hub id."""
    with reading("path", path, FOLDER_OR_HUB):
        folder = Path(path).expanduser()
        if folder.is_dir():
            return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError("path", path, FOLDER_OR_HUB)
    return None


def _read_file(path: Path, source: str, argument: str) -> Iterator[Record]:
    suffix = path.suffix.lower()
    with file_errors(argument, source):
        for record in _records(path, suffix):
            if not isinstance(record, dict):
                raise UserError(argument, source, 'a list of records, or an object whose "data" is one')
            if suffix in _DELIMITERS and None in record:
                raise UserError(argument, source, "CSV whose rows have no more cells than its header")
            yield record


def _records(path: Path, suffix: str) -> Iterator[Any]:
    if suffix in _DELIMITERS:
        return _csv_rows(path, _DELIMITERS[suffix])
    return _parquet_rows(path) if suffix == ".parquet" else _json_values(path, suffix)


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow.parquet  # not needed for most files

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS):
            yield from batch.to_pylist()


def _csv_rows(path: Path, delimiter: str) -> Iterator[Any]:
    csv.field_size_limit(_LONGEST_CELL)  # of the module's, whose own is less than a long document
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        if delimiter not in header:
            delimiter = next((other for other in ";\t" if other in header), delimiter)
        yield from csv.DictReader(file, strict=True, delimiter=delimiter)


def _json_values(path: Path, suffix: str) -> Iterator[Any]:
    # JSON or JSON Lines, by what is in the file: many a file of lines is called .json.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        first = list(islice(lines, 2))
        if len(first) == 2 and _is_json(first[0][1]):
            for number, line in chain(first, lines):
                yield _parse_line(line, number)
            return
    with path.open(encoding="utf-8-sig", newline="") as file:
        values = _parse_json(file.read(), suffix)
    if isinstance(values, dict):
        values = values.get("data")
    yield from values if isinstance(values, list) else [None]


def _is_json(line: str) -> bool:
    with suppress(ValueError):
        json.loads(line)
        return True
    return False


def _parse_json(text: str, suffix: str) -> Any:
    try:
        if suffix == ".json":
            return json.loads(text)
        lines = _parse_lines(text)
        return lines[0] if len(lines) == 1 and isinstance(lines[0], list) else lines
    except json.JSONDecodeError as error:
        if suffix == ".json" and error.msg == "Extra data":
            return _parse_lines(text)
        if suffix == ".json":
            raise
        with suppress(json.JSONDecodeError):
            return json.loads(text)
        raise


def _parse_lines(text: str) -> list[Any]:
    return [_parse_line(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parse_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        error.lineno = number
        raise


def rows(records: Iterable[Record], *columns: Callable[[Iterable[Record]], Iterator[Any]]) -> Iterator[tuple[Any, ...]]:
    """Columns (such as ``partial(column, name=..., argument=...)``) side by side, record by record."""
    copies = tee(records, len(columns))  # that go in step: each holds one record at a time
    return zip(*(read(copy) for read, copy in zip(columns, copies, strict=True)), strict=True)


def column(records: Iterable[Record], name: str, argument: str) -> Iterator[str]:
    """One column of texts or finite numbers, as text; ``argument`` named the column. A missing value is none."""
    for number, value in _cells(records, name, argument):
        yield cell_text(value, number, name, argument)


def cell_text(value: Any, number: int, name: str, argument: str) -> str:
    """The text or finite number in a record's cell, as text."""
    text = str(value)
    # pandas writes a missing cell as NaN
    kind = "NaN" if text.strip() in ("NaN", "nan") else type(value).__name__
    finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind == "NaN" or not (finite or isinstance(value, str)):
        raise UserError(argument, Given(f"{kind} in record {number} of {name!r}"), "text")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        given = Given(f"half a character (a lone surrogate) in record {number} of {name!r}")
        raise UserError(argument, given, "text that UTF-8 can hold")
    if "\0" in text:
        raise UserError(argument, Given(f"a zero byte in record {number} of {name!r}"), "text")
    return text


def text_lists(records: Iterable[Record], name: str, argument: str) -> Iterator[tuple[str, ...]]:
    """One column of lists of texts; a cell may also hold one as JSON, for CSV. An empty cell is an empty list."""
    for number, cell in _cells(records, name, argument):
        yield cell_texts(cell, number, name, argument)


def cell_texts(cell: Any, number: int, name: str, argument: str) -> tuple[str, ...]:
    """The list of texts in a record's cell, or written as JSON in it."""
    value = [] if cell is None else from_json(cell)
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise UserError(argument, Given(f"record {number} of {name!r}"), "a list of texts, or one written as JSON")
    return tuple(value)


def from_json(cell: Any) -> Any:
    """A cell that is no text as it is; else what it says in JSON: an empty list if blank, None if it is no JSON."""
    if not isinstance(cell, str):
        return cell
    with suppress(ValueError, RecursionError):
        return json.loads(cell) if cell.strip() else []
    return None


def cell_of(record: Record, name: str, argument: str) -> Any:
    """A record's cell; ``argument`` named its column."""
    if name not in record:
        raise UserError(argument, name, column_names(record, name))
    return record[name]


def column_names(record: Record, name: str) -> str:
    """The names of a record's columns, for error messages, and which of them may have been meant by ``name``."""
    # Without a header, or in an object keyed by question, what stands where names should is data.
    names = sorted(map(str, record))
    if not names:
        return "a column: the records have none"
    if len(names) > _MOST_NAMES or not all(map(_NAME.fullmatch, names)):
        return f"a column there is: of {len(names)}, whose names look like data"
    return ", ".join(names) + (f" ({meant})" if (meant := nearest(name, names)) else "")


def _cells(records: Iterable[Record], name: str, argument: str) -> Iterator[tuple[int, Any]]:
    for number, record in enumerate(records):
        yield number, cell_of(record, name, argument)
