"""TOFU: question–answer pairs about fictitious authors (Maini et al. 2024, arXiv 2401.06121)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from lightning_ssiuu.datamodules.paired import PairedFiles
from lightning_ssiuu.datamodules.splits import QAExample
from lightning_ssiuu.datamodules.spooled import kept
from lightning_ssiuu.utils.errors import UserError, check_choice

Split = Literal["forget01", "forget05", "forget10"]
Wording = Literal["question", "paraphrased_question"]
#: What is left of TOFU without a forget set.
RETAIN: dict[Split, str] = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
_PERTURBED = "_perturbed"
#: Sets that are the same for every split, by their names in suites.
_SETS = {"retain": "retain_perturbed", "real_authors": "real_authors_perturbed", "world_facts": "world_facts_perturbed"}


class TOFU(PairedFiles):
    """TOFU (arXiv 2401.06121) from a local directory or the hub.

    The test set is cut from the retain file: the first ``retain_size`` items are the retain set and the ``test_size``
    that follow the test set. Perturbed answers, where the file has them, become distractors, and paraphrased ones what
    truth ratios compare them with. ``multiple_choice`` is off: TOFU scores generated text (ROUGE-L recall).

    Its suite (``evaluate --suite tofu``) scores files of their own, found by ``forget``: of ``forget01`` it is
    ``forget01_perturbed`` and ``holdout01``, of all splits ``retain_perturbed``, ``real_authors_perturbed`` and
    ``world_facts_perturbed``.

    Args:
        path: A directory with ``{forget}.json`` and ``{retain}.json`` (or ``.jsonl``, ``.csv``, ``.parquet``), or a hub
            id; None: ``locuslab/TOFU``.
        forget: Name of the forget file or hub configuration, e.g. ``forget01``, ``forget05``, ``forget10_perturbed``;
            None: the ``split``'s.
        retain: Name of the retain file or hub configuration, e.g. ``retain99``; None: the ``split``'s.
        split: ``forget01``, with ``retain99``, ``forget05``, with ``retain95``, or ``forget10``, with ``retain90``.
        question: The column that is asked: ``question``, or ``paraphrased_question``, which the perturbed files have;
            files without it are asked by ``question``, but the forget set has to have it. The other wording is then
            the example's paraphrase. TOFU's own figures are those of ``question``.
        **kwargs: ``retain_size``, ``test_size`` (:class:`~.paired.PairedFiles`) and the options of
            :class:`UnlearningDataModule`.

    Example:
        A tenth of the authors forgotten, with multiple choice, and 400 of the others' questions as test set:

        >>> data = TOFU(forget="forget10_perturbed", retain="retain90", test_size=400, multiple_choice=True)
        >>> data.hub_id
        'locuslab/TOFU'
        >>> data = TOFU(split="forget05")
        >>> data.forget, data.retain, data.file_of("holdout")
        ('forget05', 'retain95', 'holdout05')
    """

    hub_id = "locuslab/TOFU"

    def __init__(
        self,
        path: str | None = None,
        forget: str | None = None,
        retain: str | None = None,
        *args: Any,
        split: Split = "forget01",
        question: Wording = "question",
        **kwargs: Any,
    ) -> None:
        check_choice("split", split, Split)
        check_choice("question", question, Wording)
        self.split, self.question = split, question
        super().__init__(path, forget or split, retain or RETAIN[split], *args, **kwargs)

    def file_of(self, name: str) -> str | None:
        """Name of the file or hub configuration of a set that the suite scores; None where there is none."""
        split = self.forget.removesuffix(_PERTURBED)
        if name == "forget":
            return f"{split}{_PERTURBED}"
        if name == "holdout":
            return split.replace("forget", "holdout") if split in get_args(Split) else f"holdout{self.split[-2:]}"
        return _SETS.get(name)

    def named_set(self, name: str) -> Sequence[QAExample]:
        if (file := self.file_of(name)) is None:
            return super().named_set(name)
        found = self._examples(file, "path")
        if not found:
            raise UserError("path", file, "a file with examples")
        return found

    def _examples(self, name: str, argument: str, first_id: int = 0) -> Sequence[QAExample]:
        found = super()._examples(name, argument, first_id)
        if self.question == "question":
            return found
        if name in (self.forget, self.file_of("forget")) and not all(example.paraphrases for example in found):
            raise UserError("question", self.question, f"question: {name} has no such column")
        return kept(_reworded(example) if example.paraphrases else example for example in found)


def _reworded(example: QAExample) -> QAExample:
    asked, *others = example.paraphrases
    return replace(example, question=asked, paraphrases=(example.question, *others))
