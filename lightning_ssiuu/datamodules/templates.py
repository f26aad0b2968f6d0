"""What stands around question and answer: a text with a place for the question, or the tokenizer's chat template."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date as Date
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules.tokenization import JointTokenizer, Piece, text_of
from lightning_ssiuu.utils.errors import UserError, one_line

#: What was said before a question, as ``(role, text)``.
History = Sequence[tuple[str, str]]
#: The day that chat templates take for today's unless told otherwise, Llama 3's own.
DATE = "2024-07-26"
PLAIN = "Question: {question}\nAnswer:"
_PLACE = "{question}"
_ANSWER_PLACE = "{answer}"
# Letters alone, which pass through whatever a template does to text.
_QUESTION, _ANSWER, _EARLIER = "ssiuuQuestion", "ssiuuAnswer", "ssiuuTurn"
_BLANK_LINE = "\n\n"
_CLOCK = "strftime_now"
# A macro goes before the library's function of the same name; functions that are handed over do not reach a template.
_STOPPED_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set told = namespace(text=format) -%}"
    "{%- for directive, value in stopped_clock.items() -%}"
    "{%- set told.text = told.text.replace(directive, value) -%}{%- endfor -%}"
    "{{- told.text -}}{%- endmacro %}\n"
)
_DIRECTIVE = re.compile("%-?[aAbBcdDeFGHIjmMpSTuUVwWxXyYzZ]")
_OURS = ("messages", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template", "stopped_clock")


@dataclass(frozen=True)
class Turn:
    """What stands around a question, the turns before it and its answer.

    Attributes:
        parts: The prompt's text, cut where the question and earlier turns stand.
        places: What stands at each cut: the number of an earlier turn, or how many there are for the question.
        lead: What stands between prompt and answer; None: a space, unless the prompt ends with white space.
        tail: What follows the answer, up to the token that ends the turn.
        closed: Whether that token is there; the tokenizer's end-of-sequence token has to follow otherwise.
        trimmed: The numbers of those that the template leaves out white space before, and of those after.
        remark: What is not as expected of it, for a warning; else empty.
    """

    parts: tuple[str, ...]
    places: tuple[int, ...]
    lead: str | None = None
    tail: str = ""
    closed: bool = False
    trimmed: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
    remark: str = ""

    def prompt(self, texts: Sequence[str]) -> list[Piece]:
        """The prompt with the earlier turns and the question, in this order, at their places."""
        pieces = [Piece(self.parts[0])]
        for place, part in zip(self.places, self.parts[1:], strict=True):
            text = texts[place].lstrip() if place in self.trimmed[0] else texts[place]
            text = text.rstrip() if place in self.trimmed[1] else text
            pieces += [Piece(text, own=True), Piece(part)]
        return pieces

    def completion(self, prompt: Sequence[Piece], answer: str) -> list[Piece]:
        """What follows a prompt, up to the token that ends the turn."""
        return [Piece(_lead(prompt) if self.lead is None else self.lead), Piece(answer.strip(), True), Piece(self.tail)]

    def repeated(self, history: History) -> list[Piece]:
        r"""Earlier turns as a text template has them: question by question with its answer, a blank line after each.

        A system turn is its text alone.

        Example:
            >>> said = [("system", "Be brief."), ("user", "Who?"), ("assistant", "Me.")]
            >>> "".join(piece.text for piece in text_turn(PLAIN).repeated(said))
            'Be brief.\n\nQuestion: Who?\nAnswer: Me.\n\n'
        """
        pieces: list[Piece] = []
        before = ""
        for role, text in history:
            if role == "assistant" and before == "user":
                pieces.append(Piece(_lead(pieces)))
            elif pieces:
                pieces.append(Piece(_BLANK_LINE))
            pieces += self.prompt([text]) if role == "user" else [Piece(text.strip(), own=True)]
            before = role
        return [*pieces, Piece(_BLANK_LINE)] if pieces else []


def _lead(prompt: Sequence[Piece]) -> str:
    # What is between a prompt and its answer under a text template.
    return "" if text_of(prompt)[-1:].isspace() else " "


def text_turn(template: str) -> Turn:
    r"""The turn of a text that contains ``{question}``, and ``{answer}`` where no end token follows.

    Example:
        >>> text_turn("Q: {question}\nA: {answer}\n").tail, text_turn("Q: {question}\nA:").closed
        ('\n', False)
    """
    before, closed, tail = template.partition(_ANSWER_PLACE)
    parts = tuple((before.rstrip() if closed else before).split(_PLACE))
    lead = before[len(before.rstrip()) :] if closed else None
    return Turn(parts, (0,) * (len(parts) - 1), lead, tail, bool(closed))


@dataclass(frozen=True)
class Chat:
    """How a tokenizer's own chat template is to be used; the options are those of :class:`~.encoding.Encoder`."""

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    date: str = DATE

    def render(self, question: str, answer: str | None = None, history: History = (), **options: Any) -> Any:
        """The text of a conversation: the question and how an answer begins, or question and answer.

        ``history`` is what was said before (:attr:`QAExample.history`); a system turn of its own is instead of the
        ``system_prompt``. ``options`` are those of ``apply_chat_template``, which may make it give something else than
        text.
        """
        said = [*history, ("user", question)]
        if answer is not None:
            said.append(("assistant", answer))
        if self.system_prompt is not None and said[0][0] != "system":
            said.insert(0, ("system", self.system_prompt))
        turns = [{"role": role, "content": text} for role, text in said]
        options = {"tokenize": False, "add_generation_prompt": answer is None} | options
        return self.tokenizer.apply_chat_template(turns, chat_template=self.template, **options)

    @property
    def template(self) -> str:
        """The chat template with its variables and the date written into it, which says the same on every day."""
        template = self.tokenizer.get_chat_template()
        day = Date.fromisoformat(self.date)
        variables: dict[str, Any] = {"date_string": day.strftime("%d %b %Y"), **self.template_options}
        clock = ""
        if _CLOCK in template:
            variables["stopped_clock"] = {each: day.strftime(each) for each in _DIRECTIVE.findall(template)}
            clock = _STOPPED_CLOCK
        return "".join(f"{{%- set {name} = {value!r} %}}\n" for name, value in variables.items()) + clock + template

    def dated(self) -> PreTrainedTokenizerBase:
        """The tokenizer with that template for its own, for libraries that render chats themselves."""
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = self.template
        return tokenizer

    def turn(self, roles: tuple[str, ...] = ()) -> Turn:
        """What the template makes of question and answer after turns of these roles, told from how it renders them.

        The prompt is all that stands before the answer, such as Qwen3's empty block of thoughts, less the white space
        that the generation prompt leaves to the model. The completion is the answer, with that white space, up to
        the token that ends the turn: the first one after it that was added to the vocabulary. What a template writes
        after that token no model has to say. Where a template marks what the model generates (``{% generation %}``),
        the completion does not begin before that, and ends with it where no token ends the turn.

        Where the generation prompt is not how an answered turn begins, ``remark`` says which of the two is used.

        Raises:
            UserError: A template that fails, or that does not write question, answer and earlier turns once each as
                they are.
        """
        names = [*(_EARLIER + _letters(number) for number in range(len(roles))), _QUESTION]
        history = list(zip(roles, names[:-1], strict=True))
        prompt, whole = self._rendered(_QUESTION, None, history), self._rendered(_QUESTION, _ANSWER, history)
        if any(whole.count(name) != 1 for name in (*names, _ANSWER)) or not max(map(whole.index, names)) < whole.index(
            _ANSWER
        ):
            turns = f" after turns of {', '.join(roles)}" if roles else ""
            allowed = "plain or a format string: this chat template does not write question and answer once each"
            raise UserError("template", "chat", allowed + turns)
        start = whole.index(_ANSWER)
        stop = start + len(_ANSWER)
        head, remark = whole[:start], ""
        boundary = len(head.rstrip(" "))
        if head.startswith(prompt):
            if not head[len(prompt) :].strip():
                boundary = len(prompt)
        elif prompt.startswith(head):
            remark = "its generation prompt holds more than an answered turn (thoughts); the answer stands without that"
        else:
            remark = "its generation prompt is not how it begins an answered turn; the answer follows the former"
            head, boundary = prompt, len(prompt)
        marked = self._marked(whole, history)
        if marked is not None and boundary < marked[0] <= len(head):
            boundary = marked[0]
        end = JointTokenizer(self.tokenizer).added.search(whole, stop)
        if end is None:
            tail = whole[stop : max(stop, marked[1])] if marked is not None else whole[stop:].rstrip()
        else:
            tail = whole[stop : end.end()]
        parts = re.split(f"({'|'.join(names)})", head[:boundary])
        return Turn(
            parts=tuple(parts[::2]),
            places=tuple(map(names.index, parts[1::2])),
            lead=head[boundary:],
            tail=tail,
            closed=end is not None,
            trimmed=(self._trimmed(" {}", names, roles, prompt), self._trimmed("{} ", names, roles, prompt)),
            remark=remark,
        )

    def _trimmed(self, form: str, names: Sequence[str], roles: Sequence[str], prompt: str) -> frozenset[int]:
        # Those whose white space does not reach the prompt.
        places = set()
        for place, name in enumerate(names):
            texts = [*names[:place], form.format(name), *names[place + 1 :]]
            if self._rendered(texts[-1], None, list(zip(roles, texts[:-1], strict=True))) == prompt:
                places.add(place)
        return frozenset(places)

    def _rendered(self, question: str, answer: str | None, history: History) -> str:
        try:
            return str(self.render(question, answer, history))
        except Exception as error:  # a template is a program of its own
            said = one_line(str(error))[:200] or type(error).__name__
            argument, value = "template", "chat"
            allowed = "plain or a format string"
            if history and _works(self):
                allowed += f" for data with turns of {', '.join(role for role, _ in history)} before the question"
            elif self.system_prompt is not None and _works(
                Chat(self.tokenizer, None, self.template_options, self.date)
            ):
                argument, value, allowed = "system_prompt", "a text", "null"
            elif self.template_options:
                argument, value = "template_options", ", ".join(self.template_options)
                allowed = "variables that the chat template takes"
            raise UserError(argument, value, f"{allowed}; the chat template said: {said}") from error

    def _marked(self, whole: str, history: History) -> tuple[int, int] | None:
        # First and last character of what the template says the model generates after the question.
        template = self.tokenizer.get_chat_template()
        if not self.tokenizer.is_fast or not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return None
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = self.render(_QUESTION, _ANSWER, history, **options)
        spans = [encoded.token_to_chars(place) for place, mask in enumerate(encoded["assistant_masks"]) if mask]
        asked = max(whole.index(name) for name in (_QUESTION, *(name for _, name in history)))
        spans = [span for span in spans if span is not None and span.start > asked]
        return (spans[0].start, spans[-1].end) if spans else None


