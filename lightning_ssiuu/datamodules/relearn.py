"""What a relearning attack trains on and what it is scored on (arXiv 2509.22263, Sec. 4)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.chunks import Chunk, divided, sharing
from lightning_ssiuu.datamodules.columns import Columns, read_examples
from lightning_ssiuu.datamodules.encoding import Encoder
from lightning_ssiuu.datamodules.readers import read_records
from lightning_ssiuu.datamodules.splits import first_few, name_ids
from lightning_ssiuu.datamodules.spooled import Spooled, kept
from lightning_ssiuu.utils.errors import Given, UserError

#: Instruction data for benign attacks where the data module has no harmless items (arXiv 2509.22263, Sec. 4).
ALPACA = "tatsu-lab/alpaca"

#: Chooses attacked and scored examples from the forget set, p and random numbers that depend on the seed alone.
Selection = Callable[
    [Sequence[QAExample], float | None, np.random.Generator], tuple[Sequence[QAExample], Sequence[QAExample]]
]

_SELECTION = 2  # salt of the generator that selects, beside those of the batch order


class RelearnDataModule(UnlearningDataModule):
    """Attacked and scored examples of a relearning attack on an unlearned model (Yang et al. 2026, arXiv 2509.22263).

    *Harmful*: a random fraction ``p`` of the forget set is attacked, its disjoint remainder scored. *Benign*: harmless
    instruction data are attacked, the whole forget set is scored. Any other attack is a ``selection``, or a subclass
    that overrides :meth:`select`. Training batches are ``{"retain": part}`` of the attacked examples, an epoch is one
    permutation of them and its last batch may be short; evaluation batches are ``{"forget": part}`` of the scored ones.

    Args:
        source: The benchmark; its tokenizer, template, lengths and evaluation settings hold here too.
        kind: ``"harmful"`` or ``"benign"``; with a ``selection`` the name of that attack.
        p: Fraction of the forget set (or of ``pool``): ``round(p * n)`` examples are attacked; None where a
            ``selection`` needs none.
        benign_path: File or hub data set with ``instruction``, ``input``, ``output``, or ``question``, ``answer``, and
            whatever else :class:`CustomData` finds; None: the benign items of ``source``, or where it has none those of
            ``tatsu-lab/alpaca`` on the hub. Items longer than ``max_length`` are left out, which is logged.
        benign_size: Number of benign items at most; a random choice where there are more.
        pool: Ids of the forget examples that may be attacked or scored; None: all. With those that the unlearned model
            answers wrongly, the score before the attack is 0 by construction.
        batch_size: Attacked sequences per micro-batch over all ranks.
        seed: Seeds the selection and the order.
        selection: Chooses as :meth:`select` does, with ``p`` as second argument, instead of ``kind``.

    Raises:
        UserError: ``p`` outside (0, 1), nothing attacked or nothing scored, a question that is both, no benign items,
            ids in ``pool`` that are not in the forget set, a missing or unreadable ``benign_path``, or a
            selection that is no pair of lists of examples.

    Example:
        >>> from lightning_ssiuu.datamodules import Facts
        >>> data = RelearnDataModule(Facts(), kind="harmful", p=0.25, seed=1)
        >>> len(data.attacked), len(data.scored), data.eval_splits
        (9, 27, ['forget'])
    """

    fill_batches = False

    def __init__(
        self,
        source: UnlearningDataModule,
        kind: str = "harmful",
        p: float | None = 0.1,
        benign_path: str | None = None,
        benign_size: int = 1000,
        pool: Collection[int] | None = None,
        batch_size: int = 8,
        seed: int = 0,
        selection: Selection | None = None,
    ) -> None:
        names = ("eval_batch_size", "num_workers", "multiple_choice")
        options: dict[str, Any] = {name: getattr(source, name) for name in names} | source.encoding
        options |= {"tokenizer": source.tokenizer_or_name, "train_on": "retain"}
        super().__init__(batch_size=batch_size, seed=seed, **options)
        if selection is None:
            if kind not in ("harmful", "benign"):
                raise UserError("kind", kind, "harmful, benign")
            p = p if kind == "harmful" else None
        if not (0 < p < 1 if p is not None else selection or kind == "benign"):
            raise UserError("p", p, "a fraction in (0, 1)")
        self.source, self.kind, self.p, self.selection = source, kind, p, selection
        self.harmless = HarmlessItems(source, benign_path, benign_size)
        self.pool = None if pool is None else frozenset(pool)
        self._scored: dict[tuple[int, int], list[Mapping[str, Any]]] = {}

    @property
    def encoder(self) -> Encoder:
        return self.source.encoder

    @property
    def attacked(self) -> Sequence[QAExample]:
        """What the attack trains on."""
        return self.splits.retain

    @property
    def scored(self) -> Sequence[QAExample]:
        """What the attack is scored on."""
        return self.splits.forget

    def load_splits(self) -> Splits:
        """Select the attacked examples (served as ``retain``) and the scored ones (served as ``forget``)."""
        forget = kept(self.source.splits.forget)
        if self.pool is not None:
            if unknown := self.pool - {example.example_id for example in forget}:
                raise UserError("pool", Given(f"{len(unknown)} ids that are not in the forget set"), "its ids")
            forget = kept(example for example in forget if example.example_id in self.pool)
        selected: Any = self.select(forget, np.random.default_rng([self.seed, _SELECTION]))
        if not _is_selection(selected):
            raise UserError("attack", self.kind, "select() that returns attacked and scored examples")
        attacked, scored = map(kept, selected)
        for name, examples in (("attacked", attacked), ("scored", scored)):
            if not examples:
                raise UserError(name, Given("0 examples"), "at least one example")
        if isinstance(attacked[0], Chunk) and (both := [chunk.name for chunk in sharing(scored, attacked)]):
            given = Given(f"{len(both)} chunks that share text with attacked ones ({first_few(both)})")
            raise UserError("scored", given, "chunks disjoint from the attacked ones")
        questions = {example.folded for example in attacked}
        if both := [example.name for example in scored if example.folded in questions]:
            given = Given(f"{len(both)} questions that are also attacked ({name_ids(both)})")
            raise UserError("scored", given, "questions disjoint from the attacked ones")
        return Splits(forget=self.source.to_score(scored), retain=attacked)

    @cached_property
    def repair(self) -> RelearnDataModule:
        """The retain set of the source in place of the attacked examples: what an attacker may repair a model with."""
        kept, scored = self.source.splits.retain, self.splits.forget
        options: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed}
        return RelearnDataModule(self.source, "repair", None, selection=lambda *_: (kept, scored), **options)

    @property
    def eval_splits(self) -> list[str]:
        return ["forget"]

    def attacked_batches(self) -> Iterator[Mapping[str, Any]]:
        """This rank's shares of the batches of attacked examples, epoch after epoch, without end."""
        loader: Any = self.train_dataloader()
        for epoch in count():
            loader.batch_sampler.set_epoch(epoch)
            yield from (batch["retain"] for batch in loader)

    def scored_batches(self) -> list[Mapping[str, Any]]:
        """This rank's evaluation batches of the scored examples, made once: ``{"forget": part}``."""
        if (ranks := self._ranks()) not in self._scored:
            self._scored = {ranks: list(self.eval_dataloader("forget"))}
        return self._scored[ranks]

    def select(
        self, forget: Sequence[QAExample], rng: np.random.Generator
    ) -> tuple[Sequence[QAExample], Sequence[QAExample]]:
        """Attacked and scored examples of the forget set or pool, no question in both; ``rng`` depends on the seed."""
        if self.selection is not None:
            return self.selection(forget, self.p, rng)
        if self.p is None:
            return self.harmless.draw(rng), forget
        return random_fraction(forget, self.p, rng)


