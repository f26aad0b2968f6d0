"""What a suite is: figures by name, each made of values by example, of other figures, or of a reference's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from lightning_ssiuu.datamodules import QAExample, UnlearningDataModule
from lightning_ssiuu.utils.errors import Given, UserError
from lightning_ssiuu.utils.registry import nearest

#: A figure in a log: ``agg_value``, and what it is made of by example, as open-unlearning writes it.
Entry = dict[str, Any]
#: Figures by name.
Log = Mapping[str, Entry]
#: One value for each example, or one for each of its answers.
Values = Sequence[Any]


@dataclass(frozen=True)
class Reading:
    """Values by example: a score or a membership signal on a set.

    Args:
        of: Name of a set, alone or as ``set/answers``, where other answers than the true ones are scored
            (:data:`ANSWERS`): ``forget/rephrased``.
        score: Name of a score (:data:`~lightning_ssiuu.evaluation.scores.SCORES`) or of a signal
            (:data:`~lightning_ssiuu.evaluation.signals.SIGNALS`), with its options.
    """

    of: str
    score: str

    @property
    def set(self) -> str:
        """The set without what is asked of it."""
        return self.of.partition("/")[0]

    def answers(self, example: QAExample) -> str | Sequence[str] | None:
        """The answer or answers to score; None: the true one."""
        _, asked, name = self.of.partition("/")
        return ANSWERS[name](example) if asked else None


#: What is scored as the answers of an example, by the name behind a set's.
ANSWERS: dict[str, Callable[[QAExample], str | Sequence[str]]] = {
    "rephrased": lambda example: example.rephrased,
    "wrong": lambda example: example.distractors,
}


class Figure(ABC):
    """How a figure of a suite is made; a frozen dataclass whose fields say of what.

    Figures are in the units of the suite's benchmark, fractions or percent.
    """

    #: Whether it can only be had beside a reference.
    needs_reference: ClassVar[bool] = False

    @property
    def readings(self) -> Sequence[Reading]:
        """What has to be read off the model."""
        return ()

    @property
    def made_of(self) -> Sequence[str]:
        """Other figures of the suite that it needs."""
        return ()

    @property
    def of_reference(self) -> Sequence[str]:
        """Figures of the reference that it is compared with."""
        return ()

    @abstractmethod
    def entry(self, values: Mapping[Reading, Values], log: Log, reference: Log | None) -> Entry:
        """The figure, of the values read, the figures before it and those of the reference.

        Its ``agg_value`` is None where there is no such number.
        """


@dataclass(frozen=True)
class Suite:
    """A benchmark's own protocol.

    Args:
        name: What ``evaluate --suite`` takes.
        data: The benchmark's data module, which knows the sets (:meth:`UnlearningDataModule.named_set`).
        figures: By the names under which they are written, each after those it is made of.
        shown: Names of the figures that are printed; the others are only in the log.
        log: Name of the log: ``{log}_EVAL.json``.
        optional: Figures that are measured where they are named alone.
        renders: Whether the benchmark says how its sets are asked; else they are asked as a run's are.
        only_scored: Sets that must not have been trained on (:func:`~lightning_ssiuu.datamodules.trained_on`).
        forgotten: Sets that a reference must not have been trained on.

    Example:
        >>> from lightning_ssiuu import TOFU
        >>> from lightning_ssiuu.evaluation.suites.figures import Mean
        >>> suite = Suite("mine", TOFU, {"forget_ROUGE": Mean("forget", "rouge_l(new_tokens=64)")})
        >>> suite.wanted()
        ['forget_ROUGE']
    """

    name: str
    data: type[UnlearningDataModule]
    figures: Mapping[str, Figure]
    shown: Sequence[str] = ()
    log: str = ""
    optional: Sequence[str] = field(default=())
    renders: bool = False
    only_scored: Sequence[str] = field(default=())
    forgotten: Sequence[str] = field(default=())

    def classifying(self, classifier: str) -> Suite:
        """The suite with its figures that ask a classifier, which ask this one (directory or hub id)."""
        figures: dict[str, Any] = dict(self.figures)
        asking = {
            name: replace(figure, classifier=classifier)
            for name, figure in figures.items()
            if hasattr(figure, "classifier")
        }
        if not asking:
            raise UserError("classifier", classifier, f"null: the suite {self.name} asks none")
        optional = tuple(name for name in self.optional if name not in asking)
        return replace(self, figures=figures | asking, optional=optional)

    @property
    def log_name(self) -> str:
        """Name of the log's file."""
        return f"{self.log or self.name.upper()}_EVAL.json"

    def wanted(self, names: Iterable[str] | None = None, reference: bool = False) -> list[str]:
        """The figures that are measured for these (None: all but the optional ones), in the suite's order.

        ``reference``: whether there is one; figures that need it are left out otherwise, unless they are named.

        Raises:
            UserError: A name that the suite does not have, or no name.
        """
        if names is None:
            names = [n for n, f in self.figures.items() if n not in self.optional]
            names = [n for n in names if reference or not self.figures[n].needs_reference]
        found: set[str] = set()
        if not (ahead := list(names)):
            raise UserError("figures", [], f"null, or figures of the suite {self.name}: {', '.join(self.figures)}")
        while ahead:
            name = ahead.pop()
            if name not in self.figures:
                meant = nearest(name, self.figures)
                allowed = f"figures of the suite {self.name}: {', '.join(self.figures)}"
                raise UserError("figures", name, allowed + (f" ({meant})" if meant else ""))
            if name not in found:
                found.add(name)
                ahead += self.figures[name].made_of
        return [name for name in self.figures if name in found]

    def of_reference(self, names: Iterable[str]) -> list[str]:
        """The figures of a reference that these are compared with."""
        return list(dict.fromkeys(n for name in names for n in self.figures[name].of_reference))

    def readings(self, names: Iterable[str]) -> list[Reading]:
        """What has to be read off a model for these figures."""
        return list(dict.fromkeys(r for name in names for r in self.figures[name].readings))


def entry_of(log: Log | None, name: str, argument: str = "reference") -> Entry:
    """A figure of a reference's log.

    Raises:
        UserError: If the log does not have it.
    """
    found = None if log is None else log.get(name)
    if not isinstance(found, dict):
        raise UserError(argument, Given(f"a log without {name}"), f"one with {name}, or a model")
    return found
