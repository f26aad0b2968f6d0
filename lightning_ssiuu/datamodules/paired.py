"""Benchmarks of a forget and a retain file, whose test set is cut off the retain file: TOFU and MUSE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.readers import SUFFIXES, Record, column, read_hub, read_records, text_lists
from lightning_ssiuu.utils.errors import UserError, check_at_least


class PairedFiles(UnlearningDataModule):
    """A forget and a retain file; the first ``retain_size`` items of the latter are the retain set, the next the test.

    Args:
        path: Directory of the files, or a hub id; None: :attr:`hub_id`.
        forget: Name of the forget file.
        retain: Name of the retain file.
        retain_size: Number of retain items; None: all that ``test_size`` leaves.
        test_size: Number of test items; None: all that follow ``retain_size`` items (none if that is None too).
        **kwargs: See :class:`UnlearningDataModule`.
    """

    #: Where the data are without a path.
    hub_id = ""

    def __init__(
        self,
        path: str | None,
        forget: str,
        retain: str,
        retain_size: int | None,
        test_size: int | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_sizes(retain_size, test_size)
        self.path, self.forget, self.retain = path, forget, retain
        self.retain_size, self.test_size = retain_size, test_size

    def load_splits(self) -> Splits:
        forget = _examples(self._rows(self.forget, "forget"), 0)
        kept = _examples(self._rows(self.retain, "retain"), len(forget))
        return Splits(forget, *cut(kept, self.retain_size, self.test_size, self.retain))

    def folders(self, path: Path) -> list[Path]:
        return [path]

    def read_hub(self, hub_id: str, name: str, argument: str) -> list[Record]:
        """Read a file of that name from the hub, where it is a configuration."""
        return read_hub(hub_id, name, "train", argument)

    def _rows(self, name: str, argument: str) -> list[Record]:
        folder = Path(self.path).expanduser() if self.path is not None else None
        if folder is not None and folder.is_dir():
            folders = [each for each in self.folders(folder) if each.is_dir()]
            files = [each / f"{name}{suffix}" for each in folders for suffix in (".jsonl", *SUFFIXES)]
            found = next((file for file in files if file.is_file()), None)
            if found is None:
                there = sorted(file.stem for each in folders for file in each.iterdir() if file.suffix in SUFFIXES)
                raise UserError(argument, name, ", ".join(there) or "a path with .jsonl files")
            return read_records(str(found), argument)
        hub_id = self.path or self.hub_id
        if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
            raise UserError("path", self.path, "an existing directory, or a data set of the hub (owner/name)")
        return self.read_hub(hub_id, name, argument)


def check_sizes(retain_size: int | None, test_size: int | None) -> None:
    """Refuse a retain set without items, and a negative number of test items."""
    if retain_size is not None:
        check_at_least("retain_size", retain_size, 1)
    if test_size is not None:
        check_at_least("test_size", test_size, 0)


def cut(
    kept: list[QAExample], retain_size: int | None, test_size: int | None, source: str
) -> tuple[list[QAExample], list[QAExample]]:
    """Cut a list into retain and test set.

    Args:
        kept: What is not forgotten.
        retain_size: Number of retain items; None: all that ``test_size`` leaves.
        test_size: Number of test items; None: all that follow ``retain_size`` items (none if that is None too).
        source: Where the items are from, for error messages.

    Raises:
        UserError: If more is asked for than there is.
    """
    available, asked = len(kept), retain_size
    if retain_size is None:
        retain_size = available - (test_size or 0)
    if retain_size < 1 or retain_size > available:
        name = "retain_size" if asked is not None else "test_size"
        given = asked if asked is not None else test_size
        raise UserError(name, given, f"no more than the {available} items of {source}")
    if test_size is None:
        test_size = available - retain_size
    if retain_size + test_size > available:
        raise UserError("test_size", test_size, f"0 to {available - retain_size}, what {source} has left")
    return kept[:retain_size], kept[retain_size : retain_size + test_size]


def _examples(rows: list[Record], first_id: int) -> list[QAExample]:
    questions, answers = column(rows, "question", "path"), column(rows, "answer", "path")
    distractors, paraphrases = _optional(rows, "perturbed_answer"), _optional(rows, "paraphrased_question")
    columns = zip(questions, answers, distractors, paraphrases, strict=True)
    return [QAExample(first_id + n, *values) for n, values in enumerate(columns)]


def _optional(rows: list[Record], name: str) -> list[tuple[str, ...]]:
    """Texts that only some of TOFU's files hold, one or several to a row."""
    listed = [{name: [row[name]] if isinstance(row.get(name), str) else row.get(name)} for row in rows]
    return text_lists(listed, name, "path")