def _is_selection(selected: Any) -> bool:
    # A pair of sequences of examples.
    if not (isinstance(selected, list | tuple) and len(selected) == 2):
        return False
    return all(
        isinstance(part, list | tuple | Spooled) and all(isinstance(example, QAExample) for example in part)
        for part in selected
    )


def random_fraction(
    forget: Sequence[QAExample], p: float, rng: np.random.Generator
) -> tuple[Sequence[QAExample], Sequence[QAExample]]:
    """``round(p * n)`` random examples of n, and the rest without the questions of those.

    Chunks of documents are divided as :func:`~.chunks.divided` does.
    """
    count, rest = round(p * len(forget)), forget
    if forget and isinstance(forget[0], Chunk):
        attacked, rest = divided(forget, count, rng)
    else:
        chosen = set(rng.permutation(len(forget))[:count].tolist())
        attacked = kept(example for index, example in enumerate(forget) if index in chosen)
    # By question, not only by id: a question that occurs twice would be scored after it was taught
    taught = {example.folded for example in attacked}
    scored = kept(example for example in rest if example.folded not in taught)
    if not attacked or not scored:
        taken = f"of {len(forget)} it takes {len(attacked)} and leaves {len(scored)}"
        raise UserError("p", p, f"a fraction that leaves attack and scored examples: {taken}")
    return attacked, scored


class HarmlessItems:
    """At most ``size`` items for a benign attack: of ``path`` (file, hub id), else the source's own, else of Alpaca."""

    def __init__(self, source: UnlearningDataModule, path: str | None = None, size: int = 1000) -> None:
        if size < 1:
            raise UserError("benign_size", size, "at least 1")
        self.source, self.path, self.size = source, path, size

    @cached_property
    def items(self) -> Sequence[QAExample]:
        if self.path is None:
            items = self.source.splits.benign or self._read(ALPACA)
        elif (found := self.source.more(self.path, "benign_path")) is not None:
            items = found
        else:
            items = self._read(self.path)
        if not items:
            raise UserError("benign_path", self.path, "data with harmless items that are not blank")
        return items

    def draw(self, rng: np.random.Generator) -> list[QAExample]:
        """A random choice of those that fit into ``max_length``; how many do not is logged."""
        encoder, limit = self.source.encoder, self.source.encoder.max_length
        chosen: list[QAExample] = []
        n_long = 0
        for index in rng.permutation(len(self.items)).tolist():
            if encoder.fits(self.items[index]):
                chosen.append(self.items[index])
            else:
                n_long += 1
            if len(chosen) == self.size:
                break
        if not chosen:
            raise UserError("max_length", limit, "a length that some benign item fits in")
        if n_long:
            rank_zero_info(f"Benign attack: left out {n_long} items longer than {limit} tokens (max_length).")
        return chosen

    def _read(self, path: str) -> list[QAExample]:
        examples = read_examples(read_records(path, "benign_path"), Columns(argument="benign_path"))
        first_id = 1 + max(example.example_id for _, examples in self.source.splits.items() for example in examples)
        # Instruction data sets hold a few empty outputs; there is nothing to learn from one
        return [replace(example, example_id=n) for n, example in enumerate(examples, first_id) if not example.blank]
