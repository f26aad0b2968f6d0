"""Chunks of documents: passages of so many tokens, and how relearning attacks divide them without common text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lightning_ssiuu.datamodules.splits import QAExample


class Span(NamedTuple):
    """Tokens ``start`` to ``stop`` of a document, by its number."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True, repr=False)
class Chunk(QAExample):
    """A passage of a document: its question is a prefix, its answer the continuation, and both are token ids, too.

    ``group`` is the document's name.

    Args:
        number: Of the chunk in its document, from 1.
        tokens: All its token ids.
        n_prefix: So many of them are the prefix.
        spans: Where its text stands.

    Example:
        >>> Chunk(7, "Call me", " Ishmael.", group="whale.txt", number=1)
        Chunk(whale.txt#1)
    """

    number: int = 0
    tokens: tuple[int, ...] = ()
    n_prefix: int = 0
    spans: tuple[Span, ...] = ()

    def __repr__(self) -> str:
        return f"Chunk({self.name})"

    @property
    def name(self) -> str:
        """What messages call it: its document and its number there."""
        return f"{self.group}#{self.number}"

    @property
    def folded(self) -> str:
        """The whole passage: two sets may begin one in the same words."""
        return " ".join(f"{self.question}{self.answer}".casefold().split())


def spans_of(document: int, n_tokens: int, chunk: int, stride: int) -> list[Span]:
    """The chunks of a document, which begin ``stride`` tokens apart; the last one ends where the document does.

    A document that is shorter than a chunk is one; none is left out.

    Example:
        >>> [span[1:] for span in spans_of(0, 22, chunk=8, stride=6)], [span[1:] for span in spans_of(1, 5, 8, 6)]
        ([(0, 8), (6, 14), (12, 20), (14, 22)], [(0, 5)])
    """
    starts = [*range(0, max(1, n_tokens - chunk + 1), stride)]
    if starts[-1] + chunk < n_tokens:
        starts.append(n_tokens - chunk)
    return [Span(document, start, min(start + chunk, n_tokens)) for start in starts]


def sharing(scored: Iterable[QAExample], attacked: Iterable[QAExample]) -> list[Chunk]:
    """The scored chunks that share text with an attacked one; none of examples of other kinds."""
    covered: dict[int, list[Span]] = {}
    for span in sorted(span for example in attacked if isinstance(example, Chunk) for span in example.spans):
        known = covered.setdefault(span.document, [])
        if known and span.start <= known[-1].stop:
            known[-1] = known[-1]._replace(stop=max(known[-1].stop, span.stop))
        else:
            known.append(span)
    return [
        chunk
        for chunk in scored
        if isinstance(chunk, Chunk)
        if any(
            span.start < other.stop and other.start < span.stop
            for span in chunk.spans
            for other in covered.get(span.document, ())
        )
    ]


def divided(
    examples: Iterable[QAExample], count: int, rng: np.random.Generator
) -> tuple[Sequence[QAExample], Sequence[QAExample]]:
    """``count`` chunks to attack, and those to score: of other documents or, if there are none, of other regions.

    Attacked are whole documents, drawn at random, and a random region of the last one that is drawn. A region is a
    stretch of neighbouring chunks. No text is in both.
    """
    chunks = [example for example in examples if isinstance(example, Chunk)]
    documents: dict[int, list[int]] = {}
    for place, chunk in enumerate(chunks):
        documents.setdefault(chunk.spans[0].document, []).append(place)
    attacked: set[int] = set()
    for document in rng.permutation(list(documents)).tolist():
        own, missing = documents[document], count - len(attacked)
        if missing < len(own):
            start = int(rng.integers(len(own) - missing + 1))
            own = own[start : start + missing]
        attacked.update(own)
        if len(attacked) >= count:
            break
    taught = [chunk for place, chunk in enumerate(chunks) if place in attacked]
    touched = {span.document for chunk in taught for span in chunk.spans}
    rest = [chunk for place, chunk in enumerate(chunks) if place not in attacked]
    elsewhere = [chunk for chunk in rest if not any(span.document in touched for span in chunk.spans)]
    shared = {chunk.example_id for chunk in sharing(rest, taught)}
    return taught, elsewhere or [chunk for chunk in rest if chunk.example_id not in shared]


def exchanged(examples: Iterable[QAExample]) -> Iterator[Chunk]:
    """Chunks with the continuations of others: of one further on in the document, or of another short document.

    Of two chunks each gets the other's, so that few documents and regions are mixed. A continuation that is the
    chunk's own, word for word, is left out.
    """
    documents: dict[int, list[Chunk]] = {}
    for chunk in (example for example in examples if isinstance(example, Chunk)):
        documents.setdefault(chunk.spans[0].document, []).append(chunk)
    alone = [own[0] for own in documents.values() if len(own) == 1]
    for own in (*(own for own in documents.values() if len(own) > 1), *([alone] if len(alone) > 1 else [])):
        size = 2 if own is alone else 2 * _apart(own)
        cuts = [*range(0, max(1, len(own) - size + 1), size), len(own)]
        for start, stop in pairwise(cuts):
            block = own[start:stop]
            for place, chunk in enumerate(block):
                other = block[(place + len(block) // 2) % len(block)]
                if other.answer != chunk.answer:
                    yield _with_continuation(chunk, other)


def _apart(chunks: Sequence[Chunk]) -> int:
    # So many places on a chunk of the same document has no text in common with the first one.
    end = chunks[0].spans[0].stop
    return next((n for n, chunk in enumerate(chunks) if chunk.spans[0].start >= end), max(1, len(chunks) // 2))


def _with_continuation(chunk: Chunk, other: Chunk) -> Chunk:
    (document, start, _), (its_document, _, stop) = chunk.spans[0], other.spans[0]
    tokens = chunk.tokens[: chunk.n_prefix] + other.tokens[other.n_prefix :]
    spans = (
        Span(document, start, start + chunk.n_prefix),
        Span(its_document, stop - len(other.tokens) + other.n_prefix, stop),
    )
    return replace(chunk, answer=other.answer, tokens=tokens, spans=spans)
