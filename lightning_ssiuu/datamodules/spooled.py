"""Long sequences kept in a private file instead of memory."""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from multiprocessing.context import get_spawning_popen
from typing import IO, Any, TypeVar, overload

from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import cache_directory

T = TypeVar("T")

#: Up to so many items stay a list in memory; more than the usual benchmarks have.
IN_MEMORY = 8192


def kept(items: Iterable[T]) -> Sequence[T]:
    """The items as a new list, or as a :class:`Spooled` sequence where there are more than :data:`IN_MEMORY`."""
    if isinstance(items, Spooled):
        return items
    remaining = iter(items)
    first = list(islice(remaining, IN_MEMORY + 1))
    if len(first) <= IN_MEMORY or not hasattr(os, "pread"):  # not on Windows: there they stay in memory
        return [*first, *remaining]
    return Spooled(chain(first, remaining))


class Spooled(Sequence[T]):
    """A sequence that cannot be changed, of items that lie in a file and are read one by one.

    The file has no name: nobody else can open it, and it is gone with the process, however that ends. It takes place
    on the disk of ``LIGHTNING_SSIUU_CACHE``. In memory are 8 bytes an item. Processes forked or spawned read the same
    file; so do copies and slices of neighbours. With ``+`` it goes together with a list, and pickled it is its items.

    Args:
        items: What to keep; any objects that can be pickled.

    Raises:
        UserError: If the disk refuses.

    Example:
        >>> squares = Spooled(n * n for n in range(1000))
        >>> len(squares), squares[30], list(squares[-2:])
        (1000, 900, [996004, 998001])
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._file = _private_file()
        self._ends = array("Q", [0])
        for item in items:
            data = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
            self._ends.append(self._ends[-1] + len(data))
            _write(self._file, data)
        _write(self._file)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        places = range(len(self))[index]
        if isinstance(places, int):
            start, stop = self._ends[places : places + 2]
            return pickle.loads(os.pread(self._file.fileno(), stop - start, start))
        if places.step != 1:
            return [self[place] for place in places]
        return _part(self._file, self._ends[places.start : places.start + len(places) + 1])

    def __add__(self, other: Iterable[T]) -> Sequence[T]:
        return kept(chain(self, other))

    def __radd__(self, other: Iterable[T]) -> Sequence[T]:
        return kept(chain(other, self))

    def __copy__(self) -> Spooled[T]:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Spooled[T]:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:  # for a file, or a process that may outlive this one
            return type(self), (list(self),)
        from multiprocessing.reduction import DupFd  # not on Windows

        return _inherited, (DupFd(self._file.fileno()), self._ends)


def _inherited(file: Any, ends: array[int]) -> Spooled[Any]:
    return _part(os.fdopen(file.detach(), "rb"), ends)


def _part(file: IO[bytes], ends: array[int]) -> Spooled[Any]:
    part: Spooled[Any] = object.__new__(Spooled)
    part._file, part._ends = file, ends
    return part


def _private_file() -> IO[bytes]:
    folder = cache_directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        raise _refusal(error) from error


def _write(file: IO[bytes], data: bytes | None = None) -> None:
    try:
        file.flush() if data is None else file.write(data)
    except OSError as error:
        raise _refusal(error) from error


def _refusal(error: OSError) -> UserError:
    return UserError("LIGHTNING_SSIUU_CACHE", str(cache_directory()), f"a directory to write to ({error.strerror})")
