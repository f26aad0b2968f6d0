"""MUSE: texts of news or books to be unlearned, and what they are scored by (arXiv 2407.06460)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from lightning_ssiuu.datamodules.base import QAExample
from lightning_ssiuu.datamodules.documents import Document, Documents
from lightning_ssiuu.datamodules.prompted import Prompted
from lightning_ssiuu.datamodules.published import Published
from lightning_ssiuu.datamodules.readers import column, rows
from lightning_ssiuu.datamodules.splits import numbered
from lightning_ssiuu.utils.errors import UserError

#: Configurations whose splits are texts to train on.
TEXTS = ("raw", "scal", "sust", "train")
#: Of what follows a prompt of verbmem.
NEW_TOKENS = 128
_SETS = "raw/forget, scal/forget_1 to scal/forget_4, sust/forget_1 to sust/forget_4"


class MUSE(Documents):
    """Forget and retain *texts* of MUSE (Shi et al. 2024, arXiv 2407.06460), and the sets that it is scored by.

    Trained on are chunks of ``raw/forget`` against ``raw/retain1``. For scalability take ``scal/forget_1`` to
    ``scal/forget_4`` (each holds the ones before), for sustainability ``sust/forget_1`` to ``sust/forget_4`` one after
    the other, each run beginning with the model of the last. :meth:`verbmem`, :meth:`knowmem` and :meth:`privleak` are
    only scored (suite ``muse``), and refused as a forget or retain set: earlier versions of this class trained on
    the questions of ``knowmem``, by which MUSE scores.

    Verified in the published code and data: the sets, their names and columns; 2048 tokens a sequence; ``retain1`` as
    the set to be kept. Otherwise than there, an article or chapter is cut by itself, and not the whole corpus joined.

    Args:
        path: ``muse-bench/MUSE-News``, ``muse-bench/MUSE-Books``, or a directory with the published files
            (``raw/forget.json`` and so on, lists of texts or tables with a column ``text``).
        forget: The texts to forget, as ``configuration/split``.
        retain: Those to keep.
        test: Others that were not trained on while unlearning, such as ``raw/retain2``; None: no test set.
        chunk_tokens: Length of a sequence in tokens.
        prefix_tokens: As in :class:`Documents`; None: half of ``chunk_tokens``.
        **kwargs: See :class:`Documents`.

    Raises:
        UserError: A set that is no text, or that is not there.

    Example:
        >>> MUSE("muse-bench/MUSE-Books", forget="raw/forget").sources["retain"]
        'raw/retain1'
        >>> MUSE(forget="knowmem/forget_qa")
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: forget: got 'knowmem/forget_qa', allowed: texts of MUSE (raw/forget, \
scal/forget_1 to scal/forget_4, sust/forget_1 to sust/forget_4): its questions are only scored; CustomData unlearns \
questions and answers
    """

    def __init__(
        self,
        path: str = "muse-bench/MUSE-News",
        forget: str = "raw/forget",
        retain: str = "raw/retain1",
        test: str | None = None,
        chunk_tokens: int = 2048,
        prefix_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        prefix_tokens = max(1, chunk_tokens // 2) if prefix_tokens is None else prefix_tokens
        super().__init__(forget, retain, test, chunk_tokens=chunk_tokens, prefix_tokens=prefix_tokens, **kwargs)
        for argument, name in (("forget", forget), ("retain", retain), ("test", test)):
            if name is not None and name.partition("/")[0] not in TEXTS:
                allowed = f"texts of MUSE ({_SETS}): its questions are only scored; CustomData unlearns questions and"
                raise UserError(argument, name, f"{allowed} answers")
        self.published = Published(path)

    def verbmem(self) -> Sequence[QAExample]:
        """Beginnings of forget texts with what follows them: ``prompt`` and ``gt``."""
        columns = [partial(column, name=name, argument="verbmem") for name in ("prompt", "gt")]
        return numbered(0, rows(self.published.records("verbmem", "forget", "verbmem"), *columns))

    def knowmem(self, split: str) -> tuple[Sequence[QAExample], Sequence[QAExample]]:
        """Questions about the forget (``forget_qa``) or retain texts (``retain_qa``), and the examples before each."""
        columns = [partial(column, name=name, argument=split) for name in ("question", "answer")]
        asked, shown = (
            numbered(0, rows(self.published.records("knowmem", name, split), *columns))
            for name in (split, f"{split}_icl")
        )
        return asked, shown

    def privleak(self, split: str) -> list[str]:
        """Texts to tell apart by how likely they are: ``forget``, or ``holdout``, which no model was trained on."""
        return list(column(self.published.records("privleak", split, "privleak"), "text", "privleak"))

    def named_set(self, name: str) -> Sequence[QAExample]:
        """Sets of the suite: ``verbmem``, ``forget_qa``, ``retain_qa``, ``mia_forget``, ``mia_holdout``; and others.

        As in the published code: of ``verbmem`` the first 128 tokens of what follows; before a question the examples,
        each as ``Question: ...``, ``Answer: ...`` and a blank line.
        """
        make = Prompted(self.tokenizer)
        if name == "verbmem":
            return [make(e.example_id, e.question, e.question, e.answer, NEW_TOKENS) for e in self.verbmem()]
        if name in ("forget_qa", "retain_qa"):
            asked, shown = self.knowmem(name)
            before = "".join(f"Question: {e.question}\nAnswer: {e.answer}\n\n" for e in shown)
            prompts = (f"{before}Question: {e.question}\nAnswer: " for e in asked)
            return [make(e.example_id, e.question, prompt, e.answer) for e, prompt in zip(asked, prompts, strict=True)]
        if name in ("mia_forget", "mia_holdout"):
            texts = self.privleak(name.removeprefix("mia_"))
            return [make.text(number, text) for number, text in enumerate(texts)]
        return super().named_set(name)

    def _read(self, source: str, argument: str) -> Iterator[Document]:
        config, _, split = source.partition("/")
        if argument not in ("forget", "retain", "test") or config not in TEXTS:
            yield from super()._read(source, argument)
            return
        for row in self._rows(self.published.records(config, split, argument)):
            for number, text in self._documents(*row):
                yield f"{source} {number}", text
