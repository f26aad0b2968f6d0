"""WMDP: texts about biosecurity or cybersecurity to be unlearned, and the items that score it (arXiv 2403.03218)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_ssiuu.datamodules.base import QAExample
from lightning_ssiuu.datamodules.columns import Columns
from lightning_ssiuu.datamodules.documents import Document, Documents
from lightning_ssiuu.datamodules.multiple_choice import LETTER, ChoiceItem, choice_items
from lightning_ssiuu.datamodules.published import Published
from lightning_ssiuu.datamodules.readers import Record, read_records
from lightning_ssiuu.utils.errors import Given, UserError, check_choice
from lightning_ssiuu.utils.reading import reading

Domain = Literal["bio", "cyber"]
#: On the hub; the forget texts about biosecurity are given out on request.
_HUB = {
    "bio": {"forget": "cais/wmdp-bio-forget-corpus", "retain": "cais/wmdp-corpora:bio-retain-corpus"},
    "cyber": {"forget": "cais/wmdp-corpora:cyber-forget-corpus", "retain": "cais/wmdp-corpora:cyber-retain-corpus"},
}
#: What the harness's prompts say that the items are about.
ABOUT = {"bio": "biology", "cyber": "cybersecurity"}


class WMDP(Documents):
    """Forget and retain corpora of WMDP (Li et al. 2024, arXiv 2403.03218), and the items that it is scored by.

    Trained on are chunks of the corpora. The multiple-choice items (:meth:`items`) and those of MMLU (:meth:`mmlu`)
    are only scored (suite ``wmdp``), and refused as a forget or retain set: earlier versions of this class trained on
    the very items of the test.

    Verified in public text: names and columns of the data sets and files, 512 tokens a sequence (open-unlearning).
    Otherwise than in the paper's code, texts of less than 50 characters are not left out, long ones are not cut off,
    and what is kept are the published retain texts of the domain, where that code may take WikiText.

    Args:
        domain: ``"bio"`` or ``"cyber"``.
        path: Directory with ``{domain}-forget-corpus.jsonl`` (``bio_remove_dataset.jsonl``),
            ``{domain}-retain-corpus.jsonl``, ``{domain}_questions.json`` or ``wmdp-{domain}/test.json``, and
            ``mmlu.json``, or ``mmlu/all``; None: the hub.
        forget: Other texts to forget (see :class:`Documents`); None: those of ``path``.
        retain: Other texts to keep; None: those of ``path``.
        test_items: Other items than those of ``path``: a file or hub data set with ``question``, ``choices`` and
            ``answer``.
        mmlu_items: The same for MMLU, with a column ``subject``.
        chunk_tokens: Length of a sequence in tokens.
        prefix_tokens: As in :class:`Documents`; None: half of ``chunk_tokens``.
        template: What stands around an item's prompt and the letter that answers it.
        **kwargs: See :class:`Documents`. Prompts of items may be longer than a chunk: see ``max_length``.

    Raises:
        UserError: A set that is missing, or multiple-choice items given as texts.

    Example:
        >>> data = WMDP("cyber")
        >>> data.sources["forget"], data.about
        ('cais/wmdp-corpora:cyber-forget-corpus', 'cybersecurity')
    """

    def __init__(
        self,
        domain: Domain = "cyber",
        path: str | None = None,
        forget: str | None = None,
        retain: str | None = None,
        test_items: str | None = None,
        mmlu_items: str | None = None,
        chunk_tokens: int = 512,
        prefix_tokens: int | None = None,
        template: str = LETTER,
        **kwargs: Any,
    ) -> None:
        check_choice("domain", domain, Domain)
        prefix_tokens = max(1, chunk_tokens // 2) if prefix_tokens is None else prefix_tokens
        self.domain, self.about, self.path = domain, ABOUT[domain], path
        forget, retain = forget or self._corpus("forget"), retain or self._corpus("retain")
        lengths: dict[str, Any] = {"chunk_tokens": chunk_tokens, "prefix_tokens": prefix_tokens}
        super().__init__(forget, retain, template=template, **lengths, **kwargs)
        self.test_items, self.mmlu_items = test_items, mmlu_items
        self._reading = ""

    def items(self) -> list[ChoiceItem]:
        """The items of the domain: 1273 about biosecurity and 1987 about cybersecurity as published."""
        named = (f"{self.domain}_questions", f"wmdp-{self.domain}")
        return choice_items(self._table(self.test_items, "cais/wmdp", f"wmdp-{self.domain}", named), "test_items")

    def mmlu(self) -> list[ChoiceItem]:
        """Items of MMLU, each with its subject."""
        return choice_items(self._table(self.mmlu_items, "cais/mmlu", "all", ("mmlu",)), "mmlu_items")

    def named_set(self, name: str) -> Sequence[QAExample]:
        """The sets of the suite: ``items`` and ``mmlu``, asked for the letter of the right choice; and others."""
        if name == "items":
            return [item.example(number, self.about) for number, item in enumerate(self.items())]
        if name == "mmlu":
            return [item.example(number, item.about) for number, item in enumerate(self.mmlu())]
        return super().named_set(name)

    def _table(self, given: str | None, hub: str, config: str, named: Sequence[str]) -> Iterator[Record]:
        if given is not None:
            return read_records(given, "test_items" if hub == "cais/wmdp" else "mmlu_items")
        return Published(self.path or hub).records(config, "test", "path", named)

    def _corpus(self, name: str) -> str:
        if self.path is None:
            return _HUB[self.domain][name]
        stems = [f"{self.domain}-{name}-corpus", f"{self.domain}_{'remove' if name == 'forget' else name}_dataset"]
        with reading("path", self.path, "an existing directory"):
            folder = Path(self.path).expanduser()
            files = [folder / f"{stem}{suffix}" for stem in stems for suffix in (".jsonl", ".json", ".parquet")]
            found = next((file for file in files if file.is_file()), files[0])
        return str(found)

    def _read(self, source: str, argument: str) -> Iterator[Document]:
        self._reading = argument
        yield from super()._read(source, argument)

    def _rows(self, records: Iterable[Record]) -> Iterator[tuple[Columns, int, Record]]:
        for columns, number, record in super()._rows(records):
            if {"question", "choices"} <= record.keys():
                allowed = "texts with a column 'text': items with choices are only scored (test_items)"
                raise UserError(self._reading, Given("multiple-choice items"), allowed)
            yield columns, number, record
