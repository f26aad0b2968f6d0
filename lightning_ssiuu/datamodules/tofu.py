"""TOFU: question–answer pairs about fictitious authors (Maini et al. 2024, arXiv 2401.06121)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.readers import SUFFIXES, Record, column, read_hub, read_records, text_lists
from lightning_ssiuu.errors import UserError

HUB_ID = "locuslab/TOFU"


class TOFU(UnlearningDataModule):
    r"""TOFU (arXiv 2401.06121) from a local directory or the hub.

    The test set is cut from the retain file: the first ``retain_size`` items are the retain set and the ``test_size``
    that follow the test set. Perturbed answers, where the file has them, become distractors.

    Args:
        path: A directory with ``{forget}.jsonl`` and ``{retain}.jsonl`` (or ``.json``, ``.csv``), or a hub id; None:
            ``locuslab/TOFU``.
        forget: Name of the forget file or hub configuration, e.g. ``forget01``, ``forget05``, ``forget10_perturbed``.
        retain: Name of the retain file or hub configuration, e.g. ``retain99``.
        retain_size: Number of retain items; None: all that ``test_size`` leaves.
        test_size: Number of test items; None: all that follow ``retain_size`` items (none if that is None too).
        multiple_choice: As in :class:`UnlearningDataModule`, but off: TOFU scores generated text (ROUGE-L recall).
        **kwargs: See :class:`UnlearningDataModule`.

    Raises:
        UserError: Directory, file or data set missing, columns missing, or more items asked for than there are.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name, first, size in (("forget01", 0, 4), ("retain99", 4, 9)):
        ...     numbers = range(first, first + size)
        ...     rows = [{"question": f"Who wrote book {n}?", "answer": f"Author {n}"} for n in numbers]
        ...     _ = (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        >>> TOFU(path=str(folder), retain_size=5, test_size=3).splits
        Splits(forget=4, retain=5, test=3, benign=0)
    """

    def __init__(
        self,
        path: str | None = None,
        forget: str = "forget01",
        retain: str = "retain99",
        retain_size: int | None = None,
        test_size: int | None = None,
        multiple_choice: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(multiple_choice=multiple_choice, **kwargs)
        if retain_size is not None and retain_size < 1:
            raise UserError("retain_size", retain_size, "at least 1")
        if test_size is not None and test_size < 0:
            raise UserError("test_size", test_size, "at least 0")
        self.path, self.forget, self.retain = path, forget, retain
        self.retain_size, self.test_size = retain_size, test_size

    def load_splits(self) -> Splits:
        """Read both files and cut the test set off the retain file."""
        forget = _examples(self._rows(self.forget, "forget"), 0)
        kept = _examples(self._rows(self.retain, "retain"), len(forget))
        retain_size, test_size = self._sizes(len(kept))
        return Splits(forget, kept[:retain_size], kept[retain_size : retain_size + test_size])

    def _sizes(self, available: int) -> tuple[int, int]:
        test_size, retain_size = self.test_size, self.retain_size
        if retain_size is None:
            retain_size = available - (test_size or 0)
        if retain_size < 1 or retain_size > available:
            name = "retain_size" if self.retain_size is not None else "test_size"
            raise UserError(name, getattr(self, name), f"no more than the {available} items of {self.retain}")
        if test_size is None:
            test_size = available - retain_size
        if retain_size + test_size > available:
            raise UserError("test_size", test_size, f"0 to {available - retain_size}, what {self.retain} has left")
        return retain_size, test_size

    def _rows(self, name: str, argument: str) -> list[Record]:
        folder = Path(self.path).expanduser() if self.path is not None else None
        if folder is not None and folder.is_dir():
            files = [folder / f"{name}{suffix}" for suffix in (".jsonl", *SUFFIXES)]
            found = next((file for file in files if file.is_file()), None)
            if found is None:
                there = sorted(file.stem for file in folder.iterdir() if file.suffix in SUFFIXES)
                raise UserError(argument, name, ", ".join(there) or "a path with .jsonl files")
            return read_records(str(found), argument)
        hub_id = self.path or HUB_ID
        if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
            raise UserError("path", self.path, "an existing directory, or a data set of the hub (owner/name)")
        return read_hub(hub_id, name, "train", argument)


def _examples(rows: list[Record], first_id: int) -> list[QAExample]:
    questions, answers = column(rows, "question", "path"), column(rows, "answer", "path")
    distractors, paraphrases = _optional(rows, "perturbed_answer"), _optional(rows, "paraphrased_question")
    columns = zip(questions, answers, distractors, paraphrases, strict=True)
    return [QAExample(first_id + n, *values) for n, values in enumerate(columns)]


def _optional(rows: list[Record], name: str) -> list[tuple[str, ...]]:
    """Texts that only some of TOFU's files hold, one or several to a row."""
    listed = [{name: [row[name]] if isinstance(row.get(name), str) else row.get(name)} for row in rows]
    return text_lists(listed, name, "path")
