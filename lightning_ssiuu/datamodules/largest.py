"""Which of a run's batches will need most memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from lightning_ssiuu.datamodules.base import UnlearningDataModule
from lightning_ssiuu.datamodules.encoding import Key
from lightning_ssiuu.datamodules.sampling import share

Batch = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Tokens with padding and labelled tokens of a batch, over all parts and options: what its memory depends on."""

    tokens: int
    labels: int


def training_batch(
    data: UnlearningDataModule, cost: Callable[[Size], float], n_ranks: int, n_batches: int, n_epochs: int | None
) -> Batch:
    """The costliest share of a rank in the first ``n_batches`` that training will see, of ``n_epochs`` at most.

    ``data`` is not attached to a Trainer; None for no limit of epochs.
    """
    loader: Any = data.train_dataloader()
    sampler = loader.batch_sampler
    epochs = count() if n_epochs is None else range(n_epochs)
    batches = (sampler.global_batch(epoch, number) for epoch in epochs for number in range(len(sampler)))
    shares = (share(batch, rank, n_ranks) for batch in islice(batches, n_batches) for rank in range(n_ranks))
    return _costliest(loader, shares, cost)


def evaluation_batch(
    data: UnlearningDataModule, split: str, cost: Callable[[Size], float], n_examples: int | None = None
) -> Batch:
    """The costliest batch of a set's evaluation loader, or of its first ``n_examples``; ``data`` has no Trainer."""
    loader: Any = data.eval_dataloader(split)
    batches: Iterable[list[Key]] = loader.batch_sampler
    if n_examples is not None:
        first = list(islice((key for keys in batches for key in keys), n_examples))
        batches = ([key for key in keys if key in first] for keys in islice(batches, n_examples))
    return _costliest(loader, (keys for keys in batches if keys), cost)


def _costliest(loader: Any, batches: Iterable[list[Key]], cost: Callable[[Size], float]) -> Batch:
    def of(keys: list[Key]) -> float:
        rows: dict[tuple[str, str], list[Any]] = {}
        for part, encoded in (loader.dataset[key] for key in keys):
            kinds = {"": (encoded.sequence,), "options": encoded.options, "choices": encoded.choices}
            for name, sequences in kinds.items():
                rows.setdefault((part, name), []).extend(sequences)
        tokens = sum(len(sequences) * max(map(len, sequences)) for sequences in rows.values() if sequences)
        labels = sum(len(sequence) - sequence.n_prompt for sequences in rows.values() for sequence in sequences)
        return cost(Size(tokens, labels))

    return loader.collate_fn([loader.dataset[key] for key in max(batches, key=of)])
