"""From text to padded tensors: template, tokenisation, label masking and collation."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules.splits import QAExample
from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.utils.errors import Given, UserError

IGNORE = -100
DEFAULT_MAX_LENGTH = 256
PLAIN = "Question: {question}\nAnswer:"
#: The multiple-choice prompt in FaithUn's manner (arXiv 2502.19207), in our own words: instruction, question, options.
INSTRUCTION = "Answer the question with one of the options.\nQuestion: {question}\nOptions:\n{options}\nAnswer:"
Key = tuple[str, int]

# transformers writes 1e30 where a tokenizer states no limit
_SANE_MAX_LENGTH = 10**9


@dataclass(frozen=True, repr=False)
class TokenSequence:
    """Token ids of prompt and answer; the first ``n_prompt`` carry no label."""

    input_ids: list[int]
    n_prompt: int

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, repr=False)
class Encoded:
    """A tokenised example; ``options`` are the true answer and then the distractors, if wanted.

    ``choices`` are the same after a prompt that lists them all (:meth:`Encoder.choices`).
    """

    example_id: int
    sequence: TokenSequence
    options: tuple[TokenSequence, ...] = ()
    choices: tuple[TokenSequence, ...] = ()

    def unanswered(self) -> Encoded:
        """The same with the answer as prompt, so that no token has a label."""
        return replace(self, sequence=replace(self.sequence, n_prompt=len(self.sequence)))


class Encoder:
    r"""Turns question and answer into token ids under a template.

    Prompt and completion are tokenised apart and joined, so the boundary between masked and labelled tokens never
    falls inside a token. The completion ends with the end-of-sequence token.

    Args:
        tokenizer: Needs ``eos_token_id``; pads with ``pad_token_id``, or with EOS when there is none.
        template: ``"plain"`` (``"Question: {question}\nAnswer:"``), ``"chat"`` (the tokenizer's own chat template,
            question as the user's turn) or any text that contains ``{question}``. Nothing else in it is replaced.
        max_length: Longest prompt + answer, in tokens; None: 256, or the tokenizer's limit where that is shorter.
        choice_template: Also encode multiple-choice prompts where examples have distractors: ``"instruction"``
            (:data:`INSTRUCTION`) or any text that contains ``{question}`` and ``{options}``, which becomes one line
            ``- option`` each. Under the template ``"chat"`` it is the user's turn.

    Raises:
        UserError: Unknown template, ``"chat"`` without a chat template, a tokenizer without EOS, or ``max_length``
            beyond what the tokenizer's model takes.

    Example:
        >>> from lightning_ssiuu.models.loading import load_tokenizer
        >>> encoder = Encoder(load_tokenizer("tiny"))
        >>> sequence = encoder.sequence("Who?", "Me")
        >>> encoder.tokenizer.decode(sequence.input_ids[: sequence.n_prompt])
        'Question: Who?\nAnswer:'
        >>> encoder.tokenizer.decode(sequence.input_ids[sequence.n_prompt : -1])
        ' Me'
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "plain",
        max_length: int | None = None,
        choice_template: str | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("tokenizer", type(tokenizer).__name__, "a tokenizer with an end-of-sequence token")
        if template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise UserError("template", template, "plain or a format string: this tokenizer has no chat template")
        if template not in ("plain", "chat") and "{question}" not in template:
            raise UserError("template", template, 'plain, chat or a text that contains "{question}"')
        if choice_template == "instruction":
            choice_template = INSTRUCTION
        if choice_template is not None and not all(part in choice_template for part in ("{question}", "{options}")):
            allowed = 'null, instruction or a text that contains "{question}" and "{options}"'
            raise UserError("choice_template", choice_template, allowed)
        limit = getattr(tokenizer, "model_max_length", None)
        longest = limit if limit is not None and limit < _SANE_MAX_LENGTH else None
        if max_length is None:
            max_length = min(DEFAULT_MAX_LENGTH, longest or DEFAULT_MAX_LENGTH)
        if max_length < 2 or (longest is not None and max_length > longest):
            allowed = "at least 2" if longest is None else f"2 to {longest}, what the tokenizer's model takes"
            raise UserError("max_length", max_length, allowed)
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.choice_template = choice_template

    @property
    def pad_token_id(self) -> int:
        """Token that fills up short rows; masked everywhere, so EOS serves when there is no padding token."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _tokens(self, text: str) -> list[int]:
        # verbose=False: lengths are checked here, with an error instead of a warning
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def prompt(self, question: str) -> list[int]:
        """Token ids up to where the answer begins; BOS first only where the tokenizer adds one by itself."""
        return self._prompt(question if self.template == "chat" else self._prompt_text(question))

    def _prompt(self, text: str) -> list[int]:
        if self.template == "chat":
            turns = [{"role": "user", "content": text}]
            # return_dict: transformers 5 hands back a BatchEncoding otherwise
            options = {"return_dict": False, "tokenizer_kwargs": {"verbose": False}}
            return list(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options))
        ids, bos = self._tokens(text), self.tokenizer.bos_token_id
        # Not the ids with special tokens themselves: some tokenizers also append an end token, here in mid-sequence.
        added = (
            bos is not None and list(self.tokenizer(text, verbose=False)["input_ids"])[:1] == [bos] and ids[:1] != [bos]
        )
        return [bos, *ids] if added else ids

    def _prompt_text(self, question: str) -> str:
        # str.format would trip over other braces, and would let a template read attributes
        return (PLAIN if self.template == "plain" else self.template).replace("{question}", question)

    def completion(self, answer: str, prompt_ends_in_space: bool = False) -> list[int]:
        """Token ids of the answer and EOS."""
        glue = "" if self.template == "chat" or prompt_ends_in_space else " "
        return [*self._tokens(glue + answer), self.tokenizer.eos_token_id]

    def sequence(self, question: str, answer: str) -> TokenSequence:
        return self._answered(self.prompt(question), self._prompt_text(question), [answer])[0]

    def _answered(self, prompt: list[int], text: str, answers: Sequence[str]) -> tuple[TokenSequence, ...]:
        spaced = self.template != "chat" and text[-1:].isspace()
        return tuple(TokenSequence(prompt + self.completion(answer, spaced), len(prompt)) for answer in answers)

    def choices(self, example: QAExample) -> tuple[TokenSequence, ...]:
        r"""Every option as the answer to a prompt that lists them all, the true answer's sequence first.

        The order in the prompt is a random one that depends on the example's id alone: the same for every model and
        run, and no place is right more often than another.

        Example:
            >>> from lightning_ssiuu.models.loading import load_tokenizer
            >>> encoder = Encoder(load_tokenizer("tiny"), choice_template="{question}\n{options}\nThe answer:")
            >>> true, _, _ = encoder.choices(QAExample(7, "Which day?", "Monday", ("Friday", "Sunday")))
            >>> print(encoder.tokenizer.decode(true.input_ids, skip_special_tokens=True))
            Which day?
            - Friday
            - Sunday
            - Monday
            The answer: Monday
        """
        options = [example.answer, *example.distractors]
        listed = options.copy()
        random.Random(f"choices {example.example_id}").shuffle(listed)
        template = INSTRUCTION if self.choice_template is None else self.choice_template
        # In one pass: the question's own text may hold "{options}", and an option "{question}"
        filled = {"{question}": example.question, "{options}": "\n".join(f"- {option}" for option in listed)}
        text = re.sub(r"\{question\}|\{options\}", lambda found: filled[found[0]], template)
        return self._answered(self._prompt(text), text, options)

    def encode(self, examples: Sequence[QAExample], options: bool = False) -> list[Encoded]:
        """Tokenise examples.

        Args:
            examples: What to encode.
            options: Also encode the answer and every distractor as options, if *every* example has distractors;
                choices, if there is a ``choice_template``, under the same condition.

        Raises:
            UserError: Sequences longer than ``max_length`` (ids and lengths are named, nothing is cut off), or a
                distractor that equals the answer.
        """
        have_options = bool(examples) and all(example.distractors for example in examples)
        options, choices = options and have_options, self.choice_template is not None and have_options
        encoded = []
        for example in examples:
            wrong = example.distractors if options or choices else ()
            if example.answer.strip() in (option.strip() for option in wrong):
                given = Given(f"the true answer among those of example id {example.example_id}")
                raise UserError("distractors", given, "wrong answers only")
            answers = (example.answer, *wrong) if options else (example.answer,)
            sequences = self._answered(self.prompt(example.question), self._prompt_text(example.question), answers)
            encoded.append(
                Encoded(
                    example.example_id,
                    sequences[0],
                    sequences if options else (),
                    self.choices(example) if choices else (),
                )
            )
        self._check_lengths(encoded)
        return encoded

    def fits(self, example: QAExample) -> bool:
        return len(self.sequence(example.question, example.answer)) <= self.max_length

    def _check_lengths(self, encoded: list[Encoded]) -> None:
        lengths = {e.example_id: max(map(len, (e.sequence, *e.options, *e.choices))) for e in encoded}
        long = {example_id: length for example_id, length in lengths.items() if length > self.max_length}
        if long:
            shown = ", ".join(f"{example_id} ({length})" for example_id, length in list(long.items())[:5])
            more = f" and {len(long) - 5} more" if len(long) > 5 else ""
            raise UserError(
                "max_length",
                self.max_length,
                f"at least {max(long.values())}, or shorter answers: too long with prompt and end token are "
                f"example ids (tokens) {shown}{more}",
            )


class EncodedDataset(Dataset[tuple[str, Encoded]]):
    """Tokenised examples under the keys ``(part, index)`` that the samplers of this package yield.

    ``~index`` instead of ``index`` yields the example with its answer for prompt, so that no token has a label.

    Args:
        parts: Examples of each part, e.g. ``{"forget": [...], "retain": [...]}``.
    """

    def __init__(self, parts: dict[str, list[Encoded]]) -> None:
        self.parts = parts

    def __getitem__(self, key: Key) -> tuple[str, Encoded]:
        part, index = key
        return part, self.parts[part][index] if index >= 0 else self.parts[part][~index].unanswered()

    def in_order(self, name: str, batch_size: int, collate: Callable[..., dict[str, Part]]) -> Iterator[Part]:
        """All examples of a part, in their order, ``batch_size`` at a time; none where there is no such part."""
        numbers = range(len(self.parts.get(name, ())))
        for start in numbers[::batch_size]:
            yield collate([self[name, index] for index in numbers[start : start + batch_size]])[name]

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def __repr__(self) -> str:
        return "EncodedDataset(" + ", ".join(f"{name}={len(part)}" for name, part in self.parts.items()) + ")"


class Collator:
    """Pads encoded examples, right, to the longest of each part of the batch.

    Args:
        pad_token_id: Fills ``input_ids``; ``attention_mask`` is 0 and ``labels`` −100 there.

    Called with ``(part, encoded)`` pairs it returns a batch ``{part: tensors}`` with ``input_ids``, ``attention_mask``
    and ``labels``, LongTensor ``[B, L]``, and ``example_id`` ``[B]``. Where all examples carry options, a part also has
    ``options``: ``input_ids``, ``attention_mask`` and ``labels`` ``[B*K, L']`` and ``option_of`` ``[B*K]``, the row
    each option belongs to; the options of a row lie next to each other, the true answer first. ``choices`` likewise.
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
        for name in ("options", "choices"):
            of_each: list[tuple[TokenSequence, ...]] = [getattr(e, name) for e in encoded]
            if all(of_each):
                part[name] = self._pad([option for options in of_each for option in options])
                part[name]["option_of"] = torch.tensor([row for row, options in enumerate(of_each) for _ in options])
        return part

    def _pad(self, sequences: list[TokenSequence]) -> dict[str, Tensor]:
        return batch_of([(s.input_ids[: s.n_prompt], s.input_ids[s.n_prompt :]) for s in sequences], self.pad_token_id)


def batch_of(pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """Rows of token ids, padded right, with labels on the answers alone; the inverse of :func:`answered`.

    Args:
        pairs: Token ids of each prompt and of its answer.
        pad: Fills ``input_ids``; ``attention_mask`` is 0 and ``labels`` −100 there.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, LongTensor ``[B, L]`` on the CPU.

    Example:
        >>> batch_of([([5, 6], [9]), ([5], [7])], pad=0)["labels"].tolist()
        [[-100, -100, 9], [-100, 7, -100]]
    """
    shape = len(pairs), max(len(prompt) + len(answer) for prompt, answer in pairs)
    input_ids = torch.full(shape, pad)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE)
    for row, (prompt, answer) in enumerate(pairs):
        length = len(prompt) + len(answer)
        input_ids[row, :length] = torch.tensor(prompt + answer, dtype=torch.long)
        attention_mask[row, :length] = 1
        labels[row, len(prompt) : length] = torch.tensor(answer, dtype=torch.long)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def answered(part: Part) -> list[tuple[list[int], list[int]]]:
    """Token ids of the prompt and of the answer of every row of a part; no answer where nothing is labelled.

    Example:
        >>> answered(batch_of([([5, 6], [9]), ([5, 8], [])], pad=0))
        [([5, 6], [9]), ([5, 8], [])]
    """
    pairs = []
    for ids, mask, labels in zip(
        *(part[name].tolist() for name in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        n_prompt = next((k for k, label in enumerate(labels) if label != IGNORE), sum(mask))
        pairs.append((ids[:n_prompt], [label for label in labels if label != IGNORE]))
    return pairs


def derangement(n: int, seed: int) -> list[int]:
    """For each of ``n`` examples another one, no example twice: the next one in a random round, so without retries.

    Example:
        >>> other = derangement(5, seed=0)
        >>> sorted(other), any(i == j for i, j in enumerate(other))
        ([0, 1, 2, 3, 4], False)
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [following[i] for i in range(n)]
