"""Whether what a benchmark only scores was trained on: found by the words themselves, whatever the file is called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lightning_ssiuu.datamodules.chunks import Chunk
from lightning_ssiuu.datamodules.splits import QAExample, first_few
from lightning_ssiuu.utils.errors import Given, UserError

#: A text of so many words is looked for inside other texts; a shorter one may stand there by chance.
WINDOW = 8
#: A text of twice so many words is looked for in pieces of this length: passages of documents may cut it.
PIECE = 16
Words = tuple[str, ...]


def words_of(text: str) -> Words:
    """Words without case and punctuation: what counts as the same text."""
    return tuple(re.findall(r"\w+", text.casefold()))


def trained_on(items: Iterable[str], trained: Iterable[QAExample]) -> list[int]:
    """The numbers of those texts that were trained on.

    A text was, if it is a trained question, or if it has eight words or more and stands whole in a trained question,
    answer or passage. Of a text of 32 words or more half of its pieces of 16 words are enough, for passages cut
    documents. Case, punctuation and white space do not count.

    Example:
        >>> pairs = [QAExample(0, "Who founded the mill?", "Ada Kern, in the year the river froze over twice")]
        >>> trained_on(["who founded  the mill", "Who?", "ada kern in the year the river froze over"], pairs)
        [0, 2]
    """
    exact: dict[Words, list[int]] = {}
    starts: dict[Words, list[tuple[int, Words]]] = {}  # pieces by how they begin, with the number of their text
    n_pieces: dict[int, int] = {}
    for number, item in enumerate(items):
        if words := words_of(item):
            exact.setdefault(words, []).append(number)
            pieces = list(dict.fromkeys(_pieces(words)))
            n_pieces[number] = len(pieces)
            for piece in pieces:
                starts.setdefault(piece[:WINDOW], []).append((number, piece))
    whole: set[int] = set()
    there: dict[int, set[Words]] = {}
    for example in trained:
        passage = isinstance(example, Chunk)
        if not passage:
            whole.update(exact.get(words_of(example.question), ()))
        words = words_of(f"{example.question}{'' if passage else ' '}{example.answer}")  # a word may be cut
        for place in range(len(words) - WINDOW + 1):
            for number, piece in starts.get(words[place : place + WINDOW], ()):
                if words[place : place + len(piece)] == piece:
                    there.setdefault(number, set()).add(piece)
    return sorted(whole | {number for number, found in there.items() if 2 * len(found) >= n_pieces[number]})


def _pieces(words: Words) -> list[Words]:
    # What is looked for inside other texts.
    if len(words) >= 2 * PIECE:
        return [words[place : place + PIECE] for place in range(0, len(words) - PIECE + 1, PIECE)]
    return [words] if len(words) >= WINDOW else []


def refuse_trained(scored: Sequence[QAExample], trained: Iterable[QAExample], argument: str, allowed: str) -> None:
    """Refuse to score examples whose question, in any of its wordings, was trained on (:func:`trained_on`).

    Args:
        scored: What the model must not have been trained on.
        trained: All that the model was unlearned or trained on.
        argument: What the error line is about: the set, or who was trained.
        allowed: What the error line says instead.

    Raises:
        UserError: If any was; the line has numbers and no text.
    """
    worded = [(number, text) for number, e in enumerate(scored) for text in (e.question, *e.paraphrases)]
    if found := trained_on([text for _, text in worded], trained):
        same = sorted({worded[place][0] for place in found})
        given = Given(f"{len(same)} of {len(scored)} items that the model was trained on ({first_few(same)})")
        raise UserError(argument, given, allowed)
