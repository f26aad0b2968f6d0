"""What attacks share that ask otherwise and change nothing in the model: other wordings, other words around them."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_args

from lightning_ssiuu.attacks.base import Attack, Outcome, Target, forget_score
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.datamodules.chunks import Chunk
from lightning_ssiuu.datamodules.readers import Record, cell_text, read_records
from lightning_ssiuu.datamodules.splits import QAExample
from lightning_ssiuu.training.devices import Devices, Engine
from lightning_ssiuu.utils.errors import Given, UserError

T = TypeVar("T")
#: What a variant of a file may be called: it stands in ``attack.json``, where no text of the data belongs.
_LABEL = re.compile(r"[\w.-][\w .-]{0,39}")


@dataclass(frozen=True)
class Asked:
    """One variant of an attack: what the model was unlearned by, and groups of what is asked, with their weights.

    The score of a variant is the weighted mean of the groups' scores.
    """

    variant: str | None
    base: Sequence[QAExample]
    groups: Sequence[tuple[float, Sequence[QAExample]]]
    seed: int = 0

    @classmethod
    def once(cls, variant: str | None, base: Sequence[QAExample], asked: Sequence[QAExample], seed: int = 0) -> Asked:
        """Every example of ``base`` asked once in another way."""
        return cls(variant, base, [(1.0, asked)], seed)

    def __len__(self) -> int:
        return sum(len(group) for _, group in self.groups)


class Prompting(Attack):
    """An attack that asks the forget set in another way (:meth:`asked`) and scores the answers.

    Under the template that the model was unlearned with; ``before`` is the score of the same examples as they are.
    """

    engines: ClassVar[tuple[Engine, ...]] = get_args(Engine)

    @abstractmethod
    def asked(self, data: UnlearningDataModule) -> Sequence[Asked]:
        """What is asked, a variant and seed each; a :class:`UserError` where there is nothing to ask."""

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
        for asked in self.asked(data):
            for _, group in asked.groups:
                data.encoder.encode(group)  # what is too long is told before a model is loaded

    def run(
        self, targets: Sequence[Target], data: UnlearningDataModule, score: str, devices: Devices
    ) -> Iterator[Outcome]:
        several = self.asked(data)
        for target in targets:
            model, tokenizer = target.load(unchanged=True)
            known: dict[tuple[int, ...], float] = {}  # base questions that several variants share are scored once
            for asked in several:
                base = tuple(example.example_id for example in asked.base)
                if base not in known:
                    known[base] = forget_score(model, tokenizer, data, score, asked.base)
                scores = [(w, forget_score(model, tokenizer, data, score, group)) for w, group in asked.groups]
                after = math.fsum(w * value for w, value in scores) / math.fsum(w for w, _ in scores)
                more: dict[str, Any] = {"n_scored": len(asked), "seed": asked.seed}
                yield self.outcome(target, data, score, known[base], after, asked.variant, **more)
            del model  # before the next one is loaded


def questions_of(data: UnlearningDataModule, attack: Attack) -> Sequence[QAExample]:
    """The forget examples that are scored; chunks of documents, which ask nothing, are refused."""
    examples = data.to_score(data.splits.forget)
    if isinstance(examples[0], Chunk):
        allowed = f"questions with answers for attack {type(attack).__name__}"
        raise UserError("data", Given("chunks of documents"), allowed)
    return examples


def named_records(path: str, read: Callable[[Record, int], T]) -> dict[str, T]:
    """What ``read`` makes of the records of a file (of ``attack.path``), by their ``name``, else by number from 1."""
    argument = "attack.path"
    found: dict[str, T] = {}
    for number, record in enumerate(read_records(path, argument)):
        name = cell_text(record.get("name") or number + 1, number, "name", argument)
        check_label(name, "name", number)
        if name in found:
            raise UserError(argument, Given(f"the name of record {number} twice"), "records of different names")
        found[name] = read(record, number)
    if not found:
        raise UserError(argument, path, "a file with at least one record")
    return found


def check_label(label: str, column: str, number: int) -> None:
    """Refuse a variant's name in a file that may be text of the data: more than 40 letters, or other signs."""
    if not _LABEL.fullmatch(label):
        given = Given(f"another text in record {number} of {column!r}")
        raise UserError("attack.path", given, "names of at most 40 letters, digits, spaces, dots, hyphens")


def check_seeds(seeds: Iterable[int]) -> None:
    """Refuse an option ``seeds`` that is no list of whole numbers ≥ 0."""
    if isinstance(seeds, str) or not (given := list(seeds)) or any(type(s) is not int or s < 0 for s in given):
        raise UserError("attack.seeds", seeds, "at least one, all ≥ 0")
