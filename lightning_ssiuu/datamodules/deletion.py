"""Which rows of a table are to be forgotten, by ids or a condition; and what ids are called where they are shown."""

from __future__ import annotations

import hmac
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from pathlib import Path
from typing import Literal, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ssiuu.datamodules.columns import IDS, Columns, id_text
from lightning_ssiuu.datamodules.predicate import Predicate
from lightning_ssiuu.datamodules.readers import SUFFIXES, Record, cell_of, column_names, file_errors, read_records
from lightning_ssiuu.datamodules.splits import first_few
from lightning_ssiuu.datamodules.spooled import kept
from lightning_ssiuu.utils.errors import Given, UserError
from lightning_ssiuu.utils.reading import reading

Ids = Literal["shown", "hashed"]
T = TypeVar("T")

_SHORTEST_KEY = 16  # bytes
_NAMED = 20  # in a message
_DIGITS = 16  # hexadecimal ones of a hash: 64 bits
_KEY = f"a file with a secret of at least {_SHORTEST_KEY} bytes, such as `openssl rand -hex 32` writes"


@dataclass(frozen=True, repr=False)
class IdNames:
    """What the ids of rows are called in messages and reports: as they are, or by a keyed hash.

    The hash is the first 16 hexadecimal digits of HMAC-SHA256 of the id under the key. Whoever has the key can tell
    whether an id is among those shown; without it nobody can, however few ids there may be.

    Args:
        key: The secret key; None: ids are shown.

    Example:
        >>> IdNames()("customer 17"), IdNames(b"0123456789abcdef")("customer 17")
        ('customer 17', 'c4614e0c8ed1a18b')
    """

    key: bytes | None = None

    def __call__(self, name: str) -> str:
        """What an id is called."""
        if self.key is None or not name:
            return name
        return hmac.digest(self.key, name.encode(errors="surrogatepass"), "sha256").hex()[:_DIGITS]

    def few(self, names: Sequence[str]) -> str:
        """How many ids there are, and what the first twenty are called."""
        called = [self(name) for name in names[:_NAMED]] + [""] * (len(names) - _NAMED)
        return f"{len(names)} ids ({first_few(called, _NAMED)})"


def read_key(path: str | None, argument: str = "id_key") -> bytes:
    """The key in a file, without white space at its ends.

    Raises:
        UserError: No path, a file that cannot be read, or a key of less than 16 bytes.
    """
    if path is None:
        raise UserError(argument, None, f"{_KEY}, for ids: hashed")
    with reading(argument, path, _KEY):
        key = Path(path).expanduser().read_bytes().strip()
    if len(key) < _SHORTEST_KEY:
        raise UserError(argument, path, _KEY)
    return key


def check_sources(
    sources: Mapping[str, str | None],
    data: str | None,
    forget_ids: str | Sequence[str | int] | None,
    forget_where: str | None,
) -> None:
    """Check that there are either files for the forget and the retain set, or one table and what of it to forget.

    Args:
        sources: ``forget`` and ``retain``; others are passed over.
        data: The table.
        forget_ids: Ids of its rows (:class:`Deletion`).
        forget_where: A condition instead.

    Raises:
        UserError: About the first argument that does not go with the others.
    """
    files = {name: sources[name] for name in ("forget", "retain")}
    if data is None:
        for name, value in {"forget_ids": forget_ids, "forget_where": forget_where}.items():
            if value is not None:
                raise UserError(name, value, "null, or a table (data) whose rows it chooses")
        if missing := [name for name, source in files.items() if source is None]:
            allowed = "a file or hub data set for each; or one table (data) with forget_ids or forget_where"
            raise UserError(", ".join(missing), Given("nothing"), allowed)
    for name, source in files.items():
        if data is not None and source is not None:
            raise UserError(name, source, "null, beside a table (data) that is divided by what is to be forgotten")


