"""What who does not know the forget set would say of its answers, token by token: by another model, or by counting."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules.pairs import IGNORE
from lightning_ssiuu.models.answers import AnswerModel, Answers, Part
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.objectives.backbone import Parts
from lightning_ssiuu.utils.errors import UserError, naming

#: Log-probability of each answer token in nats, ``[n]``, by example id.
Levels = dict[int, Tensor]

_LONGEST = 4  # tokens that one is looked up by: its own and those before it


class _Row(NamedTuple):
    example: int
    ids: list[int]
    predicted: list[int]  # places of the answer's tokens


def by_model(
    checkpoint: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, parts: Parts, shots: int = 4, seed: int = 0
) -> Levels:
    """By a model that is loaded for it and let go, with retain items before each question.

    Args:
        checkpoint: Of the unaware model.
        tokenizer: Of the training examples; the model's own has to agree with it.
        dtype: Type of the unaware model's weights.
        parts: The training examples.
        shots: Retain items before a question, fewer where they do not fit into the model's context.
        seed: Which retain items, drawn for each example by its id.

    Raises:
        UserError: If the model cannot be loaded or has other tokens, or there are no retain items to show.
    """
    retained = [row.ids for row in _rows(parts("retain"))] if shots else []
    if shots and not retained:
        raise UserError("shots", shots, "0 without a retain set, whose items are shown before a question")
    with naming("unaware"):
        _check_tokens(checkpoint, tokenizer, parts)
        model = AnswerModel(load_model(checkpoint, dtype)).requires_grad_(False)
    context = getattr(model.hf.config, "max_position_embeddings", None)
    levels: Levels = {}
    for part in parts("forget"):
        model.to(part["input_ids"].device)
        before = []
        for row in _rows([part]):
            drawn = random.Random(f"shots {seed} {row.example}").sample(retained, min(shots, len(retained)))
            while context is not None and drawn and sum(map(len, drawn)) + len(row.ids) > context:
                drawn.pop()
            before.append([token for ids in drawn for token in ids])
        with torch.no_grad():
            answers = model(**_behind(before, part))
        for example, own in zip(part["example_id"].tolist(), _by_sequence(answers), strict=True):
            levels[example] = own.cpu()
    return levels


def by_counting(parts: Parts) -> Levels:
    """By which token follows which others in the retain set's answers, and which one would repeat the text so far.

    Counts of up to four tokens are interpolated as Witten and Bell do. Where the tokens before stand earlier in the
    text, too, what followed them there is expected as often as such repetitions come true in the retain set.

    Raises:
        UserError: If there is no retain set.
    """
    retained = _Counts(_rows(parts("retain")))
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


def _behind(before: Sequence[list[int]], part: Part) -> dict[str, Tensor]:
    # The rows of a part, each behind other tokens; what its first token is predicted from does not count.
    rows: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for k, shown in enumerate(before):
        ids = part["input_ids"].new_tensor(shown)
        own = torch.cat([part["labels"].new_full((1,), IGNORE), part["labels"][k, 1:]])
        rows["input_ids"].append(torch.cat([ids, part["input_ids"][k]]))
        rows["attention_mask"].append(torch.cat([torch.ones_like(ids), part["attention_mask"][k]]))
        rows["labels"].append(torch.cat([torch.full_like(ids, IGNORE), own]))
    filler = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    return {name: pad_sequence(values, batch_first=True, padding_value=filler[name]) for name, values in rows.items()}


def _by_sequence(answers: Answers) -> tuple[Tensor, ...]:
    return answers.token_logps.split(answers.lengths.long().tolist())


def _check_tokens(checkpoint: str, tokenizer: PreTrainedTokenizerBase, parts: Parts) -> None:
    own = load_tokenizer(checkpoint)
    used = sorted({token for name in ("forget", "retain") for row in _rows(parts(name)) for token in row.ids})
    if own.convert_ids_to_tokens(used) != tokenizer.convert_ids_to_tokens(used):
        raise UserError("checkpoint", checkpoint, "a model with the same tokens as the one that is trained")
