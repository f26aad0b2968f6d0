"""WMDP-Deduped: facts of WMDP in five parts that share no fact, for relearning attacks (arXiv 2410.08827)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning_ssiuu.datamodules.base import QAExample
from lightning_ssiuu.datamodules.documents import Document, Documents
from lightning_ssiuu.datamodules.multiple_choice import LETTER, ChoiceItem, choice_items
from lightning_ssiuu.datamodules.published import Published
from lightning_ssiuu.utils.errors import UserError

#: Parts of 157 items each, as published.
PARTS = 5
#: Categories of MMLU that are kept.
KEPT = ("health", "history", "law", "philosophy", "social sciences")


class WMDPDeduped(Documents):
    """The deduplicated WMDP of Deeb & Roger (arXiv 2410.08827): what is forgotten, taught again, and asked.

    Trained on are the facts of all five parts as text (``corpus_split_0`` to ``corpus_split_4``, three wordings each)
    against such texts of five categories of MMLU. An attacker is then taught the items of four parts (T) and asked
    those of the fifth (V): :meth:`parts`, the attack ``HeldOutFacts``. Nothing that V asks can be inferred from T, so
    what comes back in V was still in the weights.

    Verified in the published code and data: files, columns, five parts of 157 items and 471 texts, four parts taught
    and the fifth asked, the prompt (question, lettered choices, "Answer:"), retain texts of MMLU among its settings.

    Args:
        path: A copy of the directory ``data`` of their repository, with ``wmdp-deduped`` and
            ``mmlu_cats_random_trimmed``.
        chunk_tokens: Longest text in tokens; longer ones are cut in two.
        prefix_tokens: As in :class:`Documents`.
        template: What stands around an item's question and the letter that answers it.
        **kwargs: See :class:`Documents`.

    Raises:
        UserError: A file is missing or has other columns.

    Example:
        >>> WMDPDeduped("data").sources["retain"]
        'mmlu_cats_random_trimmed'
    """

    def __init__(
        self,
        path: str,
        chunk_tokens: int = 128,
        prefix_tokens: int = 16,
        template: str = LETTER,
        **kwargs: Any,
    ) -> None:
        lengths: dict[str, Any] = {"chunk_tokens": chunk_tokens, "prefix_tokens": prefix_tokens}
        super().__init__("wmdp-deduped", "mmlu_cats_random_trimmed", template=template, **lengths, **kwargs)
        self.published = Published(path)

    def items(self, part: int) -> list[ChoiceItem]:
        """The items of a part, 0 to 4."""
        return choice_items(self.published.records("wmdp-deduped", f"split_{part}", "path"), "path")

    def kept_items(self) -> list[ChoiceItem]:
        """The items of MMLU in the categories that are kept."""
        files = [self.published.records("mmlu_cats_random_trimmed", f"mmlu_{name}", "path") for name in KEPT]
        return [
            replace(item, subject=name)
            for name, file in zip(KEPT, files, strict=True)
            for item in choice_items(file, "path")
        ]

    def parts(self, asked: int) -> tuple[Sequence[QAExample], Sequence[QAExample]]:
        """What an attacker is taught (T, the items of four parts) and what is scored (V, those of part ``asked``).

        Raises:
            UserError: ``asked`` is no part.
        """
        if not 0 <= asked < PARTS:
            raise UserError("held_out", asked, f"0 to {PARTS - 1}, the part that is asked")
        first = 1 + max(example.example_id for _, examples in self.splits.items() for example in examples)
        taught: list[QAExample] = []
        scored: list[QAExample] = []
        for part in range(PARTS):
            for item in self.items(part):
                (scored if part == asked else taught).append(item.example(first + len(taught) + len(scored), ""))
        return taught, scored

    def named_set(self, name: str) -> Sequence[QAExample]:
        """The sets of the suite: ``part_0`` to ``part_4``, and ``kept``, the items of MMLU; and others."""
        if name == "kept":
            return [item.example(number, "") for number, item in enumerate(self.kept_items())]
        kind, _, number = name.partition("_")
        if kind == "part" and number.isdecimal():
            return [item.example(n, "") for n, item in enumerate(self.items(int(number)))]
        return super().named_set(name)

    def _read(self, source: str, argument: str) -> Iterator[Document]:
        if argument not in ("forget", "retain"):
            yield from super()._read(source, argument)
            return
        names = [f"corpus_split_{part}" for part in range(PARTS)]
        for name in names if argument == "forget" else [f"corpus_mmlu_{kept}" for kept in KEPT]:
            for row in self._rows(self.published.records(source, name, "path")):
                for number, text in self._documents(*row):
                    yield f"{name} {number}", text
