"""WMDP: multiple-choice questions about hazardous knowledge (Li et al. 2024, arXiv 2403.03218)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.paired import check_sizes, cut
from lightning_ssiuu.datamodules.readers import Record, column, read_records, rows, text_lists
from lightning_ssiuu.utils.errors import Given, UserError


class WMDP(UnlearningDataModule):
    """Multiple-choice questions of WMDP (arXiv 2403.03218), with others in the same format to be kept.

    Columns are ``question``, ``choices`` (a list) and ``answer`` (the place of the right choice, from 0). The right
    choice is the answer, the others are distractors. MMLU has the same columns and is the usual set to be kept; the
    test set is cut from it. A question that occurs with several lists of choices is taken once, the first time, and one
    that stands in the forget set is not kept: such texts ("Which is true?") mean nothing without their choices.

    Args:
        forget: File (``.json``, ``.jsonl``, ``.csv``) or hub data set (``owner/name:config:split``); released are
            the configurations ``wmdp-bio``, ``wmdp-chem`` and ``wmdp-cyber``, or ``bio_questions.json`` and so on.
        retain: The same for what is kept.
        forget_size: Number of forget items; None: all.
        retain_size: Number of retain items; None: all that ``test_size`` leaves.
        test_size: Number of test items; None: all that follow ``retain_size`` items (none if that is None too).
        **kwargs: See :class:`UnlearningDataModule`. Some questions are longer than 256 tokens: see ``max_length``.

    Raises:
        UserError: File, data set or column missing, an ``answer`` that is no choice's place, or more items asked for
            than there are.

    Example:
        >>> data = WMDP("bio_questions.json", forget_size=400, test_size=500, max_length=1024)
        >>> data.retain
        'cais/mmlu:all:validation'
    """

    def __init__(
        self,
        forget: str = "cais/wmdp:wmdp-cyber:test",
        retain: str = "cais/mmlu:all:validation",
        forget_size: int | None = None,
        retain_size: int | None = None,
        test_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_sizes(forget_size=forget_size, retain_size=retain_size, test_size=test_size)
        self.forget, self.retain = forget, retain
        self.forget_size, self.retain_size, self.test_size = forget_size, retain_size, test_size

    def load_splits(self) -> Splits:
        forget = _examples(read_records(self.forget, "forget"), 0, "forget")
        if self.forget_size is not None and self.forget_size > len(forget):
            raise UserError("forget_size", self.forget_size, f"no more than the {len(forget)} items of {self.forget}")
        forget = forget[: self.forget_size]
        asked = {example.folded for example in forget}
        kept = _examples(read_records(self.retain, "retain"), len(forget), "retain")
        kept = [example for example in kept if example.folded not in asked]
        return Splits(forget, *cut(kept, self.retain_size, self.test_size, self.retain))


def _examples(records: Iterable[Record], first_id: int, argument: str) -> list[QAExample]:
    texts = [partial(column, name=name, argument=argument) for name in ("question", "answer")]
    lists = partial(text_lists, name="choices", argument=argument)
    examples: dict[str, QAExample] = {}
    for number, (question, place, options) in enumerate(rows(records, *texts, lists)):
        if not place.isdecimal() or len(place) > 9 or int(place) >= len(options):
            raise UserError(argument, Given(f"'answer' of record {number}"), "the place of a choice, from 0")
        answer = options[int(place)]
        wrong = tuple(option for option in dict.fromkeys(options) if option != answer)
        example = QAExample(first_id + len(examples), question, answer, wrong)
        examples.setdefault(example.folded, example)
    return list(examples.values())
