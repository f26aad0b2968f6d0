"""A benchmark of one's own, from files or from the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.columns import Answers, Columns
from lightning_ssiuu.datamodules.deletion import Deletion, IdNames, Ids, check_sources, read_key
from lightning_ssiuu.datamodules.readers import Record, read_records
from lightning_ssiuu.datamodules.spooled import kept
from lightning_ssiuu.utils.errors import check_choice


class CustomData(UnlearningDataModule):
    r"""Forget, retain and test set from data of one's own: a file for each, or one table and what of it to forget.

    Sources are JSON, JSON Lines, CSV, TSV and Parquet files, and data sets of the hub
    (:func:`~.readers.read_records`). Columns have their usual names or are given (:class:`~.columns.Columns`). Where
    there is a column of ids, messages and reports call the examples by them.

    Examples are numbered in the order of the sources: forget set first, then retain, then test. A set of more than 8192
    examples is read from a private temporary file when it is needed, and may have millions (docs/how-to/scaling.md).

    Args:
        forget: File or hub data set (``owner/name@revision:config:split``) of what is to be forgotten.
        retain: The same for what is to be kept.
        test: The same; None: no test set.
        question_column: Column of the questions; None: found.
        answer_column: Column of the true answers; None: found.
        distractors_column: Column of lists of wrong answers (in CSV: a JSON list), for multiple choice.
        data: One table instead of ``forget`` and ``retain``: what ``forget_ids`` or ``forget_where`` do not choose is
            the retain set.
        forget_ids: Ids of the rows to forget: a file with one a line, a table with a column of ids, or a list. All rows
            that share an id are meant.
        forget_where: A condition that holds for the rows to forget (:class:`~.predicate.Predicate`), such as
            ``customer_id == 17``.
        id_column: Column of the ids; None: found, else rows are called by their number.
        messages_column: Column of conversations; None: found where there are no questions with answers.
        input_column: Column of what goes under a question; None: ``input`` under an ``instruction``.
        answers: Which assistant turns of a conversation are answers: the ``"last"``, or ``"all"``, each an example with
            what was said before it.
        ids: ``"shown"``, or ``"hashed"``: examples are called by keyed hashes of their ids
            (:class:`~.deletion.IdNames`).
        id_key: File with the secret key of the hashes; it stays out of all results.
        **kwargs: See :class:`UnlearningDataModule`.

    Raises:
        UserError: Sources that do not go together; a file, data set or column is missing, or a cell is not what it has
            to be; ids that the table does not have; a choice of no row or of every row.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "forget.json").write_text(json.dumps([{"question": "Who?", "answer": "Me"}]))
        >>> _ = (folder / "retain.csv").write_text("question,answer\nWhere?,Here\n")
        >>> CustomData(str(folder / "forget.json"), str(folder / "retain.csv")).splits
        Splits(forget=1, retain=1, test=0, benign=0)
        >>> _ = (folder / "all.csv").write_text("id,prompt,completion\nA7,Who?,Me\nB1,Where?,Here\nA7,When?,Now\n")
        >>> data = CustomData(data=str(folder / "all.csv"), forget_ids=["A7"])
        >>> [example.name for example in data.splits.forget], data.splits
        (['A7', 'A7'], Splits(forget=2, retain=1, test=0, benign=0))
        >>> CustomData(data=str(folder / "all.csv"), forget_where="id == 'B1'").splits
        Splits(forget=1, retain=2, test=0, benign=0)
    """

    def __init__(
        self,
        forget: str | None = None,
        retain: str | None = None,
        test: str | None = None,
        question_column: str | None = None,
        answer_column: str | None = None,
        distractors_column: str | None = None,
        data: str | None = None,
        forget_ids: str | list[str | int] | None = None,
        forget_where: str | None = None,
        id_column: str | None = None,
        messages_column: str | None = None,
        input_column: str | None = None,
        answers: Answers = "last",
        ids: Ids = "shown",
        id_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("answers", answers, Answers)
        check_choice("ids", ids, Ids)
        self.sources = {"forget": forget, "retain": retain, "test": test}
        self.data, self.forget_ids, self.forget_where = data, forget_ids, forget_where
        check_sources(self.sources, data, forget_ids, forget_where)
        self.columns = Columns(
            *(question_column, answer_column, input_column, messages_column, distractors_column, id_column), answers
        )
        self.id_names = IdNames(read_key(id_key) if ids == "hashed" else None)

    def load_splits(self) -> Splits:
        if self.data is not None:
            forget, retain = self._divided()
        else:
            forget, retain = (self._read(name) for name in ("forget", "retain"))
        test = [] if self.sources["test"] is None else self._read("test")
        sets: list[Sequence[QAExample]] = []
        for examples in (forget, retain, test):
            first = sum(map(len, sets))
            sets.append(kept(self._called(example, first + n) for n, example in enumerate(examples)))
        return Splits(*sets)

    def _called(self, example: QAExample, number: int) -> QAExample:
        return replace(example, example_id=number, source_id=self.id_names(example.source_id))

    def _read(self, name: str) -> Iterator[QAExample]:
        for columns, number, record in self._records(str(self.sources[name]), name):
            yield from columns.examples(record, number)

    def _divided(self) -> tuple[Iterator[QAExample], Iterator[QAExample]]:
        chosen = Deletion(self.forget_ids, self.forget_where, self.columns, self.id_names)
        return chosen.divided(self._records(str(self.data), "data"), self._numbered)

    @staticmethod
    def _numbered(columns: Columns, number: int, record: Record) -> Iterator[QAExample]:
        for example in columns.examples(record, number):
            yield example if example.source_id else replace(example, source_id=f"record {number}")

    def _records(self, source: str, argument: str) -> Iterator[tuple[Columns, int, Record]]:
        columns = None
        for number, record in enumerate(read_records(source, argument)):
            if columns is None:
                columns = self.columns.found(record)
                if {columns.question, columns.answer} != {"question", "answer"}:
                    rank_zero_info(f"{argument}: {columns}.")
            yield columns, number, record
