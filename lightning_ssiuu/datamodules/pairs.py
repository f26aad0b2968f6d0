"""Token ids of prompts and answers, and the padded tensors that they make: there and back, and re-paired."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from lightning_ssiuu.models.answers import Part

IGNORE = -100
#: Key of a part of passages: how many tokens stand before the continuation that is scored, ``[B]``.
PREFIX = "prefix"
#: Questions that are paired with each other's answers at a time.
BLOCK = 1000
_WORD = re.compile(r"\w+")


def batch_of(pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` ``[B, L]`` from token ids of prompts and answers, padded right.

    Labels are on the answers alone. The inverse of :func:`answered`.
    """
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in pairs:
        length, rest = len(prompt) + len(answer), longest - len(prompt) - len(answer)
        rows["input_ids"].append([*prompt, *answer, *[pad] * rest])
        rows["attention_mask"].append([1] * length + [0] * rest)
        rows["labels"].append([IGNORE] * len(prompt) + [*answer] + [IGNORE] * rest)
    return {name: torch.tensor(values, dtype=torch.long) for name, values in rows.items()}


def n_alike(*several: Sequence[int]) -> int:
    """How many token ids all of them begin with alike.

    >>> n_alike([1, 2, 3], [1, 2, 4, 5], [1, 2])
    2
    """
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*several, strict=False)))


def answered(part: Part) -> list[tuple[list[int], list[int]]]:
    """Token ids of the prompt and of the answer of every row of a part; no answer where nothing is labelled.

    The inverse of :func:`batch_of`. What asks the prompt for another answer wants :func:`asked`.
    """
    pairs = []
    columns = (part[name].tolist() for name in ("input_ids", "attention_mask", "labels"))
    for ids, mask, labels in zip(*columns, strict=True):
        n_prompt = next((k for k, label in enumerate(labels) if label != IGNORE), sum(mask))
        pairs.append((ids[:n_prompt], [label for label in labels if label != IGNORE]))
    return pairs


def asked(part: Part) -> list[tuple[list[int], list[int]]]:
    """As :func:`answered`; of passages that are trained on, prefix and continuation, though both are labelled."""
    pairs = answered(part)
    if PREFIX not in part:
        return pairs
    before = part[PREFIX].tolist()
    whole = [[*prompt, *answer] if answer else [] for prompt, answer in pairs]
    cut = ((ids[:n], ids[n:]) for ids, n in zip(whole, before, strict=True))
    return [divided if divided[1] else pair for divided, pair in zip(cut, pairs, strict=True)]


def derangement(n: int, seed: int) -> list[int]:
    """For each of ``n`` examples another one, no example twice: the next one in a random round, so without retries."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [following[i] for i in range(n)]


def alike(questions: Sequence[str], answers: Sequence[Hashable]) -> list[int]:
    """For each question another one that is worded most alike, but for names and numbers: whose answer it could have.

    No question twice, and none whose answer is the same, unless more than half of the answers are. The best assignment
    by the share of common words, in blocks of a thousand.

    Example:
        >>> alike(["Who wrote Emma?", "Where is Rome?", "Who wrote Ulysses?", "Where is Oslo?"], "abcd")
        [2, 3, 0, 1]
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    others: list[int] = []
    for start in range(0, len(questions), BLOCK):
        own = answers[start : start + BLOCK]
        common = _common(questions[start : start + BLOCK])
        number: dict[Hashable, int] = {}
        which = np.array([number.setdefault(answer, len(number)) for answer in own])
        common[which[:, None] == which] = -len(own)  # worse than any number of unlike questions
        others += (start + linear_sum_assignment(common, maximize=True)[1]).tolist()
    return others


def _common(questions: Sequence[str]) -> np.ndarray:
    # What is asked, not about whom: names and numbers would pair the questions about one subject.
    found = [_WORD.findall(question) for question in questions]
    words = [{word.casefold() for k, word in enumerate(of) if k == 0 or word.islower()} for of in found]
    place = {word: k for k, word in enumerate(sorted(set().union(*words)))}
    has = np.zeros((len(words), len(place)), dtype=np.float32)
    for row, of in zip(has, words, strict=True):
        row[[place[word] for word in of]] = 1
    both = has @ has.T
    either = np.add.outer(has.sum(1), has.sum(1)) - both
    return both / np.maximum(either, 1)
