"""What a relearning attack trains on and what it is scored on (arXiv 2509.22263, Sec. 4)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.encoding import Encoder
from lightning_ssiuu.datamodules.readers import Record, column, read_records
from lightning_ssiuu.utils.errors import Given, UserError

Kind = Literal["harmful", "benign"]

#: Instruction data for benign attacks where the data module has no harmless items (arXiv 2509.22263, Sec. 4).
ALPACA = "tatsu-lab/alpaca"

_SELECTION = 2  # salt of the generator that selects, beside those of the batch order


class RelearnDataModule(UnlearningDataModule):
    """Attack set and scored set of a relearning attack on an unlearned model (Yang et al. 2026, arXiv 2509.22263).

    *Harmful*: the attack set is a random fraction ``p`` of the forget set, the scored set its disjoint remainder.
    *Benign*: the attack set is harmless instruction data, the scored set the whole forget set. Training batches are
    ``{"retain": part}`` with a part of the attack set (what is learned now); there is one evaluation loader, with
    batches ``{"forget": part}`` of the scored set. An epoch is one permutation of the attack set, its last batch may
    be short. Subclass it and override :meth:`select` for another attack.

    Args:
        source: The benchmark; its tokenizer, template, lengths and evaluation settings hold here too.
        kind: ``"harmful"`` or ``"benign"``.
        p: Harmful: fraction of the forget set (or of ``pool``); ``round(p * n)`` examples are attacked with.
        benign_path: Benign: file or hub data set (as in :class:`CustomData`) with ``instruction``, ``input``,
            ``output`` or with ``question``, ``answer``; None: the benign items of ``source``, or where it has none
            those of ``tatsu-lab/alpaca`` on the hub. Items longer than ``max_length`` are left out, which is logged.
        benign_size: Benign: number of items at most; a random choice where there are more.
        pool: Harmful: ids of the forget examples that may be attacked or scored; None: all. With those that the
            unlearned model answers wrongly, the score before the attack is 0 by construction.
        batch_size: Attack sequences per micro-batch over all ranks.
        seed: Seeds the selection and the order.

    Raises:
        UserError: ``p`` outside (0, 1) or so small or large that attack or scored set is empty, no benign items, ids in
            ``pool`` that are not in the forget set, or a missing or unreadable ``benign_path``.

    Example:
        >>> from lightning_ssiuu.datamodules import Facts
        >>> data = RelearnDataModule(Facts(), kind="harmful", p=0.25, seed=1)
        >>> attack, scored = data.splits.retain, data.splits.forget
        >>> len(attack) == round(0.25 * (len(attack) + len(scored)))
        True
        >>> data.eval_splits
        ['forget']
    """

    fill_batches = False

    def __init__(
        self,
        source: UnlearningDataModule,
        kind: Kind = "harmful",
        p: float = 0.1,
        benign_path: str | None = None,
        benign_size: int = 1000,
        pool: Collection[int] | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(
            tokenizer=source.tokenizer_or_name,
            template=source.template,
            batch_size=batch_size,
            eval_batch_size=source.eval_batch_size,
            max_length=source.max_length,
            num_workers=source.num_workers,
            seed=seed,
            train_on="retain",
            multiple_choice=source.multiple_choice,
        )
        if kind not in get_args(Kind):
            raise UserError("kind", kind, ", ".join(get_args(Kind)))
        if kind == "harmful" and not 0 < p < 1:
            raise UserError("p", p, "a fraction in (0, 1)")
        if benign_size < 1:
            raise UserError("benign_size", benign_size, "at least 1")
        self.source, self.kind, self.p = source, kind, p
        self.benign_path, self.benign_size = benign_path, benign_size
        self.pool = None if pool is None else frozenset(pool)
        self._scored: tuple[tuple[int, int], list[Mapping[str, Any]]] | None = None

    @property
    def encoder(self) -> Encoder:
        """The source's template and tokenizer at work."""
        return self.source.encoder

    def load_splits(self) -> Splits:
        """Select the attack set (as ``retain``) and the scored set (as ``forget``)."""
        attack, scored = self.select(list(self.source.splits.forget), np.random.default_rng([self.seed, _SELECTION]))
        return Splits(forget=scored, retain=attack)

    @property
    def eval_splits(self) -> list[str]:
        """Only the scored set, under the name ``"forget"``."""
        return ["forget"]

    def scored_batches(self) -> list[Mapping[str, Any]]:
        """This rank's evaluation batches of the scored set, made once: ``{"forget": part}``.

        Example:
            >>> from lightning_ssiuu.datamodules import Facts
            >>> data = RelearnDataModule(Facts(eval_batch_size=20), p=0.25)
            >>> [len(batch["forget"]["example_id"]) for batch in data.scored_batches()]
            [13, 14]
        """
        if self._scored is None or self._scored[0] != self._ranks():
            self._scored = self._ranks(), list(self.eval_dataloader("forget"))
        return self._scored[1]

    @cached_property
    def benign_items(self) -> list[QAExample]:
        """All harmless items of a benign attack; the same for every seed, so cells of a sweep may share them."""
        own = self.source.splits.benign if self.benign_path is None else []
        items = own or self._read_benign(self.benign_path or ALPACA)
        if not items:
            raise UserError("benign_path", self.benign_path, "data with harmless items that are not blank")
        return items

    def select(self, forget: list[QAExample], rng: np.random.Generator) -> tuple[list[QAExample], list[QAExample]]:
        """Choose what is learned and what is scored; the extension point for another attack.

        Args:
            forget: The forget set of the source.
            rng: Random numbers that depend on the seed alone.

        Returns:
            Attack set and scored set, disjoint and not empty.
        """
        return (self._benign(rng), forget) if self.kind == "benign" else self._harmful(forget, rng)

    def _harmful(self, forget: list[QAExample], rng: np.random.Generator) -> tuple[list[QAExample], list[QAExample]]:
        if self.pool is not None:
            unknown = self.pool - {example.example_id for example in forget}
            if unknown:
                raise UserError("pool", Given(f"{len(unknown)} ids that are not in the forget set"), "its ids")
            forget = [example for example in forget if example.example_id in self.pool]
        n_attack = round(self.p * len(forget))
        chosen = set(rng.permutation(len(forget))[:n_attack].tolist())
        attack = [example for index, example in enumerate(forget) if index in chosen]
        # By question, not only by id: a question that occurs twice would be scored after it was taught
        taught = {example.folded for example in attack}
        scored = [example for example in forget if example.folded not in taught]
        if not attack or not scored:
            raise UserError(
                "p",
                self.p,
                f"a fraction that leaves attack and scored examples: of {len(forget)} it takes {len(attack)} "
                f"and leaves {len(scored)}",
            )
        return attack, scored

    def _benign(self, rng: np.random.Generator) -> list[QAExample]:
        items = self.benign_items
        chosen: list[QAExample] = []
        n_long = 0
        for index in rng.permutation(len(items)).tolist():
            if self.encoder.fits(items[index]):
                chosen.append(items[index])
            else:
                n_long += 1
            if len(chosen) == self.benign_size:
                break
        if not chosen:
            raise UserError("max_length", self.encoder.max_length, "a length that some benign item fits in")
        if n_long:
            longest = self.encoder.max_length
            rank_zero_info(f"Benign attack: left out {n_long} items longer than {longest} tokens (max_length).")
        return chosen

    def _read_benign(self, path: str) -> list[QAExample]:
        records = read_records(path, "benign_path")
        if records and "instruction" in records[0]:
            records = [self._from_instruction(record) for record in records]
        questions, answers = column(records, "question", "benign_path"), column(records, "answer", "benign_path")
        first_id = 1 + max(example.example_id for _, examples in self.source.splits.items() for example in examples)
        items = [
            QAExample(first_id + n, question, answer)
            for n, (question, answer) in enumerate(zip(questions, answers, strict=True))
        ]
        # Instruction data sets hold a few empty outputs; there is nothing to learn from one
        return [item for item in items if item.question.strip() and item.answer.strip()]

    @staticmethod
    def _from_instruction(record: Record) -> Record:
        question, answer = record.get("instruction") or "", record.get("output") or ""
        extra = record.get("input") or ""
        return {"question": f"{question}\n{extra}" if extra else question, "answer": answer}
