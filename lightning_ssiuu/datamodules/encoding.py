"""From text to padded tensors: template, tokenisation, label masking and collation."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules.begun import Begun
from lightning_ssiuu.datamodules.chunks import Chunk
from lightning_ssiuu.datamodules.pairs import PREFIX, batch_of
from lightning_ssiuu.datamodules.splits import QAExample, Splits, first_few
from lightning_ssiuu.datamodules.spooled import kept
from lightning_ssiuu.datamodules.templates import DATE, PLAIN, Chat, History, Turn, check_chat_options, text_turn
from lightning_ssiuu.datamodules.tokenization import Joined, JointTokenizer, Piece, text_of
from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.utils.errors import Given, UserError

DEFAULT_MAX_LENGTH = 256
#: The multiple-choice prompt in FaithUn's manner (arXiv 2502.19207), in our own words: instruction, question, options.
INSTRUCTION = "Answer the question with one of the options.\nQuestion: {question}\nOptions:\n{options}\nAnswer:"
Key = tuple[str, int]

_UNLIMITED = 10**9  # transformers writes 1e30 where a tokenizer states no limit
_APART = "a token stands across prompt and answer; where it does, the two are tokenised apart"
_PROBE = "What is the capital of France?", "Paris"


@dataclass(frozen=True, repr=False)
class TokenSequence:
    """Token ids of prompt and answer; the first ``n_prompt`` carry no label.

    Of a passage of a document ``n_prefix`` stand before its continuation, and all tokens are trained on.
    """

    input_ids: list[int]
    n_prompt: int
    n_prefix: int | None = None

    @property
    def trained(self) -> TokenSequence:
        """As it is trained on. The first token of a passage has nothing before it to follow from."""
        return self if self.n_prefix is None else replace(self, n_prompt=1)

    @property
    def pair(self) -> tuple[list[int], list[int]]:
        return self.input_ids[: self.n_prompt], self.input_ids[self.n_prompt :]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, repr=False)
class Encoded:
    """A tokenised example; ``options`` are the true answer and then the distractors, ``choices`` the same after a
    prompt that lists them all (:meth:`Encoder.choices`); ``rephrased`` is the true answer in other words.
    """

    example_id: int
    sequence: TokenSequence
    options: tuple[TokenSequence, ...] = ()
    choices: tuple[TokenSequence, ...] = ()
    rephrased: TokenSequence | None = None


class Examples(Protocol):
    """Tokenised examples by number; a list, what :func:`~.spooled.kept` gives, a data set of torch."""

    def __getitem__(self, index: int, /) -> Encoded: ...
    def __len__(self) -> int: ...


class Encoder:
    """Turns question and answer into token ids under a template.

    What was said before the question (:attr:`QAExample.history`) is part of the prompt: under ``"chat"`` as earlier
    turns of the tokenizer's own template, else as :meth:`~.templates.Turn.repeated` has it.

    Prompt and completion are tokenised as the one text that they are (:class:`~.tokenization.JointTokenizer`), and the
    completion ends with a token: under ``"chat"`` the one that ends a turn in the tokenizer's own template
    (:meth:`~.templates.Chat.turn`), else the end-of-sequence token, or what stands after ``{answer}``. The names of
    special tokens in a question or answer are text. Answers are stripped of white space, questions and earlier turns
    where a chat template does so.

    The options are those of :class:`~.base.UnlearningDataModule`. Nothing but ``{question}``, ``{answer}`` and
    ``{options}`` is replaced in a template; the options become one line ``- option`` each. Under ``"chat"`` the
    question, or the filled ``choice_template``, is the user's turn.

    When it is made, an encoder tries itself out; one warning says what is not as it should be. Where a token stands
    across prompt and answer, the two are tokenised apart.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "plain",
        max_length: int | None = None,
        choice_template: str | None = None,
        system_prompt: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        date: str = DATE,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("tokenizer", type(tokenizer).__name__, "a tokenizer with an end-of-sequence token")
        if template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise UserError("template", template, "plain or a format string: this tokenizer has no chat template")
        if template not in ("plain", "chat") and "{question}" not in template:
            raise UserError("template", template, 'plain, chat or a text that contains "{question}"')
        if template.partition("{answer}")[2].count("{question}") + template.count("{answer}") > 1:
            raise UserError("template", template, '"{answer}" once, after "{question}"')
        check_chat_options(template, system_prompt, template_options, date)
        if choice_template == "instruction":
            choice_template = INSTRUCTION
        if choice_template is not None and not all(part in choice_template for part in ("{question}", "{options}")):
            allowed = 'null, instruction or a text that contains "{question}" and "{options}"'
            raise UserError("choice_template", choice_template, allowed)
        longest = getattr(tokenizer, "model_max_length", None) or _UNLIMITED
        max_length = min(DEFAULT_MAX_LENGTH, longest) if max_length is None else max_length
        if not 2 <= max_length <= longest:
            allowed = f"2 to {longest}, what the tokenizer's model takes" if longest < _UNLIMITED else "at least 2"
            raise UserError("max_length", max_length, allowed)
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.choice_template, self.system_prompt = choice_template, system_prompt
        self.template_options, self.date = dict(template_options or {}), date
        self._joint, self._warned = JointTokenizer(tokenizer), False
        self._chat = Chat(tokenizer, system_prompt, self.template_options, date) if template == "chat" else None
        self._turn = self._chat.turn() if self._chat else text_turn(PLAIN if template == "plain" else template)
        self._turns: dict[tuple[str, ...], Turn] = {(): self._turn}  # by the roles of earlier turns
        self._try_out()

    @property
    def pad_token_id(self) -> int:
        """Token that fills up short rows; masked everywhere, so EOS serves when there is no padding token."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    @property
    def rendering(self) -> dict[str, Any]:
        """The options that, with the tokenizer, determine how an example is rendered."""
        names = ("template", "choice_template", "system_prompt", "template_options", "date")
        return {name: getattr(self, name) for name in names}

    def sequence(self, question: str, answer: str, history: History = ()) -> TokenSequence:
        return self._answered(self._prompt(question, history), [answer], history)[0]

    def of(self, example: QAExample, wrong: Sequence[str] = ()) -> tuple[TokenSequence, ...]:
        """The example's sequence, then one for each of the ``wrong`` answers; a :class:`~.chunks.Chunk` has none."""
        if isinstance(example, Chunk):
            ids = [*self._first, *example.tokens]
            n_prefix = len(ids) - len(example.tokens) + example.n_prefix
            return (TokenSequence(ids, n_prefix, n_prefix),)
        prompt, answers = self._prompt(example.question, example.history), [example.answer, *wrong]
        if not isinstance(example, Begun):
            return self._answered(prompt, answers, example.history)
        begun = self._answered(prompt, answers, example.history, example.words)
        return tuple(replace(one, n_prompt=one.n_prompt + example.n_given) for one in begun)

    def _around(self, history: History) -> Turn:
        # The turn that a question is in: under a text template the same, whatever was said before.
        if self._chat is None:
            return self._turn
        roles = tuple(role for role, _ in history)
        if roles not in self._turns:
            self._turns[roles] = self._chat.turn(roles)
        return self._turns[roles]

    def _prompt(self, question: str, history: History = ()) -> list[Piece]:
        if self._chat is None:
            return [*self._turn.repeated(history), *self._turn.prompt([question])]
        return self._around(history).prompt([*(text for _, text in history), question])

    def _answered(
        self, prompt: Sequence[Piece], answers: Sequence[str], history: History = (), words: str = ""
    ) -> tuple[TokenSequence, ...]:
        sequences, turn = [], self._around(history)
        if words:  # of the answer's turn, which the answer goes on with
            prompt = [*prompt, *turn.completion(prompt, words)[:-1]]
            turn = replace(turn, lead=" ")
        for answer in answers:
            joined = self._joint(prompt, turn.completion(prompt, answer))
            if not (joined.clean or self._warned):
                self._warn(_APART)
            start, end = self._bos(joined), [] if turn.closed else [self.tokenizer.eos_token_id]
            ids = [*start, *joined.prompt, *joined.completion, *end]
            sequences.append(TokenSequence(ids, len(start) + len(joined.prompt)))
        return tuple(sequences)

    def _bos(self, joined: Joined) -> list[int]:
        # A chat template writes it itself.
        start = self._first if self._chat is None else []
        return start if joined.prompt[:1] != start else []

    @cached_property
    def _first(self) -> list[int]:
        # BOS where the tokenizer adds it by itself. Not what else it adds: some append an end token, here in
        # mid-sequence.
        bos = self.tokenizer.bos_token_id
        return [bos] if list(self.tokenizer(_PROBE[0])["input_ids"])[:1] == [bos] else []

    @property
    def _name(self) -> str:
        return self.template if self.template in ("plain", "chat") else "of one's own"

    def _try_out(self) -> None:
        # Does the tokenizer's own way give these ids, and do they give the text back?
        prompt = self._prompt(_PROBE[0])
        completion = self._turn.completion(prompt, _PROBE[1])
        joined, text = self._joint(prompt, completion), text_of([*prompt, *completion])
        rendered = text if self._chat is None else self._chat.render(*_PROBE)
        ours, whole = (
            [*joined.prompt, *joined.completion],
            self.tokenizer(rendered, add_special_tokens=False)["input_ids"],
        )
        rows = getattr(self.tokenizer, "embedding_rows", None)
        if rows is not None and max(ours) >= rows:  # texts themselves hold no special tokens
            given = Given(f"{self._name} with {self.tokenizer.convert_ids_to_tokens(max(ours))}")
            raise UserError("template", given, f"one whose tokens the model has embeddings of ({rows})")
        answer, back = (
            str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in (joined[1], ours)
        )
        if self._turn.remark:
            self._warn(self._turn.remark)
        elif not joined.clean:
            self._warn(_APART)
        elif not rendered.startswith(text) or list(whole[: len(ours)]) != ours:
            self._warn("the token ids are not those of what it renders; every text is rendered as a plain word is")
        elif _squashed(text) not in _squashed(back) or _PROBE[1] not in answer:
            self._warn("the tokenizer does not give back the text that it is given; answers are compared as given back")

    def _warn(self, reason: str) -> None:
        self._warned = True
        rank_zero_warn(f"template {self._name}, tokenizer {type(self.tokenizer).__name__}: {reason}.")

    def choices(self, example: QAExample) -> tuple[TokenSequence, ...]:
        """Every option as the answer to a prompt that lists them all, the true answer's sequence first.

        The order in the prompt is a random one that depends on the example's id alone: the same for every model and
        run, and no place is right more often than another.
        """
        options = [example.answer.strip(), *(option.strip() for option in example.distractors)]
        listed = options.copy()
        random.Random(f"choices {example.example_id}").shuffle(listed)
        template = INSTRUCTION if self.choice_template is None else self.choice_template
        # In one pass: the question's own text may hold "{options}", and an option "{question}"
        filled = {"{question}": example.question, "{options}": "\n".join(f"- {option}" for option in listed)}
        parts = re.split(r"(\{question\}|\{options\})", template)
        pieces = [Piece(filled.get(part, part), own=part in filled) for part in parts]
        history = example.history
        if self._chat is None:
            return self._answered([*self._turn.repeated(history), *pieces], options)
        return self._answered(self._prompt(text_of(pieces), history), options, history)

    def encode(self, examples: Sequence[QAExample], options: bool = False) -> Sequence[Encoded]:
        """Tokenise examples, with ``options`` if asked for and choices if there is a ``choice_template``.

        Both only if *every* example has distractors; with the options go answers in other words if every example has
        one. What is longer than ``max_length`` is an error. Many examples are
        kept as :func:`~.spooled.kept` does.
        """
        have_options = bool(examples) and all(example.distractors for example in examples)
        options, choices = options and have_options, self.choice_template is not None and have_options
        long: list[tuple[str, int]] = []
        encoded = kept(self._encoded(examples, options, choices, long))
        if long:
            shown = first_few([f"{name} ({length})" for name, length in long])
            longest = max(length for _, length in long)
            allowed = f"at least {longest}, or shorter answers: too long with prompt and end token are "
            raise UserError("max_length", self.max_length, f"{allowed}example ids (tokens) {shown}")
        return encoded

    def _encoded(
        self, examples: Sequence[QAExample], options: bool, choices: bool, long: list[tuple[str, int]]
    ) -> Iterator[Encoded]:
        # One by one; those too long are noted with their lengths.
        rephrased = options and all(example.rephrased for example in examples)
        for example in examples:
            wrong = example.distractors if options or choices else ()
            if example.answer.strip() in (option.strip() for option in wrong):
                given = Given(f"the true answer among those of example id {example.name}")
                raise UserError("distractors", given, "wrong answers only")
            sequences = self.of(example, [*(wrong if options else ()), *([example.rephrased] if rephrased else [])])
            listed = self.choices(example) if choices else ()
            if (length := max(map(len, (*sequences, *listed)))) > self.max_length:
                long.append((example.name, length))
            offered = sequences[: len(sequences) - rephrased] if options else ()
            yield Encoded(example.example_id, sequences[0], offered, listed, sequences[-1] if rephrased else None)

    def sha256(self, splits: Splits, encoded: Mapping[str, Iterable[Encoded]]) -> str:
        """Hex digest of sets: of each example's token ids, and of its distractors and other wordings as text.

        ``encoded`` are the examples of the sets that are tokenised already.
        """
        digest = hashlib.sha256()
        for name, examples in splits.items():
            digest.update(name.encode())
            known = (each.sequence for each in encoded[name]) if name in encoded else None
            for example in examples:
                ids = (self.of(example)[0] if known is None else next(known)).pair
                # As text, for a benchmark has many of them, and they are rendered as the example is.
                others = [
                    [option.strip() for option in example.distractors],
                    list(example.paraphrases),
                    *([example.rephrased] if example.rephrased else []),
                ]
                digest.update(repr((example.example_id, ids, *others)).encode())
        return digest.hexdigest()

    @property
    def longest_chunk(self) -> int:
        """Tokens of a document that fit into ``max_length``."""
        return self.max_length - len(self._first)

    def fits(self, example: QAExample) -> bool:
        return len(self.of(example)[0]) <= self.max_length


