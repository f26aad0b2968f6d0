"""The evaluation loaders of a run, for callbacks that look at the model between training steps."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_ssiuu.utils.distributed import gathered, rank, world_size
from lightning_ssiuu.utils.errors import UserError

Loader = Iterable[Mapping[str, Any]]


def evaluation_loaders(trainer: L.Trainer) -> list[Loader]:
    """The validation loaders (forget, retain, test), set up even where Lightning's own validation never runs."""
    if trainer.val_dataloaders is None:
        # Lightning sets them up only before it validates; the default recipe leaves validation to the callbacks.
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        finally:
            trainer.training = True
    loaders = trainer.val_dataloaders
    if not loaders:
        raise UserError("data", None, "validation loaders: a data module, and trainer.limit_val_batches above 0")
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


def split_loader(trainer: L.Trainer, split: str) -> Loader | None:
    """The loader that yields ``{split: part}`` batches, or None."""
    for loader in evaluation_loaders(trainer):
        if split in next(iter(loader), {}):
            return loader
    return None


def batches_of(trainer: L.Trainer, split: str) -> Iterator[Mapping[str, Any]]:
    """The same batches, none where there is no such loader; it is looked for (a draw of random numbers) when asked."""
    yield from split_loader(trainer, split) or ()


def tokens_of_a_pass(data: Any) -> int:
    """Tokens of the first evaluation batch of a data module, padding included: the size of a forward pass."""
    split = data.eval_splits[0]
    loader = data.eval_dataloader(split)
    first = [loader.dataset[key] for key in next(iter(loader.batch_sampler))]  # without starting any workers
    return int(loader.collate_fn(first)[split]["input_ids"].numel())


def first_parts(loader: Loader, split: str, n_examples: int) -> list[Mapping[str, Any]]:
    """This rank's share of the first ``n_examples`` examples of a set, in equally many parts on every rank.

    Rank ``r`` of ``n`` is served examples ``r, r + n, …`` (:class:`~lightning_ssiuu.datamodules.sampling.EvalSampler`),
    so the examples of all ranks together are the same on any number of ranks. Each rank must call it, and have one.
    """
    parts: list[Mapping[str, Any]] = []
    share = missing = len(range(rank(), n_examples, world_size()))
    for batch in islice(loader, share):
        part = {name: value[:missing] for name, value in batch[split].items() if not isinstance(value, Mapping)}
        parts.append(part)
        missing -= len(part["input_ids"])
        if missing <= 0:
            break
    fewest = min(gathered(len(parts)))
    if fewest == 0:
        raise UserError("attribution.probe_examples", n_examples, f"0, or at least {world_size()}, one for each rank")
    # Shares differ by one example, so one rank may have come to a batch that another has no part in; sharded weights
    # are gathered batch by batch, by all ranks at once.
    return [*parts[: fewest - 1], _joined(parts[fewest - 1 :])]


def _joined(parts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    width = max(part["input_ids"].shape[1] for part in parts)

    def rows(name: str, part: Mapping[str, Any]) -> Tensor:
        value = part[name]
        outside = -100 if name == "labels" else 0  # whatever the padding token is: it is masked
        return value if value.dim() == 1 else pad(value, (0, width - value.shape[1]), value=outside)

    return {name: torch.cat([rows(name, part) for part in parts]) for name in parts[0]}


def run_directory(trainer: L.Trainer) -> str:
    """Where the run's results go: ``trainer.default_root_dir``."""
    return os.fspath(trainer.default_root_dir)
