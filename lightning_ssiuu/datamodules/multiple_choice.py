"""Multiple-choice items with lettered options, as WMDP and MMLU publish them and lm-evaluation-harness asks them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from lightning_ssiuu.datamodules.readers import Record, column, rows, text_lists
from lightning_ssiuu.datamodules.splits import QAExample
from lightning_ssiuu.utils.errors import Given, UserError

LETTERS = "ABCDEFGHIJ"
#: The template under which a prompt is answered by a space and a letter, and no end token.
LETTER = "{question} {answer}"


@dataclass(frozen=True, repr=False)
class ChoiceItem:
    r"""A question with its choices in their published order.

    Args:
        question: The question.
        choices: Two to ten.
        answer: The place of the right one, from 0.
        subject: What it is about; empty where the file does not say.

    Example:
        >>> item = ChoiceItem("Which is a bird?", ("cod", "heron"), 1, "high_school_biology")
        >>> print(item.prompt(item.about))
        The following are multiple choice questions (with answers) about high school biology.
        <BLANKLINE>
        Which is a bird?
        A. cod
        B. heron
        Answer:
        >>> item.example(7, item.about).answer, item.example(7, item.about).distractors
        ('B', ('A',))
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""

    @property
    def about(self) -> str:
        """The subject in words."""
        return self.subject.replace("_", " ")

    def prompt(self, about: str) -> str:
        """The harness's prompt (tasks ``wmdp_bio``, ``wmdp_cyber``, ``mmlu_*``, without examples), up to "Answer:"."""
        head = f"The following are multiple choice questions (with answers) about {about}.\n\n" if about else ""
        options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return f"{head}{self.question.strip()}\n{options}Answer:"

    def example(self, number: int, about: str) -> QAExample:
        """The item as a question whose answers are letters; the true one first, the others in their order.

        Its other wording is the bare question, by which it is known again.
        """
        letters = LETTERS[: len(self.choices)]
        wrong = tuple(letter for letter in letters if letter != letters[self.answer])
        return QAExample(number, self.prompt(about), letters[self.answer], wrong, (self.question,))


def choice_items(records: Iterable[Record], argument: str) -> list[ChoiceItem]:
    """Items of a table with ``question``, ``choices`` (a list) and ``answer`` (a place from 0, or a letter).

    A column ``subject`` may be there.

    Raises:
        UserError: A column is missing, or an answer is no choice's place; names the record, never its text.
    """
    kept = list(records)
    texts = [partial(column, name=name, argument=argument) for name in ("question", "answer")]
    listed = rows(kept, *texts, partial(text_lists, name="choices", argument=argument))
    items = []
    for number, ((question, place, choices), record) in enumerate(zip(listed, kept, strict=True)):
        if place in LETTERS and len(place) == 1:
            place = str(LETTERS.index(place))
        if not 2 <= len(choices) <= len(LETTERS):
            raise UserError(argument, Given(f"{len(choices)} 'choices' in record {number}"), f"2 to {len(LETTERS)}")
        if not place.isdecimal() or len(place) > 9 or int(place) >= len(choices):
            raise UserError(argument, Given(f"'answer' of record {number}"), "the place of a choice, from 0")
        subject = record.get("subject")
        items.append(ChoiceItem(question, choices, int(place), subject if isinstance(subject, str) else ""))
    return items
