"""A benchmark of one's own, from files or from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.readers import column, read_records, rows, text_lists
from lightning_ssiuu.datamodules.splits import numbered


class CustomData(UnlearningDataModule):
    r"""Forget, retain and test set from JSON, JSON Lines or CSV files, or data sets of the hub.

    Examples are numbered in the order of the files: forget set first, then retain, then test. A set of more than 8192
    examples is read from a private temporary file when it is needed, and may have millions (docs/scaling.md).

    Args:
        forget: File (``.json``, ``.jsonl``, ``.csv``) or hub data set (``owner/name:config:split``).
        retain: The same.
        test: The same; None: no test set.
        question_column: Column of the questions.
        answer_column: Column of the true answers.
        distractors_column: Column of lists of wrong answers (in CSV: a JSON list), for multiple choice.
        **kwargs: See :class:`UnlearningDataModule`.

    Raises:
        UserError: A file, data set or column is missing, or a cell is not text.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "forget.json").write_text(json.dumps([{"question": "Who?", "answer": "Me"}]))
        >>> _ = (folder / "retain.csv").write_text("question,answer\nWhere?,Here\n")
        >>> CustomData(str(folder / "forget.json"), str(folder / "retain.csv")).splits
        Splits(forget=1, retain=1, test=0, benign=0)
    """

    def __init__(
        self,
        forget: str,
        retain: str,
        test: str | None = None,
        question_column: str = "question",
        answer_column: str = "answer",
        distractors_column: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sources = {"forget": forget, "retain": retain, "test": test}
        self.question_column, self.answer_column = question_column, answer_column
        self.distractors_column = distractors_column

    def load_splits(self) -> Splits:
        sets: dict[str, Sequence[QAExample]] = {}
        for name, source in self.sources.items():
            sets[name] = [] if source is None else self._read(source, name, sum(map(len, sets.values())))
        return Splits(**sets)

    def _read(self, source: str, name: str, first_id: int) -> Sequence[QAExample]:
        names = ("question_column", "answer_column")
        columns: list[Any] = [partial(column, name=getattr(self, each), argument=each) for each in names]
        if self.distractors_column is not None:
            columns.append(partial(text_lists, name=self.distractors_column, argument="distractors_column"))
        return numbered(first_id, rows(read_records(source, name), *columns))
