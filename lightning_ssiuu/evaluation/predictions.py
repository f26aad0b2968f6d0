"""One evaluated part of a batch: what scores read off a model, each computed when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules.pairs import PREFIX
from lightning_ssiuu.datamodules.tokenization import is_end
from lightning_ssiuu.evaluation.metrics.base import first_of_each
from lightning_ssiuu.models.answers import AnswerModel, Answers, Part
from lightning_ssiuu.models.checks import check_peaks
from lightning_ssiuu.models.generation import Request, continued
from lightning_ssiuu.training.fsdp import is_sharded

#: Longest continuation in tokens.
_MOST_TOKENS = 200
#: Tokens beyond the longest option that a model may take to name one ("The answer is ...").
_ROOM_FOR_WORDS = 16
#: In place of a limit: after the prompts that list the options.
_CHOICES = -1


class Predictions:
    """What scores read off a model on one part of a batch, on its device; what none asks for is not computed.

    Texts are generated for all predictions of a ``group`` at once (:func:`grouped`), by default for this one alone.
    """

    def __init__(
        self,
        model: AnswerModel,
        tokenizer: PreTrainedTokenizerBase,
        part: Part,
        group: Sequence[ReferenceType[Predictions]] = (),
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.part: Mapping[str, Any] = part
        self._group = group  # weak: a circle would hold model and logits until garbage is collected
        self._without_end: Answers | None = None
        self._continued: dict[int | None, list[list[int]]] = {}  # by limit
        self._told: list[list[int]] | None = None

    @cached_property
    def answers(self) -> Answers:
        """Teacher-forced forward pass on the true answers."""
        return self._answers(self.part)

    @cached_property
    def option_scores(self) -> Tensor:
        """``[B·K]`` mean log-probability per token of every option (nats), the true answer's first."""
        options = self._answers(self.part["options"])
        if "answers" not in vars(self):  # the true ones are among the options: no pass of their own
            vars(self)["answers"] = options.only(first_of_each(self.option_of))
        return options.mean_logps

    def answers_scored(self, eos: bool = True) -> Answers:
        """:attr:`answers`, or without the last label of each where that is a token that ends a turn."""
        if eos:
            return self.answers
        if self._without_end is None:
            self._without_end = self.answers.without_end(self._ends(self.part["labels"]))
        return self._without_end

    @property
    def option_of(self) -> Tensor:
        """``[B·K]`` the row of each option."""
        return self.part["options"]["option_of"]

    @cached_property
    def truth_scores(self) -> Tensor:
        """:attr:`option_scores`, with the true answer in other words in its place where the data have it."""
        if "rephrased" not in self.part:
            return self.option_scores
        scores = self.option_scores.clone()
        scores[first_of_each(self.option_of)] = self._answers(self.part["rephrased"]).mean_logps
        return scores

    @cached_property
    def references(self) -> list[str]:
        return self._labelled(self.part["labels"])

    @property
    def reference_tokens(self) -> list[list[int]]:
        """Token ids of the true answers, without what ends a turn."""
        labels = self.part["labels"]
        return [_spoken(row[row != -100].tolist(), self._ends(labels)) for row in labels]

    @property
    def generations(self) -> list[str]:
        """:attr:`generated_tokens` as text."""
        return self.said()

    @property
    def generated_tokens(self) -> list[list[int]]:
        """:meth:`generated` with the usual limit."""
        return self.generated()

    def said(self, new_tokens: int | None = None) -> list[str]:
        """:meth:`generated` as text."""
        return [_text(self.tokenizer, tokens) for tokens in self.generated(new_tokens)]

    def generated(self, new_tokens: int | None = None) -> list[list[int]]:
        """Token ids of greedy continuations of the prompts, up to what ends a turn.

        Each has up to ``new_tokens``, by default twice its own answer's length, at most 200; a passage of a document
        has its own length. So an example's text does not depend on which others share its batch, or how many ranks
        share the set.
        """
        if self._told is not None:
            return self._told
        return self._for_all(new_tokens, lambda each: each.requests(new_tokens))

    def tell(self, tokens: list[list[int]]) -> None:
        """Take these for what the model generates, whatever the limit."""
        self._told = tokens

    def requests(self, new_tokens: int | None = None) -> list[Request]:
        """What :meth:`generated` continues."""
        labels = self.part["labels"]
        lengths = (labels != -100).sum(1)
        limits = lengths if PREFIX in self.part else (2 * lengths).clamp(max=_MOST_TOKENS)
        if new_tokens is not None:
            limits = torch.full_like(lengths, new_tokens)
        return self._requests(self.part["input_ids"], labels, limits)

    @cached_property
    def choice_scores(self) -> Tensor:
        """``[B·K]`` mean log-probability per token of every option after the prompt that lists them all."""
        return self._answers(self.part["choices"]).mean_logps

    @property
    def choice_of(self) -> Tensor:
        """``[B·K]`` the row of each of those."""
        return self.part["choices"]["option_of"]

    @cached_property
    def choice_options(self) -> list[list[str]]:
        """The options of each example as text, the true answer first."""
        options: list[list[str]] = [[] for _ in self.part["input_ids"]]
        for row, text in zip(self.choice_of.tolist(), self._labelled(self.part["choices"]["labels"]), strict=True):
            options[row].append(text)
        return options

    @cached_property
    def choice_generations(self) -> list[str]:
        """Greedy continuations of the prompts that list the options: longest option + 16 tokens, at most 200."""
        return [_text(self.tokenizer, tokens) for tokens in self.choice_tokens]

    @property
    def choice_tokens(self) -> list[list[int]]:
        """Token ids of :attr:`choice_generations`."""
        return self._for_all(_CHOICES, Predictions._choice_requests)

    def _choice_requests(self) -> list[Request]:
        choices = self.part["choices"]
        first = first_of_each(self.choice_of)
        lengths = (choices["labels"] != -100).sum(1)
        longest = lengths.new_zeros(int(first.sum())).scatter_reduce(0, self.choice_of, lengths, "amax")
        limits = (longest + _ROOM_FOR_WORDS).clamp(max=_MOST_TOKENS)
        return self._requests(choices["input_ids"][first], choices["labels"][first], limits)

    def _for_all(self, key: int | None, asked: Callable[[Predictions], list[Request]]) -> list[list[int]]:
        # The whole group's continuations, each kept where it will be asked for.
        if key in self._continued:
            return self._continued[key]
        group = [each for reference in self._group if (each := reference()) is not None] or [self]
        requests = [asked(each) for each in group]
        rows = max(map(len, requests))
        found = iter(continuations(self.model, self.tokenizer, [one for each in requests for one in each], rows))
        for each, own in zip(group, requests, strict=True):
            each._continued[key] = [next(found) for _ in own]
        return self._continued[key]

    def _answers(self, part: Mapping[str, Tensor]) -> Answers:
        answers: Answers = self.model(part["input_ids"], part["attention_mask"], part["labels"], share=True)
        check_peaks(answers.peaks)
        return answers

    def _labelled(self, labels: Tensor) -> list[str]:
        ends = self._ends(labels)
        return [_text(self.tokenizer, _spoken(row[row != -100].tolist(), ends)) for row in labels]

    def _ends(self, labels: Tensor) -> tuple[int, ...]:
        # The tokens that end a text: the end-of-sequence token, and what ends the labelled turns. A passage has no end.
        eos = self.tokenizer.eos_token_id
        if PREFIX in self.part:
            return (eos,)
        last = {row[row != -100][-1].item() for row in labels if bool((row != -100).any())}
        return tuple(sorted({eos, *(token for token in last if is_end(token, self.tokenizer))}))

    def _requests(self, ids: Tensor, labels: Tensor, limits: Tensor) -> list[Request]:
        # To continue what stands before the labels.
        starts, ends = (labels != -100).int().argmax(1).tolist(), self._ends(labels)
        rows = zip(ids.tolist(), starts, limits.tolist(), strict=True)
        return [Request(tuple(row[:start]), limit, ends) for row, start, limit in rows]


