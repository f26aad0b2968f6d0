"""The embedded benchmark: facts about fictitious people, which the tiny model knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.embedded import FACTS
from lightning_ssiuu.datamodules.embedded.facts_data import make_strangers
from lightning_ssiuu.utils.errors import UserError


class Facts(UnlearningDataModule):
    """Facts about fictitious people, embedded in the package; needs no network.

    Whole people belong to one set. Every fact has distractors and other wordings of its question; harmless
    question–answer items serve the benign relearning attack.

    Args:
        phrasing: Which wording of the questions to use: 0 the main one, k the k-th paraphrase.
        **kwargs: See :class:`UnlearningDataModule`.

    Raises:
        UserError: There is no such phrasing.

    Example:
        >>> data = Facts()
        >>> data.setup("fit")
        >>> data.eval_splits
        ['forget', 'retain', 'test']
        >>> sorted(next(iter(data.train_dataloader())))
        ['forget', 'retain']
    """

    def __init__(self, phrasing: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if phrasing < 0:
            raise UserError("phrasing", phrasing, "0 (the main wording) or the number of a paraphrase")
        self.phrasing = phrasing

    def load_splits(self) -> Splits:
        world = json.loads(FACTS.read_text(encoding="utf-8"))
        most = min(len(fact["paraphrases"]) for fact in world["facts"])
        if self.phrasing > most:
            raise UserError("phrasing", self.phrasing, f"0 to {most}")
        sets: dict[str, list[QAExample]] = {"forget": [], "retain": [], "test": []}
        for fact in world["facts"]:
            sets[fact["split"]].append(self._example(fact))
        benign = [QAExample(item["id"], item["question"], item["answer"]) for item in world["benign"]]
        return Splits(**sets, benign=benign)

    def invented(self) -> tuple[str, Sequence[QAExample]]:
        people = {example.group for _, examples in self.splits.items() for example in examples}
        count = len({example.group for example in self.splits.forget})
        strangers = make_strangers(people, count)
        return "invented people", [self._example(fact) for fact in strangers][: len(self.splits.forget)]

    def _example(self, fact: Mapping[str, Any]) -> QAExample:
        wordings = [fact["question"], *fact["paraphrases"]]
        question = wordings.pop(self.phrasing)
        wrong = tuple(fact["distractors"])
        return QAExample(fact["id"], question, fact["answer"], wrong, tuple(wordings), fact["person"])
