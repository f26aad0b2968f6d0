"""Question–answer examples and the four sets they form; nothing here ever shows text."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from lightning_ssiuu.utils.errors import Given, UserError


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
        """
        for name, examples in self.items()[:2]:
            if not examples:
                raise UserError(name, Given("0 examples"), "at least one example")
        uses = Counter(example.example_id for _, examples in self.items() for example in examples)
        if twice := [example_id for example_id, count in uses.items() if count > 1]:
            raise UserError("example_id", Given(f"{name_ids(twice)} used more than once"), "unique ids over all sets")
        for name, examples in self.items():
            if blank := [e.example_id for e in examples if not (e.question.strip() and e.answer.strip())]:
                raise UserError(name, Given(f"blank question or answer in {name_ids(blank)}"), "non-empty text")
        set_of: dict[str, str] = {}
        for name, examples in self.items()[:3]:
            sets = [(set_of.setdefault(example.folded, name), example.example_id) for example in examples]
            earlier = next((other for other, _ in sets if other != name), None)
            if earlier is not None:
                ids = [example_id for other, example_id in sets if other == earlier]
                given = Given(f"{len(ids)} questions that are also in {earlier} ({name_ids(ids)})")
                raise UserError(name, given, f"questions disjoint from {earlier}")


def name_ids(ids: Sequence[int]) -> str:
    """Name examples by id, the first few only."""
    return f"example ids {first_few(ids)}"


def first_few(items: Sequence[object], n: int = 5) -> str:
    """The first ``n`` items of a list, and how many more there are."""
    return ", ".join(map(str, items[:n])) + (f" and {len(items) - n} more" if len(items) > n else "")


def numbered(first_id: int, *columns: Sequence) -> list[QAExample]:
    """Examples from columns in the order of :class:`QAExample`'s fields after the id, numbered from ``first_id`` on."""
    return [QAExample(first_id + n, *row) for n, row in enumerate(zip(*columns, strict=True))]