def _letters(number: int) -> str:
    # Of equal length, so that no name is the beginning of another one.
    return "".join(chr(ord("a") + int(digit)) for digit in f"{number:06d}")


def _works(chat: Chat) -> bool:
    try:
        chat.render(_QUESTION, _ANSWER)
    except Exception:
        return False
    return True


def check_chat_options(template: str, system_prompt: str | None, options: Mapping[str, Any] | None, date: str) -> None:
    """Check the options that only a chat template takes, before a tokenizer is loaded.

    Raises:
        UserError: A system prompt or variables without a chat template, variables that the package sets itself, or a
            date that is none.
    """
    for name, value in (("system_prompt", system_prompt), ("template_options", options)):
        if value and template != "chat":
            raise UserError(name, value, "null, or --data.init_args.template chat")
    if options is not None and not isinstance(options, Mapping):
        raise UserError("template_options", options, "null, or variables of the chat template by name")
    for name in options or {}:
        if name in _OURS:
            raise UserError("template_options", name, "other variables: this one is set by the package")
        if not (isinstance(name, str) and name.isidentifier()):
            raise UserError("template_options", name, "names of variables")
    try:
        Date.fromisoformat(date)
    except (TypeError, ValueError):
        raise UserError("date", date, "a day as YYYY-MM-DD") from None
