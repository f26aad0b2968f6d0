"""Question–answer examples and the four sets they form; nothing here ever shows text."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lightning_ssiuu.datamodules.spooled import kept
from lightning_ssiuu.utils.errors import Given, UserError

_DIGEST = 16  # bytes: no two questions of however large a set have the same one


@dataclass(frozen=True, repr=False)
class QAExample:
    """One question with its answer.

    Args:
        example_id: Number unique over all sets of a data module.
        question: The question, without any template.
        answer: The true answer.
        distractors: Wrong answers, for multiple choice.
        paraphrases: Other wordings of the question.
        group: What the example belongs to, e.g. a person; free text.
        history: What was said before the question, as ``(role, text)``; roles are ``system``, ``user`` and
            ``assistant``.
        rephrased: The true answer in other words, where a benchmark compares wrong answers with that; else empty.
        source_id: The id that the data give the example, a hash of it where it is not to be shown; several may share
            one.

    Example:
        >>> QAExample(3, "Who?", "Me")  # the text stays private
        QAExample(example_id=3)
        >>> QAExample(3, "Who?", "Me", source_id="customer 17").name
        'customer 17'
    """

    example_id: int
    question: str
    answer: str
    distractors: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    group: str = ""
    history: tuple[tuple[str, str], ...] = ()
    source_id: str = ""
    rephrased: str = ""

    def __repr__(self) -> str:
        return f"QAExample(example_id={self.example_id})"

    @property
    def name(self) -> str:
        """What the example is called in messages and reports: by its own id, else by its number."""
        return self.source_id or str(self.example_id)

    @property
    def blank(self) -> bool:
        """Whether there is no question or no answer."""
        return not (self.question.strip() and self.answer.strip())

    @property
    def folded(self) -> str:
        """The question without differences of case and white space, after what was said before it.

        Two sets may not share one.
        """
        return " ".join(" ".join([*(text for _, text in self.history), self.question]).casefold().split())


@dataclass(frozen=True, repr=False)
class Splits:
    """The sets of a benchmark: lists, or other sequences that cannot be changed (:class:`~.spooled.Spooled`).

    Args:
        forget: What must be unlearned.
        retain: What is trained to be kept while unlearning.
        test: Never trained on; measures the knowledge that was not in the retain set.
        benign: Harmless question–answer items for the benign relearning attack.

    Example:
        >>> Splits(forget=[QAExample(0, "Who?", "Me")], retain=[QAExample(1, "Where?", "Here")])
        Splits(forget=1, retain=1, test=0, benign=0)
    """

    forget: Sequence[QAExample]
    retain: Sequence[QAExample]
    test: Sequence[QAExample] = field(default_factory=list)
    benign: Sequence[QAExample] = field(default_factory=list)

    def __repr__(self) -> str:
        return "Splits(" + ", ".join(f"{name}={len(examples)}" for name, examples in self.items()) + ")"

    def items(self) -> list[tuple[str, Sequence[QAExample]]]:
        """Name and examples of each set, in the order forget, retain, test, benign."""
        return [("forget", self.forget), ("retain", self.retain), ("test", self.test), ("benign", self.benign)]

    def sha256(self) -> str:
        """Hex digest of the canonical JSON of all sets: the provenance of the data, without its text."""
        digest = hashlib.sha256()
        for before, (name, examples) in zip("{,,,", sorted(self.items()), strict=True):
            digest.update(f'{before}"{name}":['.encode())
            for number, example in enumerate(examples):
                fields = asdict(example)
                del fields["source_id"]  # what an example is called is not what it says
                for name in ("history", "rephrased"):
                    if not fields[name]:  # digests of earlier versions, whose examples had none, stay
                        del fields[name]
                text = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
                digest.update(("," * (number > 0) + text).encode())
            digest.update(b"]")
        digest.update(b"}")
        return digest.hexdigest()

    def validate(self) -> None:
        """Check what every benchmark must satisfy.

        Raises:
            UserError: Empty forget or retain set, an id used twice, a blank question or answer, or a question that
                stands in two of forget, retain and test (case and white space do not count). Names ids and counts only.
        """
        for name, examples in self.items()[:2]:
            if not examples:
                raise UserError(name, Given("0 examples"), "at least one example")
        contents = {name: _Content(examples) for name, examples in self.items()}
        every = np.concatenate([np.asarray(content.ids) for content in contents.values()])
        ids, first, counts = np.unique(every, return_index=True, return_counts=True)
        if len(twice := ids[counts > 1][np.argsort(first[counts > 1])]):
            given = Given(f"{name_ids(twice.tolist())} used more than once")
            raise UserError("example_id", given, "unique ids over all sets")
        for name, content in contents.items():
            if content.blank:
                given = Given(f"blank question or answer in {name_ids(content.blank)}")
                raise UserError(name, given, "non-empty text")
        for name, earlier in (("retain", ["forget"]), ("test", ["forget", "retain"])):
            own = contents[name]
            shared = {other: np.flatnonzero(np.isin(own.questions, contents[other].questions)) for other in earlier}
            if found := [other for other in earlier if len(shared[other])]:
                other = min(found, key=lambda other: shared[other][0])
                examples = dict(self.items())[name]
                same = [examples[place].name for place in shared[other].tolist()]
                given = Given(f"{len(same)} questions that are also in {other} ({name_ids(same)})")
                raise UserError(name, given, f"questions disjoint from {other}")


class _Content:
    """What one pass over a set says of it: ids, the names of blank examples, and digests of the questions."""

    def __init__(self, examples: Iterable[QAExample]) -> None:
        self.ids, digests = array("q"), bytearray()
        self.blank: list[str] = []
        for example in examples:
            self.ids.append(example.example_id)
            if example.blank:
                self.blank.append(example.name)
            text = example.folded.encode(errors="surrogatepass")
            digests += hashlib.blake2b(text, digest_size=_DIGEST).digest()
        self.questions = np.frombuffer(bytes(digests), f"S{_DIGEST}") if digests else np.empty(0, f"S{_DIGEST}")


def name_ids(ids: Sequence[object]) -> str:
    """Name examples by id (:attr:`QAExample.name`), each id once and the first few only."""
    return f"example ids {first_few(list(dict.fromkeys(ids)))}"


def first_few(items: Sequence[object], n: int = 5) -> str:
    """The first ``n`` items of a list, and how many more there are."""
    return ", ".join(map(str, items[:n])) + (f" and {len(items) - n} more" if len(items) > n else "")


def numbered(first_id: int, rows: Iterable[Sequence[Any]]) -> Sequence[QAExample]:
    """Examples from rows in the order of :class:`QAExample`'s fields after the id, numbered from ``first_id`` on."""
    return kept(QAExample(first_id + n, *row) for n, row in enumerate(rows))
