"""Reading records from JSON, JSON Lines, CSV or a data set of the hub; errors name the place, never the text."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ssiuu.utils.errors import Given, UserError

Record = dict[str, Any]

SUFFIXES = (".json", ".jsonl", ".csv")
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]*))?(:(?P<split>[^:/]+))?")
_ALLOWED = "an existing .json, .jsonl or .csv file, or a data set of the hub (owner/name:config:split)"


def read_records(source: str, argument: str) -> list[Record]:
    r"""Read a list of records.

    Args:
        source: A ``.json`` file (a list, or an object whose ``"data"`` is one), a ``.jsonl`` file, a ``.csv`` file with
            a header, or a data set of the hub as ``owner/name``, ``owner/name:config`` or ``owner/name:config:split``
            (split ``train`` unless given).
        argument: Name of the argument that ``source`` was given for; error messages use it.

    Raises:
        UserError: There is no such file or data set, it cannot be parsed, or it is not a list of records.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "forget.jsonl"
        >>> _ = path.write_text('{"question": "Who?", "answer": "Me"}\n')
        >>> len(read_records(str(path), "forget"))
        1
        >>> read_records("nowhere.json", "forget")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: forget: got 'nowhere.json', allowed: an existing .json, .jsonl or .csv file...
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path, source, argument)
    hub_id = _HUB_ID.fullmatch(source)
    if hub_id is None or path.suffix.lower() in SUFFIXES:
        raise UserError(argument, source, _ALLOWED)
    return read_hub(hub_id["name"], hub_id["config"] or None, hub_id["split"] or "train", argument)


def read_hub(name: str, config: str | None, split: str, argument: str) -> list[Record]:
    """Read a split of a data set of the hub, from its cache where it is there.

    Raises:
        UserError: If the hub or the data set cannot be reached, or has no such configuration or split.
    """
    import datasets  # slow to import and not needed for files

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # what `datasets` raises for a missing or unreachable set
        given = ":".join(part for part in (name, config, split) if part)
        raise UserError(argument, given, f"{_ALLOWED}; the hub said {type(error).__name__}") from error
    return [dict(row) for row in rows]


def _read_file(path: Path, source: str, argument: str) -> list[Record]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(argument, source, _ALLOWED)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix == ".csv":
                records: Any = list(csv.DictReader(file, strict=True))
            elif suffix == ".jsonl":
                records = [_parse_line(line, number) for number, line in enumerate(file, 1) if line.strip()]
            else:
                records = json.load(file)
    except json.JSONDecodeError as error:
        # `from None` here and below: the error's own text may quote the data
        raise UserError(argument, source, f"valid JSON: it breaks in line {error.lineno}") from None
    except UnicodeDecodeError:
        raise UserError(argument, source, "text in UTF-8") from None
    except csv.Error:
        raise UserError(argument, source, "valid CSV with a header line") from None
    except OSError as error:
        raise UserError(argument, source, f"a readable file ({error.strerror})") from None
    if isinstance(records, dict):
        records = records.get("data")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(argument, source, 'a list of records, or an object whose "data" is one')
    if suffix == ".csv" and any(None in record for record in records):
        raise UserError(argument, source, "CSV whose rows have no more cells than its header")
    return records


def _parse_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        error.lineno = number
        raise


def column(records: Sequence[Record], name: str, argument: str) -> list[str]:
    """One column of text.

    Args:
        records: The rows.
        name: The column.
        argument: Name of the argument that named the column.

    Raises:
        UserError: If a row lacks it (names the columns that are there) or holds something that is not text or number.
    """
    values = []
    for number, record in enumerate(records):
        if name not in record:
            raise UserError(argument, name, ", ".join(sorted(map(str, record))) or "a column: the records have none")
        value = record[name]
        if not isinstance(value, (str, int, float)):
            raise UserError(argument, Given(f"{type(value).__name__} in record {number} of {name!r}"), "text")
        values.append(str(value))
    return values


def text_lists(records: Sequence[Record], name: str, argument: str) -> list[tuple[str, ...]]:
    """One column of lists of texts; a cell may also hold such a list as JSON, for CSV. Nothing there is an empty list.

    Raises:
        UserError: If a row lacks the column, or holds anything else.

    Example:
        >>> text_lists([{"wrong": ["a", "b"]}, {"wrong": '["c"]'}], "wrong", "distractors_column")
        [('a', 'b'), ('c',)]
    """
    lists = []
    for number, record in enumerate(records):
        if name not in record:
            raise UserError(argument, name, ", ".join(sorted(map(str, record))) or "a column: the records have none")
        value = record[name]
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else []
            except json.JSONDecodeError:
                value = None
        elif value is None:
            value = []
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise UserError(argument, Given(f"record {number} of {name!r}"), "a list of texts, or one written as JSON")
        lists.append(tuple(value))
    return lists
