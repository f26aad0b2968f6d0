"""Question–answer examples and the four sets they form; nothing here ever shows text."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from lightning_ssiuu.utils.errors import Given, UserError

_SHOWN = 5  # ids named in a message before the rest is only counted


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

    Example:
        >>> QAExample(3, "Who?", "Me")  # the text stays private
        QAExample(example_id=3)
    """

    example_id: int
    question: str
    answer: str
    distractors: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    group: str = ""

    def __repr__(self) -> str:
        return f"QAExample(example_id={self.example_id})"

    @property
    def folded(self) -> str:
        """The question without differences of case and white space; two sets may not share one."""
        return " ".join(self.question.casefold().split())


@dataclass(frozen=True, repr=False)
class Splits:
    """The sets of a benchmark.

    Args:
        forget: What must be unlearned.
        retain: What is trained to be kept while unlearning.
        test: Never trained on; measures the knowledge that was not in the retain set.
        benign: Harmless question–answer items for the benign relearning attack.

    Example:
        >>> Splits(forget=[QAExample(0, "Who?", "Me")], retain=[QAExample(1, "Where?", "Here")])
        Splits(forget=1, retain=1, test=0, benign=0)
    """

    forget: list[QAExample]
    retain: list[QAExample]
    test: list[QAExample] = field(default_factory=list)
    benign: list[QAExample] = field(default_factory=list)

    def __repr__(self) -> str:
        return "Splits(" + ", ".join(f"{name}={len(examples)}" for name, examples in self.items()) + ")"

    def items(self) -> list[tuple[str, list[QAExample]]]:
        """Name and examples of each set, in the order forget, retain, test, benign."""
        return [("forget", self.forget), ("retain", self.retain), ("test", self.test), ("benign", self.benign)]

    def sha256(self) -> str:
        """Hex digest of the canonical JSON of all sets: the provenance of the data, without its text."""
        record = {name: [asdict(example) for example in examples] for name, examples in self.items()}
        text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def validate(self) -> None:
        """Check what every benchmark must satisfy.

        Raises:
            UserError: Empty forget or retain set, an id used twice, a blank question or answer, or a question that
                stands in two of forget, retain and test (case and white space do not count). Names ids and counts only.

        Example:
            >>> Splits(forget=[], retain=[QAExample(1, "Where?", "Here")]).validate()
            Traceback (most recent call last):
            ...
            lightning_ssiuu.UserError: forget: got 0 examples, allowed: at least one example
        """
        for name, examples in self.items()[:2]:
            if not examples:
                raise UserError(name, Given("0 examples"), "at least one example")
        uses = Counter(example.example_id for _, examples in self.items() for example in examples)
        twice = [example_id for example_id, count in uses.items() if count > 1]
        if twice:
            raise UserError("example_id", Given(f"{name_ids(twice)} used more than once"), "unique ids over all sets")
        for name, examples in self.items():
            blank = [e.example_id for e in examples if not (e.question.strip() and e.answer.strip())]
            if blank:
                raise UserError(name, Given(f"blank question or answer in {name_ids(blank)}"), "non-empty text")
        self._check_disjoint()

    def _check_disjoint(self) -> None:
        first_set: dict[str, str] = {}
        for name, examples in self.items()[:3]:
            met: dict[str, list[int]] = {}
            for example in examples:
                earlier = first_set.setdefault(example.folded, name)
                if earlier != name:
                    met.setdefault(earlier, []).append(example.example_id)
            for earlier, ids in met.items():
                given = Given(f"{len(ids)} questions that are also in {earlier} ({name_ids(ids)})")
                raise UserError(name, given, f"questions disjoint from {earlier}")


def name_ids(ids: Iterable[int]) -> str:
    """Name examples by id, the first few only.

    Example:
        >>> name_ids(range(7))
        'example ids 0, 1, 2, 3, 4 and 2 more'
    """
    ids = list(ids)
    shown = ", ".join(str(example_id) for example_id in ids[:_SHOWN])
    return f"example ids {shown}" + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")
