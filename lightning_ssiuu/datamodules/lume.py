"""LUME: stories, invented and real biographies to be unlearned; task 4 of SemEval 2025 (arXiv 2502.15097)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.prompted import Prompted
from lightning_ssiuu.datamodules.published import Published
from lightning_ssiuu.datamodules.readers import column, rows
from lightning_ssiuu.datamodules.spooled import kept
from lightning_ssiuu.utils.errors import Given, UserError, check_choice

Fold = Literal["train", "validation"]
KINDS = {"sc": "regurgitation", "qa": "knowledge"}


class LUME(UnlearningDataModule):
    """LUME (Ramakrishna et al. 2025, arXiv 2502.15097): texts to continue and questions, of three tasks.

    Tasks 1 to 3 are invented stories, invented people's private data, and real biographies. An example whose ``id``
    ends in ``sc`` and a digit asks for the rest of a text, one in ``qa`` and a digit asks a question. The benchmark
    unlearns and scores the same examples: scoring what was trained on is its protocol, and retain examples too are
    trained on. ``group`` of an example is its task, ``source_id`` its id.

    Verified in the published data: files, columns (``id``, ``input``, ``output``, ``task``), ids. Verified in public
    copies of the task's own script: what is scored and how (suite ``lume``). Retain examples with a question that the
    forget set has, too, are left out.

    Args:
        path: A copy of the directory ``data`` of ``amazon-science/lume-llm-unlearning`` (``forget.jsonl``,
            ``retain.jsonl``), or of the SemEval task (``forget_train-00000-of-00001.parquet``, ``train/forget.jsonl``).
        fold: Which of the SemEval task's: ``"train"`` or ``"validation"``.
        tasks: Of which tasks, such as ``["Task2"]``; None: all.
        template: What stands around input and output.
        **kwargs: See :class:`UnlearningDataModule`. Texts to continue are long: see ``max_length``.

    Raises:
        UserError: A file or column is missing, an id tells no kind, or a task has no example.

    Example:
        >>> LUME("data", tasks=["Task2"]).template
        '{question}'
    """

    def __init__(
        self,
        path: str,
        fold: Fold = "train",
        tasks: list[str] | None = None,
        template: str = "{question}",
        **kwargs: Any,
    ) -> None:
        super().__init__(template=template, **kwargs)
        check_choice("fold", fold, Fold)
        self.published, self.fold, self.tasks = Published(path), fold, tasks

    def load_splits(self) -> Splits:
        every = list(self._examples("forget"))
        there = sorted({example.group for example in every})
        for task in self.tasks or ():
            if task not in there:
                raise UserError("tasks", task, ", ".join(there) or "null: there are no examples")
        forget = self._numbered(every, 0)
        asked = {example.folded for example in forget}
        rest = (example for example in self._examples("retain") if example.folded not in asked)
        return Splits(forget, self._numbered(rest, len(forget)))

    def _numbered(self, examples: Iterable[QAExample], first: int) -> Sequence[QAExample]:
        chosen = (example for example in examples if self.tasks is None or example.group in self.tasks)
        return kept(replace(example, example_id=n) for n, example in enumerate(chosen, first))

    def named_set(self, name: str) -> Sequence[QAExample]:
        """The sets of the suite: ``forget_Task1_knowledge`` and so on, ``member`` and ``nonmember``; and others."""
        make = Prompted(self.tokenizer)
        if name in ("member", "nonmember"):
            return [make.text(number, text) for number, text in enumerate(self.texts(name))]
        split, *rest = name.split("_")
        if len(rest) != 2 or rest[1] not in KINDS.values():
            return super().named_set(name)
        found = of_kind(super().named_set(split), *rest)
        if not found:
            raise UserError("data", Given(f"{type(self).__name__} without a set {name}"), "data with all tasks")
        return [make(n, e.question, e.question, f" {e.answer}") for n, e in enumerate(found)]

    def texts(self, name: str) -> list[str]:
        """Documents for the membership attack: ``member`` or ``nonmember`` (SemEval's ``mia_data``)."""
        return list(column(self.published.records(None, name, "path", (f"mia_data/{name}",)), "document", "path"))

    def _examples(self, name: str) -> Iterator[QAExample]:
        files = (f"{name}_{self.fold}-00000-of-00001", f"data/{name}_{self.fold}-00000-of-00001")
        records = self.published.records(self.fold, name, name, (*files, name))
        columns = [partial(column, name=key, argument=name) for key in ("id", "input", "output", "task")]
        for number, (own, question, answer, task) in enumerate(rows(records, *columns)):
            if kind_of(own) is None:
                raise UserError(name, Given(f"'id' of record {number}"), "one that ends in sc or qa and a digit")
            yield QAExample(number, question, answer, group=task, source_id=own.replace('"', ""))


def kind_of(source_id: str) -> str | None:
    """What an example asks for, by the last letters of its id: ``"regurgitation"``, ``"knowledge"`` or None.

    Example:
        >>> kind_of("12762334sc1"), kind_of("12762334qa0"), kind_of("12762334")
        ('regurgitation', 'knowledge', None)
    """
    return KINDS.get(source_id.rstrip("0123456789")[-2:])


def of_kind(examples: Sequence[QAExample], task: str, kind: str) -> list[QAExample]:
    """The examples of a task that ask for a kind of answer."""
    return [example for example in examples if example.group == task and kind_of(example.source_id) == kind]
