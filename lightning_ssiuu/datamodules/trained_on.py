"""Whether what a benchmark only scores was trained on: found by the words themselves, whatever the file is called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lightning_ssiuu.datamodules.chunks import Chunk
from lightning_ssiuu.datamodules.splits import QAExample, first_few
from lightning_ssiuu.utils.errors import Given, UserError

#: A text of so many words is looked for inside other texts; a shorter one may stand there by chance.
WINDOW = 8


def words_of(text: str) -> tuple[str, ...]:
    """Words without case and punctuation: what counts as the same text."""
    return tuple(re.findall(r"\w+", text.casefold()))


def trained_on(items: Iterable[str], trained: Iterable[QAExample]) -> list[int]:
    """The numbers of those texts that were trained on.

    A text was, if it is a trained question, or if it has eight words or more and stands whole in a trained question,
    answer or passage. Case, punctuation and white space do not count. A passage's end cuts no text that also stands in
    another passage whole.

    Example:
        >>> pairs = [QAExample(0, "Who founded the mill?", "Ada Kern, in the year the river froze over twice")]
        >>> trained_on(["who founded  the mill", "Who?", "ada kern in the year the river froze over"], pairs)
        [0, 2]
    """
    exact: dict[tuple[str, ...], list[int]] = {}
    starts: dict[tuple[str, ...], list[tuple[int, tuple[str, ...]]]] = {}
    for number, item in enumerate(items):
        if words := words_of(item):
            exact.setdefault(words, []).append(number)
            if len(words) >= WINDOW:
                starts.setdefault(words[:WINDOW], []).append((number, words))
    found: set[int] = set()
    for example in trained:
        passage = isinstance(example, Chunk)
        if not passage:
            found.update(exact.get(words_of(example.question), ()))
        if starts:
            words = words_of(f"{example.question}{'' if passage else ' '}{example.answer}")  # a word may be cut
            for place in range(len(words) - WINDOW + 1):
                for number, wanted in starts.get(words[place : place + WINDOW], ()):
                    if words[place : place + len(wanted)] == wanted:
                        found.add(number)
    return sorted(found)


def refuse_trained(scored: Sequence[QAExample], trained: Iterable[QAExample], argument: str, suite: str) -> None:
    """Refuse to score examples whose question, in any of its wordings, was trained on (:func:`trained_on`).

    Args:
        scored: What a suite only scores.
        trained: All that the model was unlearned or trained on.
        argument: Name of the set, for the error line.
        suite: Name of the suite.

    Raises:
        UserError: If any was; the line has numbers and no text.
    """
    worded = [(number, text) for number, e in enumerate(scored) for text in (e.question, *e.paraphrases)]
    if found := trained_on([text for _, text in worded], trained):
        same = sorted({worded[place][0] for place in found})
        given = Given(f"{len(same)} of {len(scored)} items that the model was trained on ({first_few(same)})")
        allowed = f"items that are only scored: with these it is not {suite}. Unlearn the benchmark's training set"
        raise UserError(argument, given, allowed)
