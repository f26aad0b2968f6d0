"""What who does not know the forget set would say of its answers, token by token: by another model, or by counting."""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules.pairs import IGNORE
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.models.checks import check_peaks
from lightning_ssiuu.models.loading import context_length, load_model, load_tokenizer
from lightning_ssiuu.objectives.backbone import Parts
from lightning_ssiuu.utils.errors import UserError, naming

#: Log-probability of each answer token in nats, ``[n]``, by example id.
Levels = dict[int, Tensor]

_MOST = 10_000  # retain items that are shown and counted
_TOKENS = 4096  # of a pass over several examples, their shots included
_LONGEST = 4  # tokens that one is looked up by: its own and those before it


class _Row(NamedTuple):
    example: int
    ids: list[int]
    predicted: list[int]  # places of the answer's tokens


def by_model(
    checkpoint: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
    parts: Parts,
    shots: int = 4,
    seed: int = 0,
) -> Levels:
    """By a model that is loaded for it and let go, with retain items before each question.

    Args:
        checkpoint: Of the unaware model.
        tokenizer: Of the training examples; the model's own has to agree with it.
        dtype: Type of the unaware model's weights.
        device: Where it runs.
        parts: The training examples.
        shots: Retain items before a question, fewer where they do not fit into the model's context.
        seed: Which retain items, drawn for each example by its id.

    Raises:
        UserError: If the model cannot be loaded, has other tokens, too few positions, or gives no numbers, or there are
            no retain items to show.
    """
    retained = [row.ids for row in _retained(parts)] if shots else []
    if shots and not retained:
        raise UserError("shots", shots, "0 without a retain set, whose items are shown before a question")
    levels: Levels = {}
    with naming("unaware"):
        _check_tokens(checkpoint, tokenizer, retained, parts)
        model = AnswerModel(load_model(checkpoint, dtype)).requires_grad_(False).to(device)
        context = context_length(checkpoint) or sys.maxsize
        shown = (_with_shots(row, retained, shots, f"{seed} {row.example}", context) for row in _rows(parts("forget")))
        for rows in _passes(shown):
            if longest := next((row for row in rows if len(row.ids) > context), None):
                allowed = f"a model of more than {context} positions: example id {longest.example} is longer"
                raise UserError("checkpoint", checkpoint, allowed)
            with torch.no_grad():
                answers = model(**_padded(rows, device))
            check_peaks(answers.peaks)
            own = answers.token_logps.cpu().split([len(row.predicted) for row in rows])
            levels |= {row.example: logps for row, logps in zip(rows, own, strict=True)}
    return levels


def by_counting(parts: Parts) -> Levels:
    """By which token follows which others in the retain set's answers, and which one would repeat the text so far.

    Counts of up to four tokens are interpolated as Witten and Bell do. Where the tokens before stand earlier in the
    text, too, what followed them there is expected as often as such repetitions come true in the retain set.

    Raises:
        UserError: If there is no retain set.
    """
    retained = _Counts(_retained(parts))
    if retained.is_empty:
        raise UserError("unaware", None, "a checkpoint without a retain set, whose tokens are counted")
    return {row.example: retained.logps(row) for row in _rows(parts("forget"))}


class _Counts:
    """How often tokens follow others, and how often a text repeats itself."""

    def __init__(self, rows: Iterable[_Row]) -> None:
        self._following: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        self._repetitions = {n: [1, 2] for n in range(1, _LONGEST)}  # by length of what is repeated: true, all
        for row in rows:
            for token, before, n, repeated in _places(row):
                for ending in before:
                    self._following[ending][token] += 1
                if n:
                    self._repetitions[n][0] += repeated[token] > 0
                    self._repetitions[n][1] += 1
        self._n_tokens = 1 + len(self._following.get((), ()))

    @property
    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self._following

    def logps(self, row: _Row) -> Tensor:
        """Of a row's answer tokens, in nats, ``[n]``."""
        values = [self._probability(*place) for place in _places(row)]
        return torch.tensor(values, dtype=torch.float64).log()

    def _probability(self, token: int, before: Sequence[tuple[int, ...]], n: int, repeated: Counter[int]) -> float:
        counted = 1 / self._n_tokens
        for ending in before:
            if follows := self._following.get(ending):
                counted = (follows[token] + len(follows) * counted) / (follows.total() + len(follows))
        if not n:
            return counted
        true, all_ = self._repetitions[n]
        return counted + true / all_ * (repeated[token] / repeated.total() - counted)


def _places(row: _Row) -> Iterator[tuple[int, list[tuple[int, ...]], int, Counter[int]]]:
    # The answer's tokens, each with the endings of what stands before it (none of that, the last token, and so on), and
    # of the longest one that stands earlier in the text, too: how long it is, and what followed it there.
    earlier: dict[tuple[int, ...], Counter[int]] = {}
    answer = set(row.predicted)
    for place, token in enumerate(row.ids):
        before = [tuple(row.ids[place - n : place]) for n in range(min(_LONGEST, place + 1))]
        if place in answer:
            known = [ending for ending in before[1:] if ending in earlier]
            yield token, before, len(known), earlier[known[-1]] if known else Counter()
        for ending in before[1:]:
            earlier.setdefault(ending, Counter())[token] += 1


def _rows(parts: Iterable[Part]) -> Iterator[_Row]:
    for part in parts:
        columns = (part[name].tolist() for name in ("example_id", "input_ids", "attention_mask", "labels"))
        for example, ids, mask, labels in zip(*columns, strict=True):
            predicted = [place for place in range(1, sum(mask)) if labels[place] != IGNORE]
            yield _Row(example, ids[: sum(mask)], predicted)


def _retained(parts: Parts) -> Iterator[_Row]:
    return islice(_rows(parts("retain")), _MOST)


def _with_shots(row: _Row, retained: Sequence[list[int]], shots: int, seed: str, context: int) -> _Row:
    drawn = random.Random(f"shots {seed}").sample(retained, min(shots, len(retained)))
    while drawn and sum(map(len, drawn)) + len(row.ids) > context:
        drawn.pop()
    before = [token for ids in drawn for token in ids]
    return _Row(row.example, [*before, *row.ids], [len(before) + place for place in row.predicted])


def _passes(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    # What is run together: rows of not too many tokens, or one.
    together: list[_Row] = []
    for row in rows:
        if together and sum(len(one.ids) for one in together) + len(row.ids) > _TOKENS:
            yield together
            together = []
        together.append(row)
    if together:
        yield together


def _padded(rows: Sequence[_Row], device: torch.device) -> dict[str, Tensor]:
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for k, row in enumerate(rows):
        own = torch.tensor(row.ids)
        ids[k, : len(own)], mask[k, : len(own)] = own, 1
        labels[k, row.predicted] = own[row.predicted]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def _check_tokens(
    checkpoint: str, tokenizer: PreTrainedTokenizerBase, retained: Iterable[list[int]], parts: Parts
) -> None:
    own = load_tokenizer(checkpoint)
    used = sorted({token for ids in chain(retained, (row.ids for row in _rows(parts("forget")))) for token in ids})
    if own.convert_ids_to_tokens(used) != tokenizer.convert_ids_to_tokens(used):
        raise UserError("checkpoint", checkpoint, "a model with the same tokens as the one that is trained")
