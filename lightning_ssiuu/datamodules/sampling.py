"""Which examples form which batch: a pure function of seed, epoch and batch number, on any number of ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from lightning_ssiuu.datamodules.encoding import Key

_SALTS = {"forget": 0, "retain": 1}  # so that equally long sets are not permuted alike
_SCORED = 3
_Sizes = Mapping[str, int]


@functools.lru_cache(maxsize=4)
def _permutation(size: int, *seeds: int) -> np.ndarray:
    return np.random.default_rng(seeds).permutation(size)


def scored_alone(size: int, most: int) -> list[int]:
    """Numbers of the ``most`` examples of a larger set that stand for it in scores: always the same random ones."""
    return sorted(_permutation(size, _SCORED)[:most].tolist())


class PairSampler(Sampler[list[Key]]):
    """Batches of ``(part, index)`` keys in which every part keeps its own batch size.

    An epoch has ``ceil(n / batch size)`` batches, counted on the first part; with ``"forget"`` first that is one pass
    over the forget set. Every global batch is full: each part runs through its permutations end to end, across epochs
    too, so after ``k * n`` examples each has come up exactly ``k`` times. At the seam of two permutations an example
    may stand twice in a batch. The union over the ranks (:func:`share`) is the same batch on any number of ranks.
    ``batch_sizes`` are of the global batch: multiples of ``world_size`` if batches are filled. Without ``fill`` every
    epoch is one permutation, its last batch may be short and ranks may have shares of different sizes.

    An iteration yields ``epoch``, from batch ``start`` on; ``len`` does not depend on ``start``.
    """

    def __init__(
        self, sizes: _Sizes, batch_sizes: _Sizes, seed: int, rank: int = 0, world_size: int = 1, fill: bool = True
    ) -> None:
        self.sizes, self.batch_sizes, self.seed = sizes, batch_sizes, seed
        self.rank, self.world_size, self.fill = rank, world_size, fill
        self.epoch = self.start = 0

    @property
    def sampler(self) -> PairSampler:
        return self  # Lightning looks for `set_epoch` on `dataloader.batch_sampler.sampler` only

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:  # a new one begins at its first batch
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        part = next(iter(self.sizes))
        return math.ceil(self.sizes[part] / self.batch_sizes[part])

    def global_batch(self, epoch: int, number: int) -> dict[str, list[int]]:
        """Indices per part of batch ``number`` of ``epoch``, over all ranks."""
        batch = {}
        for part, size in self.sizes.items():
            count = self.batch_sizes[part]
            start = (epoch * len(self) + number) * count
            if not self.fill:
                offset = number * count
                start, count = epoch * size + offset, min(count, size - offset)
            places = [divmod(place, size) for place in range(start, start + count)]
            batch[part] = [int(_permutation(size, self.seed, _SALTS[part], round_)[index]) for round_, index in places]
        return batch

    def __iter__(self) -> Iterator[list[Key]]:
        for number in range(self.start, len(self)):
            yield share(self.global_batch(self.epoch, number), self.rank, self.world_size)


def share(batch: Mapping[str, list[int]], rank: int, world_size: int) -> list[Key]:
    """A rank's keys of a global batch: items ``rank, rank + world_size, …`` of each part.

    A rank left without an example gets the key ``~index`` of the first, which has no answer to learn: all ranks have
    to do every step.
    """
    shares = {part: indices[rank::world_size] or [~indices[0]] for part, indices in batch.items()}
    return [(part, index) for part, indices in shares.items() for index in indices]


class ResumableLoader(DataLoader[Any]):
    """A training loader that an interrupted run takes up at the very batch it had come to.

    Lightning saves and restores the state of loaders that have one. Position means batches handed out, not batches that
    worker processes have prepared ahead.
    """

    batch_sampler: PairSampler

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch = self._position = 0

    def __iter__(self) -> Any:
        # Of the batches handed out, not of the epoch that the sampler may be told to serve next.
        self._epoch, self._position = self.batch_sampler.epoch, self.batch_sampler.start
        for batch in super().__iter__():
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        epoch, position = state["epoch"], state["position"]
        if position >= len(self.batch_sampler):
            epoch, position = epoch + 1, 0
        self._epoch, self._position = self.batch_sampler.epoch, self.batch_sampler.start = epoch, position


class EvalSampler(Sampler[list[Key]]):
    """One pass over a set in its own order; rank ``r`` gets examples ``r, r + world_size, …``, none twice.

    Every rank gets the same *number* of batches, of sizes that differ by one at most: strategies that communicate in
    each forward pass (FSDP, or DDP with buffers) would wait for ever otherwise. A batch holds ``batch_size`` examples
    of a rank at most, or one more where that is the only way. ``size`` is at least ``world_size``.
    """

    def __init__(self, part: str, size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.part, self.indices = part, range(rank, size, world_size)
        fewest, most = size // world_size, math.ceil(size / world_size)
        self._n_batches = min(math.ceil(most / batch_size), fewest)

    def __len__(self) -> int:
        return self._n_batches

    def __iter__(self) -> Iterator[list[Key]]:
        n, k = len(self.indices), self._n_batches
        for number in range(k):
            yield [(self.part, index) for index in self.indices[number * n // k : (number + 1) * n // k]]
