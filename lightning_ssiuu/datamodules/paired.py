"""Benchmarks of a forget and a retain file, whose test set is cut off the retain file, such as TOFU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.readers import (
    SUFFIXES,
    Record,
    column,
    folder_or_hub,
    read_hub,
    read_records,
    rows,
    text_lists,
)
from lightning_ssiuu.datamodules.spooled import kept
from lightning_ssiuu.utils.errors import UserError, check_at_least


class PairedFiles(UnlearningDataModule):
    """A forget and a retain file; the first ``retain_size`` items of the latter are the retain set, the next the test.

    Args:
        path: Directory of the files, or a hub id; None: :attr:`hub_id`.
        forget: Name of the forget file.
        retain: Name of the retain file.
        retain_size: Number of retain items; None: all that ``test_size`` leaves.
        test_size: Number of test items; None: all that follow ``retain_size`` items (none if that is None too).
        multiple_choice: As in :class:`UnlearningDataModule`, but off: the benchmark scores generated text (ROUGE-L).
        **kwargs: See :class:`UnlearningDataModule`.

    Raises:
        UserError: Directory, file or data set missing, columns missing, or more items asked for than there are.
    """

    #: Where the data are without a path.
    hub_id = ""

    def __init__(
        self,
        path: str | None,
        forget: str,
        retain: str,
        retain_size: int | None = None,
        test_size: int | None = None,
        multiple_choice: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(multiple_choice=multiple_choice, **kwargs)
        check_sizes(retain_size=retain_size, test_size=test_size)
        self.path, self.forget, self.retain = path, forget, retain
        self.retain_size, self.test_size = retain_size, test_size

    def load_splits(self) -> Splits:
        forget = self._examples(self.forget, "forget")
        others = self._examples(self.retain, "retain", len(forget))
        return Splits(forget, *cut(others, self.retain_size, self.test_size, self.retain))

    def _examples(self, name: str, argument: str, first_id: int = 0) -> Sequence[QAExample]:
        return examples_of(self._rows(name, argument), first_id)

    def _rows(self, name: str, argument: str) -> Iterator[Record]:
        path = None if self.path is None else folder_or_hub(self.path)
        if path is None:
            return read_hub(self.path or self.hub_id, name, "train", argument)
        files = [path / f"{name}{suffix}" for suffix in (".jsonl", *SUFFIXES)]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            names = {file.stem for file in path.iterdir() if file.suffix in SUFFIXES}
            raise UserError(argument, name, ", ".join(sorted(names)) or "a path with .jsonl files")
        return read_records(str(file), argument)


def check_sizes(**sizes: int | None) -> None:
    """Refuse sets without items, but for the test set, and negative numbers of items."""
    for name, size in sizes.items():
        if size is not None:
            check_at_least(name, size, 0 if name == "test_size" else 1)


def cut(
    kept: Sequence[QAExample], retain_size: int | None, test_size: int | None, source: str
) -> tuple[Sequence[QAExample], Sequence[QAExample]]:
    """Cut what is not forgotten into retain and test set; ``source`` is where it is from, for error messages."""
    available = len(kept)
    n_retain = available - (test_size or 0) if retain_size is None else retain_size
    if not 1 <= n_retain <= available:
        name, size = ("test_size", test_size) if retain_size is None else ("retain_size", retain_size)
        raise UserError(name, size, f"no more than the {available} items of {source}")
    n_test = available - n_retain if test_size is None else test_size
    if n_retain + n_test > available:
        raise UserError("test_size", test_size, f"0 to {available - n_retain}, what {source} has left")
    return kept[:n_retain], kept[n_retain : n_retain + n_test]


def examples_of(records: Iterator[Record], first_id: int) -> Sequence[QAExample]:
    """The examples of a file in TOFU's columns, numbered from ``first_id`` on.

    These are ``question`` and ``answer``, and in some files ``perturbed_answer``, ``paraphrased_question`` (one text or
    several) and ``paraphrased_answer``.
    """
    texts = [partial(column, name=name, argument="path") for name in ("question", "answer")]
    names = ("perturbed_answer", "paraphrased_question", "paraphrased_answer")
    found = rows(records, *texts, *(partial(_optional, name=name) for name in names))
    return kept(
        QAExample(first_id + n, question, answer, wrong, asked, rephrased=next(iter(said), ""))
        for n, (question, answer, wrong, asked, said) in enumerate(found)
    )


def _optional(records: Iterable[Record], name: str) -> Iterator[tuple[str, ...]]:
    """Texts that only some of TOFU's files hold, one or several to a row."""
    listed = ({name: [row[name]] if isinstance(row.get(name), str) else row.get(name)} for row in records)
    return text_lists(listed, name, "path")