def grouped(model: AnswerModel, tokenizer: PreTrainedTokenizerBase, parts: Iterable[Part]) -> list[Predictions]:
    """Predictions on each part; the first that is asked for a text has those of all generated, by need."""
    group: list[ReferenceType[Predictions]] = []
    predictions = [Predictions(model, tokenizer, part, group) for part in parts]
    group += map(ReferenceType, predictions)
    return predictions


def generating(model: AnswerModel, tokenizer: PreTrainedTokenizerBase, parts: Iterable[Part]) -> Iterator[Predictions]:
    """:func:`grouped`, one after the other, each let go of with what was read off it."""
    predictions = grouped(model, tokenizer, parts)
    while predictions:
        yield predictions[0]
        del predictions[0]


def texts(model: AnswerModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], rows: int) -> list[str]:
    """:func:`continuations` as text."""
    return [_text(tokenizer, tokens) for tokens in continuations(model, tokenizer, requests, rows)]


def continuations(
    model: AnswerModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], rows: int
) -> list[list[int]]:
    """Token ids of the continuations, up to the end of the turn; ``rows`` as :func:`continued` has it.

    Every rank must call it where weights are sharded, with at least one request: every step gathers them.
    """
    found = continued(model, requests, tokenizer.pad_token_id, rows, is_sharded(model))
    return [_spoken(ids, request.ends) for ids, request in zip(found, requests, strict=True)]


def _spoken(tokens: list[int], ends: Sequence[int]) -> list[int]:
    # Up to the end of the turn, whose token need not be one that decoding skips.
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)
