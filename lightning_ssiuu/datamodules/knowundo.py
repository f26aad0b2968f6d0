"""KnowUnDo: copyrighted texts and private facts, with neighbours that are to stay (arXiv 2407.01920)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.published import Published
from lightning_ssiuu.datamodules.readers import cell_of, cell_text, from_json
from lightning_ssiuu.datamodules.splits import numbered
from lightning_ssiuu.utils.errors import Given, UserError, check_choice

KnowUnDoDomain = Literal["copyright", "privacy"]


class KnowUnDo(UnlearningDataModule):
    r"""KnowUnDo (Tian et al. 2024, arXiv 2407.01920): questions about what must be unlearned and what is to be kept.

    Trained on are the halves ``train`` of the splits ``unlearn`` and ``retention``; their halves ``val`` are other
    questions about the same, and only scored (:meth:`scored`, suite ``knowundo``).

    Verified in the published code: configurations and splits, one record with the lists ``train`` and ``val`` of
    ``{"text", "labels"}``, question and answer with a blank line between them and nothing else around, labels on the
    answer and the blank line. There a sequence ends without an end token.

    Args:
        path: ``zjunlp/KnowUnDo``, or a directory with ``copyright/unlearn.json`` and so on.
        domain: ``"copyright"`` or ``"privacy"``.
        template: What stands around question and answer.
        **kwargs: See :class:`UnlearningDataModule`.

    Raises:
        UserError: A file is missing or of another format.

    Example:
        >>> KnowUnDo(domain="privacy").template
        '{question}\n\n{answer}'
    """

    def __init__(
        self,
        path: str = "zjunlp/KnowUnDo",
        domain: KnowUnDoDomain = "copyright",
        template: str = "{question}\n\n{answer}",
        **kwargs: Any,
    ) -> None:
        super().__init__(template=template, **kwargs)
        check_choice("domain", domain, KnowUnDoDomain)
        self.published, self.domain = Published(path), domain

    def load_splits(self) -> Splits:
        forget = numbered(0, self._pairs("unlearn", "train"))
        asked = {example.folded for example in forget}
        kept = (pair for pair in self._pairs("retention", "train") if QAExample(0, *pair).folded not in asked)
        return Splits(forget, numbered(len(forget), kept))

    def scored(self, split: str) -> Sequence[QAExample]:
        """The questions that are only scored: ``unlearn`` or ``retention``."""
        return numbered(0, self._pairs(split, "val"))

    def named_set(self, name: str) -> Sequence[QAExample]:
        """The sets of the suite: ``unlearn_val`` and ``retention_val``, asked as ``template`` has it; and others."""
        if name in ("unlearn_val", "retention_val"):
            return self.scored(name.removesuffix("_val"))
        return super().named_set(name)

    def _pairs(self, split: str, half: str) -> Iterator[tuple[str, str]]:
        for record in self.published.records(self.domain, split, "path"):
            if "text" in record and half == "train":
                raise UserError("path", Given(f"records with 'text' in {split}"), "a record with train and val")
            listed = from_json(cell_of(record, half, "path"))
            if isinstance(listed, Mapping):  # as some readers give lists of structs
                listed = [dict(zip(listed, values, strict=True)) for values in zip(*listed.values(), strict=True)]
            if not isinstance(listed, (list, tuple)) or not all(isinstance(row, Mapping) for row in listed):
                raise UserError("path", Given(f"{half!r} of {split}"), "a list of records with text and labels")
            for number, row in enumerate(listed):
                text, labels = (
                    cell_text(cell_of(dict(row), name, "path"), number, name, "path") for name in ("text", "labels")
                )
                yield text, labels
