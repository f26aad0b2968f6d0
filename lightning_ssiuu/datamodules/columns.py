"""Which columns of a table hold questions, answers, conversations and ids, and the examples that its records are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_ssiuu.datamodules.readers import Record, cell_of, cell_text, cell_texts, column_names, from_json
from lightning_ssiuu.datamodules.splits import QAExample
from lightning_ssiuu.utils.errors import Given, UserError

#: Names of columns that are found, in this order, whatever their case and signs (``Record ID`` is ``record_id``).
QUESTIONS = ("question", "prompt", "instruction", "query", "input")
ANSWERS = ("answer", "completion", "output", "response")
MESSAGES = ("messages", "conversations", "conversation")
IDS = (
    *("id", "uid", "uuid", "record_id", "row_id", "item_id", "example_id", "prompt_id", "doc_id"),
    *("customer_id", "user_id", "person_id", "subject_id", "client_id", "patient_id"),
)
_ROLES = {
    **{role: role for role in ("system", "user", "assistant")},
    **{"developer": "system", "human": "user", "gpt": "assistant", "model": "assistant"},
}

Turns = list[tuple[str, str]]
Answers = Literal["last", "all"]


@dataclass(frozen=True)
class Columns:
    r"""The columns of a table by what they hold; None: found by their usual names, or not there.

    Args:
        question: Questions: :data:`QUESTIONS`. A cell may be a list of messages, too.
        answer: True answers: :data:`ANSWERS`. A cell may be a list of messages, too.
        input: What goes under the question, on a line of its own: ``input`` where ``instruction`` is the question.
        messages: Conversations (:func:`turns_of`): :data:`MESSAGES`, where there are no questions with answers.
        distractors: Lists of wrong answers.
        id: The records' ids: :data:`IDS`.
        answers: Which assistant turns of a conversation are answers: of those that follow a user's turn the ``"last"``,
            or ``"all"``, each of which is an example with what was said before it.
        argument: What errors name; None: the option that names the column, such as ``question_column``.

    Example:
        >>> record = {"ID": 7, "instruction": "Add.", "input": "1 and 2", "output": "3"}
        >>> columns = Columns().found(record)
        >>> str(columns)
        "questions in 'instruction' and 'input', answers in 'output', ids in 'ID'"
        >>> [(one.name, one.question, one.answer) for one in columns.examples(record, 0)]
        [('7', 'Add.\n1 and 2', '3')]
    """

    question: str | None = None
    answer: str | None = None
    input: str | None = None
    messages: str | None = None
    distractors: str | None = None
    id: str | None = None
    answers: Answers = "last"
    argument: str | None = None

    def __str__(self) -> str:
        asked = [repr(name) for name in (self.question, self.input) if name is not None]
        texts = {"conversations": [repr(self.messages)]} if asked == [] else {"questions": asked}
        texts |= {} if self.answer is None else {"answers": [repr(self.answer)]}
        texts |= {} if self.id is None else {"ids": [repr(self.id)]}
        return ", ".join(f"{kind} in {' and '.join(names)}" for kind, names in texts.items())

    def found(self, record: Record) -> Columns:
        """The same with the columns that a table with such a record has.

        Raises:
            UserError: A named column is missing, or no column has a usual name; in the words of :func:`column_names`.
        """
        names = _by_folded(record)
        given = ("question", "answer", "messages", "input", "distractors", "id")
        for kind in given:
            if getattr(self, kind) is not None:
                cell_of(record, getattr(self, kind), self._argument(kind))
        found: dict[str, Any] = {"id": self.id_column(record)}
        if self.messages is None:
            asked, answered = self.question or _first(QUESTIONS, names), self.answer or _first(ANSWERS, names)
            named = self.question is not None or self.answer is not None
            talk = None if named else _first(MESSAGES, names)
            if asked is not None and answered is not None:
                found |= {"question": asked, "answer": answered}
                if self.input is None and _folded(asked) == "instruction":
                    found["input"] = names.get("input")
            elif talk is not None:
                found["messages"] = talk
            else:
                raise self._missing(record, "question" if asked is None else "answer", names)
        return replace(self, **found)

    def id_column(self, record: Record) -> str | None:
        """The column of ids that a table with such a record has: the one named, else one of :data:`IDS`."""
        return self.id if self.id in record else None if self.id else _first(IDS, _by_folded(record))

    def id_of(self, record: Record) -> str:
        """The record's id as text; empty where it has none."""
        return "" if self.id is None else id_text(record.get(self.id))

    def examples(self, record: Record, number: int) -> Iterator[QAExample]:
        """The examples of a record of the table, which is its ``number``-th; their ``example_id`` is 0.

        Raises:
            UserError: A cell is missing or is not what it has to be; names the record and the column, never text.
        """
        name = self.id_of(record) or ("" if self.id is None else f"record {number}")
        wrong: tuple[str, ...] = ()
        if self.distractors is not None:
            argument = self._argument("distractors")
            wrong = cell_texts(cell_of(record, self.distractors, argument), number, self.distractors, argument)
        for *history, (_, question), (_, answer) in self._asked(record, number):
            yield QAExample(0, question, answer, wrong, history=tuple(history), source_id=name)

    def _asked(self, record: Record, number: int) -> Iterator[Turns]:
        # Conversations that end with a question and its answer.
        if self.messages is not None:
            turns, column = self._said(record, number, "messages"), self.messages
        else:
            asked, answer = self._said(record, number, "question"), self._said(record, number, "answer", "assistant")
            if self.input is not None and (more := record.get(self.input)) not in (None, ""):
                text = cell_text(more, number, self.input, self._argument("input"))
                asked[-1] = ("user", f"{asked[-1][1]}\n{text}")
            turns, column = [*asked, *answer], str(self.answer)
        after = range(1, len(turns))
        ends = [n for n in after if (turns[n - 1][0], turns[n][0]) == ("user", "assistant")]
        if not ends:
            given = Given(f"record {number} of {column!r}")
            raise UserError(self._argument("messages"), given, "a conversation with an assistant's turn after a user's")
        for end in ends if self.answers == "all" else ends[-1:]:
            yield turns[: end + 1]

    def _said(self, record: Record, number: int, kind: str, role: str = "user") -> Turns:
        name, argument = getattr(self, kind), self._argument(kind)
        cell = cell_of(record, name, argument)
        if kind == "messages" or isinstance(cell, (list, dict)):
            return turns_of(cell, number, name, argument)
        return [(role, cell_text(cell, number, name, argument))]

    def _argument(self, kind: str) -> str:
        return self.argument or f"{kind}_column"

    def _missing(self, record: Record, kind: str, names: Mapping[str, str]) -> UserError:
        usual = {"question": QUESTIONS, "answer": ANSWERS}[kind]
        text = "; the data module Documents takes a column of text alone" if "text" in names else ""
        allowed = f"{column_names(record, usual[0])}; found by themselves are {', '.join((*usual, *MESSAGES))}{text}"
        return UserError(self._argument(kind), usual[0], allowed)


