"""Which of a run's batches will need most memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from torch.utils.data import DataLoader

from lightning_ssiuu.datamodules.base import UnlearningDataModule
from lightning_ssiuu.datamodules.encoding import Key

Batch = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Size of a batch: what a model's memory for it depends on.

    Args:
        tokens: Tokens with padding, over all parts and options.
        labels: Labelled tokens, over all parts and options.
    """

    tokens: int
    labels: int


def training_batch(
    data: UnlearningDataModule, cost: Callable[[Size], float], n_ranks: int, n_batches: int, n_epochs: int | None
) -> Batch:
    """The costliest share of a rank in the batches that training will see, in their order.

    Args:
        data: The data, not attached to a Trainer.
        cost: Of a batch.
        n_ranks: Number of ranks that share a batch.
        n_batches: Batches to look through at most.
        n_epochs: Epochs to look through at most; None for no limit.
    """
    loader: Any = data.train_dataloader()
    sampler = loader.batch_sampler

    def shares() -> Iterator[list[Key]]:
        for epoch in count() if n_epochs is None else range(n_epochs):
            for number in range(len(sampler)):
                batch = sampler.global_batch(epoch, number)
                for rank in range(n_ranks):
                    yield [(part, index) for part, indices in batch.items() for index in indices[rank::n_ranks]]

    return _costliest(loader, islice(shares(), n_batches * n_ranks), cost)


def evaluation_batch(
    data: UnlearningDataModule, split: str, cost: Callable[[Size], float], n_examples: int | None = None
) -> Batch:
    """The costliest batch of an evaluation loader.

    Args:
        data: The data, not attached to a Trainer.
        split: The set.
        cost: Of a batch.
        n_examples: Look at the first examples alone.
    """
    loader: Any = data.eval_dataloader(split)
    batches = list(loader.batch_sampler)
    if n_examples is not None:
        first = [key for keys in batches for key in keys][:n_examples]
        batches = [[key for key in keys if key in first] for keys in batches]
    return _costliest(loader, [keys for keys in batches if keys], cost)


def _costliest(loader: DataLoader, batches: Iterable[list[Key]], cost: Callable[[Size], float]) -> Batch:
    dataset: Any = loader.dataset

    def of(keys: list[Key]) -> float:
        rows: dict[tuple[str, str], list[Any]] = {}
        for key in keys:
            part, encoded = dataset[key]
            for name, sequences in (
                ("", (encoded.sequence,)),
                ("options", encoded.options),
                ("choices", encoded.choices),
            ):
                rows.setdefault((part, name), []).extend(sequences)
        tokens = sum(len(sequences) * max(map(len, sequences)) for sequences in rows.values() if sequences)
        labels = sum(len(sequence) - sequence.n_prompt for sequences in rows.values() for sequence in sequences)
        return cost(Size(tokens, labels))

    collate: Any = loader.collate_fn
    return collate([dataset[key] for key in max(batches, key=of)])