class Deletion:
    """Tells the rows of a table that are to be forgotten: those with these ids, or for which a condition holds.

    All rows that share an id of the list are meant.

    Args:
        ids: A file with one id a line, a table with a column of ids, or the ids themselves.
        where: A condition (:class:`~.predicate.Predicate`), instead of ``ids``.
        columns: Names of columns, as far as they are given; that of the ids holds for both tables.
        names: What ids are called in error messages.

    Raises:
        UserError: Neither or both of ``ids`` and ``where``; a file that cannot be read; no ids, or the same twice.
    """

    def __init__(
        self, ids: str | Sequence[str | int] | None, where: str | None, columns: Columns, names: IdNames
    ) -> None:
        if (ids is None) == (where is None):
            given = Given("nothing" if ids is None else "forget_ids and forget_where")
            raise UserError("forget_ids, forget_where", given, "one of the two: which rows of the table to forget")
        self.names, self.where = names, None if where is None else Predicate(where)
        self.n_rows = self.n_chosen = self.n_nameless = 0
        listed = [] if ids is None else read_ids(ids, "forget_ids", columns.id)
        if twice := [name for name, count in Counter(listed).items() if count > 1]:
            allowed = "every id once: it stands for all rows that have it"
            raise UserError("forget_ids", Given(f"{names.few(twice)} more than once"), allowed)
        self._listed, self._missing = frozenset(listed), dict.fromkeys(listed)

    def __call__(self, record: Record, columns: Columns) -> bool:
        """Whether the next row of the table is to be forgotten; ``columns`` are those found in it.

        Raises:
            UserError: The table has no column of ids, or the condition cannot be told of the row.
        """
        number, self.n_rows = self.n_rows, self.n_rows + 1
        if self.where is not None:
            chosen = self.where(record, number)
        else:
            if columns.id is None:
                argument = columns.argument or "id_column"
                raise UserError(argument, Given(f"no column called {_OR}"), column_names(record, "id"))
            name = columns.id_of(record)
            self.n_nameless += not name
            self._missing.pop(name, None)
            chosen = name in self._listed
        self.n_chosen += chosen
        return chosen

    def divided(
        self,
        rows: Iterable[tuple[Columns, int, Record]],
        items: Callable[[Columns, int, Record], Iterable[T]],
    ) -> tuple[Iterator[T], Iterator[T]]:
        """The ``items`` of the rows that are to be forgotten, and of the others, each in the table's order.

        The table is read once, and its items are kept.

        Raises:
            UserError: As calling and :meth:`check` do.
        """
        forgotten = array("b")  # whether each item is

        def every() -> Iterator[T]:
            for columns, number, record in rows:
                forget = self(record, columns)
                for item in items(columns, number, record):
                    forgotten.append(forget)
                    yield item

        every_item = kept(every())
        self.check()
        if self.n_nameless:
            rank_zero_info(f"data: {self.n_nameless} of {self.n_rows} rows have no id; they are in the retain set.")
        return compress(every_item, forgotten), compress(every_item, (not each for each in forgotten))

    def check(self) -> None:
        """Check what was chosen once all rows have been seen.

        Raises:
            UserError: Ids that no row has; no row is chosen, or every row is.
        """
        if self.n_rows == 0:
            raise UserError("data", Given("0 rows"), "a table with some rows to forget and some to retain")
        if self._missing:
            raise UserError("forget_ids", Given(self.names.few(list(self._missing))), "ids that rows of the table have")
        argument = "forget_ids" if self.where is None else "forget_where"
        if self.n_chosen in (0, self.n_rows):
            chosen = "no row" if self.n_chosen == 0 else "every row"
            raise UserError(argument, Given(f"{chosen} of {self.n_rows}"), "some rows to forget and some to retain")


_OR = f"{', '.join(map(repr, IDS[:-1]))} or {IDS[-1]!r}"


def read_ids(given: str | Sequence[str | int], argument: str, column: str | None = None) -> list[str]:
    """Ids: those of a file with one a line, of a table with a column of ids, or the ones given.

    Raises:
        UserError: A file that cannot be read, no ids, or an empty one.
    """
    listed = _ids(given, argument, column)
    if not (listed and all(listed)):
        raise UserError(argument, Given("an empty id" if listed else "0 ids"), "at least one id, none empty")
    return listed


def _ids(given: str | Sequence[str | int], argument: str, column: str | None) -> list[str]:
    if not isinstance(given, str):
        return [id_text(each) for each in given]
    with reading(argument, given, "a file with one id a line, or a table with a column of ids"):
        path = Path(given).expanduser()
        suffix = path.suffix.lower()
        is_file = path.is_file()
    if not is_file:
        raise UserError(argument, given, "an existing file with one id a line, or a table with a column of ids")
    if suffix in SUFFIXES:
        records = read_records(given, argument)
        if (first := next(records, None)) is None:
            return []
        name = Columns(id=column).id_column(first)
        if name is not None:
            return [id_text(cell_of(record, name, argument)) for record in chain([first], records)]
        if len(first) > 1:  # else a list of ids that is called a table
            raise UserError(argument, Given(f"no column called {_OR}"), column_names(first, "id"))
    with file_errors(argument, given):
        return list(_lines(path))


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        yield from filter(None, map(id_text, file))
