"""RWKU: famous people to be unlearned without a forget corpus of one's own (arXiv 2406.10890)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_ssiuu.datamodules.base import QAExample
from lightning_ssiuu.datamodules.documents import Document, Documents
from lightning_ssiuu.datamodules.prompted import Prompted
from lightning_ssiuu.datamodules.published import Published
from lightning_ssiuu.datamodules.readers import Record, cell_of, cell_text
from lightning_ssiuu.utils.errors import UserError, check_choice

Corpus = Literal["llama3", "phi3"]
#: The names of files that the published preparation writes, where they are not those of the hub.
_FILES = {
    "train_positive_llama3": "positive",
    "train_positive_phi3": "positive_phi",
    "mia_forget": "forget_mia",
    "mia_retain": "retain_mia",
}
#: Sets of questions: whether a set is about what is forgotten, and its level.
PROBES = ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1", "neighbor_level2")
#: What is asked for, by whether there is a blank to fill.
ASKED = {
    True: "Please complete the blank in the following question.",
    False: "Please briefly answer the following question.",
}


@dataclass(frozen=True, repr=False)
class Probe:
    """A question of RWKU: a blank to fill (level 1), a question (2) or an adversarial one (3, of a ``kind``)."""

    query: str
    answer: str
    level: int
    kind: str = ""


class RWKU(Documents):
    """Texts about famous people and the questions of RWKU (Jin et al. 2024, arXiv 2406.10890).

    RWKU names 200 people and gives no texts to forget. Trained on are the published passages that a model wrote about
    the ``targets`` (``train_positive_llama3``). RWKU has no retain texts either, and this package's objectives need
    some: they are the passages about the other people, at most ``retain_size`` of them. The questions
    (:meth:`probes`) are only scored, by the suite ``rwku``.

    Verified in the published code: configurations, columns (``subject``, ``query``, ``answer``, ``level``, ``type``;
    ``text`` of passages), the prompts (a chat template's beginning-of-sequence token stands there twice, as in that
    code), 30 new tokens, ROUGE-L recall. Assumed: the retain texts above, and the prompt's bare text for a tokenizer
    without a chat template.

    Args:
        path: ``jinzhuoran/RWKU``, or a directory with the files of the hub or of the published preparation
            (a folder for each person with ``positive.json``, ``forget_level1.json`` and so on).
        targets: Names of the people to forget, as in the column ``subject``.
        corpus: Whose passages: ``"llama3"`` or ``"phi3"``.
        retain_size: Passages about others at most, the first ones; None: all.
        **kwargs: See :class:`Documents`.

    Raises:
        UserError: No target, one that there is no passage about, a file or column that is missing.

    Example:
        >>> RWKU(targets=["Ada Kern"]).sources
        {'forget': 'train_positive_llama3', 'retain': 'train_positive_llama3', 'test': None, 'benign': None}
    """

    def __init__(
        self,
        path: str = "jinzhuoran/RWKU",
        targets: list[str] | None = None,
        corpus: Corpus = "llama3",
        retain_size: int | None = 1000,
        **kwargs: Any,
    ) -> None:
        check_choice("corpus", corpus, Corpus)
        name = f"train_positive_{corpus}"
        super().__init__(name, name, **kwargs)
        if not targets:
            raise UserError("targets", targets, "names of people, as in RWKU's column subject")
        self.published, self.targets, self.retain_size = Published(path), tuple(targets), retain_size

    def probes(self, name: str) -> list[Probe]:
        """The questions of one of :data:`PROBES` about the targets, or about their neighbours."""
        level = int(name[-1])
        found = []
        for number, record in enumerate(self._about(name, "test")):
            query, answer = (cell_text(cell_of(record, key, name), number, key, name) for key in ("query", "answer"))
            found.append(Probe(query, answer, level, str(record.get("type") or "")))
        return found

    def passages(self, name: str) -> list[str]:
        """Texts for membership inference: ``mia_forget`` about the targets, ``mia_retain`` about others."""
        records = self._about(name, "test") if name == "mia_forget" else self._records(name, "test")
        return [cell_text(cell_of(record, "text", name), number, "text", name) for number, record in enumerate(records)]

    def named_set(self, name: str) -> Sequence[QAExample]:
        """The sets of the suite: those of :data:`PROBES`, ``mia_forget`` and ``mia_retain``; and others."""
        make = Prompted(self.tokenizer)
        if name in PROBES:
            probes = self.probes(name)
            if not probes:
                raise UserError("targets", list(self.targets), f"people whom {name} has questions about")
            return [make(n, probe.query, self._prompt(probe), probe.answer) for n, probe in enumerate(probes)]
        if name in ("mia_forget", "mia_retain"):
            return [make.text(number, text) for number, text in enumerate(self.passages(name))]
        return super().named_set(name)

    def _prompt(self, probe: Probe) -> str:
        """The published prompt: the user's turn of the chat template, then how the answer begins."""
        said, begins = f"{ASKED[probe.level == 1]}\nQuestion: {probe.query}\n", "Answer:"
        if probe.kind == "affirmative suffix":
            said, begins = said.rstrip("\n"), ""
        elif probe.kind == "incontext learning":
            said = f"{ASKED[False]}\n{probe.query}\n"
        if not getattr(self.tokenizer, "chat_template", None):
            return said + begins
        turns = [{"role": "user", "content": said}]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)) + begins

    def _records(self, name: str, split: str) -> Iterator[Record]:
        return self.published.records(name, split, "path", tuple(filter(None, [_FILES.get(name)])))

    def _about(self, name: str, split: str) -> Iterator[Record]:
        return (record for record in self._records(name, split) if cell_of(record, "subject", name) in self.targets)

    def _read(self, source: str, argument: str) -> Iterator[Document]:
        if argument not in ("forget", "retain"):
            yield from super()._read(source, argument)
            return
        missing, count = set(self.targets), 0
        for number, record in enumerate(self._records(source, "train")):
            subject = cell_of(record, "subject", "path")
            missing.discard(subject)
            if (subject in self.targets) is (argument == "forget"):
                count += 1
                if argument == "retain" and self.retain_size is not None and count > self.retain_size:
                    return
                yield f"{source} {number + 1}", cell_text(cell_of(record, "text", "path"), number, "text", "path")
        if argument == "forget" and missing:
            raise UserError("targets", sorted(missing), "people whom RWKU has passages about")