def is_text(record: Record) -> bool:
    """Whether a table with such a record has texts (a column ``text``), and neither questions with answers nor talks.

    Example:
        >>> is_text({"id": 1, "text": "Once."}), is_text({"text": "Who? Me.", "question": "Who?", "answer": "Me."})
        (True, False)
    """
    try:
        Columns().found(record)
    except UserError:
        return "text" in record
    return False


def read_examples(records: Iterable[Record], columns: Columns) -> Iterator[QAExample]:
    """The examples of a table's records; the columns are found on the first one, the same for all."""
    found = None
    for number, record in enumerate(records):
        found = found or columns.found(record)
        yield from found.examples(record, number)


def turns_of(cell: Any, number: int, name: str, argument: str) -> Turns:
    """A conversation in a record's cell, as ``(role, text)``.

    It is a list of ``{"role", "content"}`` (or ``{"from", "value"}``) with the roles system (developer), user (human)
    and assistant (gpt, model), or such a list written as JSON. A content may be a list of ``{"type": "text", "text"}``.

    Raises:
        UserError: Anything else; names record and column, never text.
    """
    said = from_json(cell)
    if isinstance(said, Mapping) and all(isinstance(texts, list) for texts in said.values()):
        # as some data sets of the hub keep lists of structs
        said = [dict(zip(said, turn, strict=True)) for turn in zip(*said.values(), strict=False)]
    if not (isinstance(said, Sequence) and said and all(isinstance(turn, Mapping) for turn in said)):
        given = Given(f"record {number} of {name!r}")
        raise UserError(argument, given, "a list of messages with role and content, or one written as JSON")
    return [_turn(turn, number, name, argument) for turn in said]


def _turn(turn: Mapping[str, Any], number: int, name: str, argument: str) -> tuple[str, str]:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in _ROLES:
        given = Given(f"another role in record {number} of {name!r}")
        raise UserError(argument, given, f"messages of these roles: {', '.join(_ROLES)}")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    return _ROLES[role], cell_text(content, number, name, argument)


def id_text(value: Any) -> str:
    """An id as text: without white space around it, a whole number without ``.0``; empty for a missing one."""
    if value is None or value != value:  # NaN is what pandas writes for a missing cell
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return " ".join(str(value).split())


def _by_folded(record: Record) -> dict[str, str]:
    return {_folded(name): name for name in map(str, reversed(record))}


def _folded(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _first(usual: Sequence[str], names: Mapping[str, str]) -> str | None:
    return next((names[_folded(name)] for name in usual if _folded(name) in names), None)
