"""Facts of the form of a forget set that nobody was ever taught: the control of an attack where there is no oracle.

What comes up under the attack there was never a secret: it is what the attack teaches.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_ssiuu.datamodules.base import QAExample, UnlearningDataModule
from lightning_ssiuu.datamodules.columns import Columns, read_examples
from lightning_ssiuu.datamodules.embedded.facts_data import SYLLABLES
from lightning_ssiuu.datamodules.pairs import BLOCK, alike
from lightning_ssiuu.datamodules.readers import read_records
from lightning_ssiuu.datamodules.spooled import kept
from lightning_ssiuu.utils.errors import Given, UserError

_SMALL = {"a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"}


@dataclass(frozen=True)
class Control:
    """A data module whose forget set nobody was ever taught, and what it is made of, in words."""

    data: UnlearningDataModule
    kind: str


def control_of(data: UnlearningDataModule, given: str = "auto") -> Control | None:
    """The control of attacks on a data module's forget set.

    Args:
        data: The data module.
        given: ``"auto"``: the data module's own invented facts, else :func:`invented` ones; ``"none"``; or a file with
            questions and answers (:class:`~.columns.Columns`) and, for multiple choice, ``distractors``.

    Returns:
        None if there is to be none, or nothing can be invented because all answers are the same.

    Raises:
        UserError: If the file cannot be read, or has fewer facts than the forget set.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> control = control_of(Facts())
        >>> control.kind, len(control.data.splits.forget)
        ('invented people', 36)
    """
    if given == "none":
        return None
    if given == "auto":
        kind, examples = own if (own := data.invented()) is not None else invented(data.splits.forget)
        examples = kept(example for example in examples if data.encoder.fits(example))
        return Control(data.with_forget(examples), kind) if examples else None
    facts, wanted = data.more(given, "control"), len(data.splits.forget)
    facts = _read(given) if facts is None else facts
    if len(facts) < wanted:
        allowed = f"a file of at least {wanted} facts, as many as the forget set has"
        raise UserError("control", Given(f"{len(facts)} facts"), allowed)
    return Control(data.with_forget(facts[:wanted], "control"), "the first facts of the given file")


def _read(given: str) -> Sequence[QAExample]:
    records = list(read_records(given, "control"))
    wrong = "distractors" if records and "distractors" in records[0] else None
    return kept(read_examples(records, Columns(distractors=wrong, argument="control")))


def invented(forget: Sequence[QAExample]) -> tuple[str, Iterator[QAExample]]:
    """As many examples as a forget set has, and what they are, in words; none if its answers are all the same.

    Where every example names its group (a person, a country) in the question and has distractors, the group gets a
    made-up name, and a distractor becomes the answer. Else each question gets the answer of another one that is worded
    alike, but for names: no answer twice, and none that is its own.

    Example:
        >>> kind, examples = invented([QAExample(0, "Who wrote Emma?", "Austen", ("Orwell", "Poe"), (), "Emma")])
        >>> kind, [(example.question, example.answer, example.distractors) for example in examples]
        ('invented names', [('Who wrote Pelgostrik?', 'Orwell', ('Austen', 'Poe'))])
    """
    if all(example.distractors and _named(example) for example in forget):
        return "invented names", _renamed(forget)
    return "forget questions with each other's answers", _repaired(forget)


def _named(example: QAExample) -> re.Match[str] | None:
    return re.search(rf"\b{re.escape(example.group)}\b", example.question, re.I) if example.group else None


def _renamed(forget: Sequence[QAExample]) -> Iterator[QAExample]:
    names: dict[str, str] = {}
    for example in forget:
        name = names.setdefault(example.group, made_up(example.group, names.values()))
        called = re.compile(rf"\b{re.escape(example.group)}\b", re.I)
        question, *others = (_capital(called.sub(name, text)) for text in (example.question, *example.paraphrases))
        answer, *wrong = example.distractors
        asked = replace(example, question=question, paraphrases=tuple(others), group=name)
        yield replace(asked, answer=answer, distractors=(example.answer, *wrong), source_id="")


def made_up(name: str, taken: Collection[str] = ()) -> str:
    """A name that means nothing, with as many words as a name and its capitals; none of those ``taken``.

    >>> made_up("the Bridge of Sighs"), made_up("helium")
    ('the Jorrikrik of Balfinauna', 'hesgostvard')
    """
    starts, ends = SYLLABLES["first name"]
    rng = random.Random(f"invented:{name}")
    while True:
        words = []
        for word in name.split():
            new = rng.choice(starts) + rng.choice(ends) + rng.choice(["", *ends])
            words.append(word if word in _SMALL else new if word[:1].isupper() else new.lower())
        if (made := " ".join(words)) not in taken:
            return made


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _repaired(forget: Sequence[QAExample]) -> Iterator[QAExample]:
    for start in range(0, len(forget), BLOCK):  # of a set that lies on a disk no more at a time
        block = forget[start : start + BLOCK]
        answers = [" ".join(example.answer.casefold().split()) for example in block]
        for own, other in enumerate(alike([example.question for example in block], answers)):
            if answers[other] != answers[own]:  # else half of the answers are the same
                source = block[other]
                yield replace(block[own], answer=source.answer, distractors=source.distractors, source_id="")