class EncodedDataset(Dataset[tuple[str, Encoded]]):
    """Tokenised examples of each part under the keys ``(part, index)`` that the samplers yield.

    ``~index`` instead of ``index`` yields the example with its answer for prompt, so that no token has a label. Without
    ``options``, to train on, examples come with neither options nor choices, and passages with labels on all tokens.
    """

    def __init__(self, parts: Mapping[str, Examples], options: bool = True) -> None:
        self.parts, self.options = parts, options

    def __getitem__(self, key: Key) -> tuple[str, Encoded]:
        part, index = key
        example = self.parts[part][index if index >= 0 else ~index]
        if not self.options:
            example = replace(example, sequence=example.sequence.trained, options=(), choices=(), rephrased=None)
        if index < 0:
            example = replace(example, sequence=replace(example.sequence, n_prompt=len(example.sequence)))
        return part, example

    def in_order(self, name: str, batch_size: int, collate: Callable[..., dict[str, Part]]) -> Iterator[Part]:
        """All examples of a part, in their order, ``batch_size`` at a time; none where there is no such part."""
        numbers = range(len(self.parts.get(name, ())))
        for start in numbers[::batch_size]:
            yield collate([self[name, index] for index in numbers[start : start + batch_size]])[name]

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))


class Collator:
    """From ``(part, encoded)`` pairs to a batch ``{part: tensors}``, padded right to the longest of each part.

    A part has ``input_ids``, ``attention_mask`` and ``labels``, LongTensor ``[B, L]``, and ``example_id`` ``[B]``. If
    all examples have options, also ``options``: ``input_ids``, ``attention_mask`` and ``labels`` ``[B*K, L']`` and
    ``option_of`` ``[B*K]``, the row each option belongs to; the options of a row lie next to each other, the true
    answer first. ``choices`` likewise, and ``rephrased`` ``[B, L'']``, the true answers in other words. If all are
    passages of documents, also ``prefix`` ``[B]``: how many tokens stand before the continuation.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[tuple[str, Encoded]]) -> dict[str, Part]:
        grouped: dict[str, list[Encoded]] = {}
        for part, encoded in samples:
            grouped.setdefault(part, []).append(encoded)
        return {part: self._part(encoded) for part, encoded in grouped.items()}

    def _part(self, encoded: list[Encoded]) -> Part:
        part: dict[str, Any] = self._pad([e.sequence for e in encoded])
        part["example_id"] = torch.tensor([e.example_id for e in encoded])
        before = [e.sequence.n_prefix for e in encoded]
        if None not in before:
            part[PREFIX] = torch.tensor(before)
        rephrased = [e.rephrased for e in encoded if e.rephrased is not None]
        if len(rephrased) == len(encoded):
            part["rephrased"] = self._pad(rephrased)
        for name in ("options", "choices"):
            of_each: list[tuple[TokenSequence, ...]] = [getattr(e, name) for e in encoded]
            if all(of_each):
                part[name] = self._pad([option for options in of_each for option in options])
                part[name]["option_of"] = torch.tensor([row for row, options in enumerate(of_each) for _ in options])
        return part

    def _pad(self, sequences: list[TokenSequence]) -> dict[str, Tensor]:
        return batch_of([sequence.pair for sequence in sequences], self.pad_token_id)


def _squashed(text: str) -> str:
    return "".join(text.split())
