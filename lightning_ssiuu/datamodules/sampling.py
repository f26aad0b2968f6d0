"""Which examples form which batch: a pure function of seed, epoch and batch number, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from lightning_ssiuu.datamodules.encoding import Key

_SALTS = {"forget": 0, "retain": 1}  # so that equally long sets are not permuted alike


class Stream:
    """The endless sequence of permutations of ``range(size)``, end to end, readable from any position.

    Reading on through the permutations is what makes every item come up equally often however the batch size divides
    the set: after ``k * size`` items each has come up exactly ``k`` times.

    Args:
        size: Number of items.
        seed: Seeds the permutations.
        salt: Tells streams of the same seed apart.

    Example:
        >>> stream = Stream(3, seed=0)
        >>> sorted(stream.take(0, 3)), sorted(stream.take(3, 3))
        ([0, 1, 2], [0, 1, 2])
        >>> stream.take(0, 5)[2:] == stream.take(2, 3)
        True
    """

    def __init__(self, size: int, seed: int, salt: int = 0) -> None:
        self.size, self.seed, self.salt = size, seed, salt
        self._cached: tuple[int, list[int]] = (-1, [])

    def _permutation(self, number: int) -> list[int]:
        if self._cached[0] != number:
            order = np.random.default_rng([self.seed, self.salt, number]).permutation(self.size).tolist()
            self._cached = number, order
        return self._cached[1]

    def take(self, start: int, count: int) -> list[int]:
        """The ``count`` items from position ``start`` on."""
        items: list[int] = []
        while count > 0:
            number, offset = divmod(start, self.size)
            piece = self._permutation(number)[offset : offset + count]
            items += piece
            start, count = start + len(piece), count - len(piece)
        return items


class PairSampler(Sampler[list[Key]]):
    """Batches of ``(part, index)`` keys in which every part keeps its own batch size.

    An epoch has ``ceil(n / batch size)`` batches, counted on the first part; with ``"forget"`` first that is one pass
    over the forget set. Every global batch is full: each part runs through its permutations end to end
    (:class:`Stream`), across epochs too, so no set is ever restarted early. At the seam of two permutations an example
    may stand twice in a batch. Rank ``r`` gets items ``r, r + world_size, …`` of each part of the global batch, so the
    union over the ranks is the same batch on any number of ranks.

    Args:
        sizes: Number of examples per part.
        batch_sizes: Examples per part and global batch; multiples of ``world_size`` if batches are filled.
        seed: Seeds the order.
        rank: This process.
        world_size: Number of processes that share a batch.
        fill: False: every epoch is one permutation and its last batch may be short. Ranks may then have shares of
            different sizes; one without any gets the key ``~index``, an example that has no answer to learn.

    Attributes:
        epoch: The epoch the next iteration yields; Lightning sets it through :meth:`set_epoch`.
        start: First batch of the next iteration, for going on within an epoch; ``len`` does not depend on it.

    Example:
        >>> sampler = PairSampler({"forget": 4, "retain": 6}, {"forget": 2, "retain": 2}, seed=0)
        >>> len(sampler), [part for part, _ in next(iter(sampler))]
        (2, ['forget', 'forget', 'retain', 'retain'])
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_sizes: Mapping[str, int],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        fill: bool = True,
    ) -> None:
        self.batch_sizes, self.rank, self.world_size, self.fill = dict(batch_sizes), rank, world_size, fill
        self.streams = {part: Stream(size, seed, _SALTS[part]) for part, size in sizes.items()}
        self.epoch = self.start = 0

    @property
    def sampler(self) -> PairSampler:
        """Itself: Lightning looks for ``set_epoch`` on ``dataloader.batch_sampler.sampler`` only."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; a new one begins at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        part = next(iter(self.streams))
        return math.ceil(self.streams[part].size / self.batch_sizes[part])

    def global_batch(self, epoch: int, number: int) -> dict[str, list[int]]:
        """Indices per part of batch ``number`` of ``epoch``, over all ranks."""
        batch = {}
        for part, stream in self.streams.items():
            count = self.batch_sizes[part]
            start = (epoch * len(self) + number) * count
            if not self.fill:
                offset = number * count
                start, count = epoch * stream.size + offset, min(count, stream.size - offset)
            batch[part] = stream.take(start, count)
        return batch

    def _shard(self, epoch: int, number: int) -> list[Key]:
        batch = self.global_batch(epoch, number)
        # A rank left without an example takes the first one's question along: all ranks have to do every step.
        shares = {part: indices[self.rank :: self.world_size] or [~indices[0]] for part, indices in batch.items()}
        return [(part, index) for part, share in shares.items() for index in share]

    def __iter__(self) -> Iterator[list[Key]]:
        return (self._shard(self.epoch, number) for number in range(self.start, len(self)))


class ResumableLoader(DataLoader):
    """A training loader that an interrupted run takes up at the very batch it had come to.

    Lightning saves and restores the state of loaders that have one. Position means batches handed out, not batches that
    worker processes have prepared ahead.
    """

    batch_sampler: PairSampler

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._position = 0

    def __iter__(self) -> Any:
        self._position = self.batch_sampler.start
        for batch in super().__iter__():
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.batch_sampler.epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        epoch, position = state["epoch"], state["position"]
        if position >= len(self.batch_sampler):
            epoch, position = epoch + 1, 0
        self.batch_sampler.epoch, self.batch_sampler.start = epoch, position


class EvalSampler(Sampler[list[Key]]):
    """One pass over a set in its own order; rank ``r`` gets examples ``r, r + world_size, …``, none twice.

    Every rank gets the same *number* of batches, of sizes that differ by one at most: strategies that communicate in
    each forward pass (FSDP, or DDP with buffers) would wait for ever otherwise. A batch holds ``batch_size`` examples
    at most, or one more where that is the only way.

    Args:
        part: Name of the set.
        size: Number of examples, at least ``world_size``.
        batch_size: Examples per rank and batch.
        rank: This process.
        world_size: Number of processes.

    Example:
        >>> [[index for _, index in batch] for batch in EvalSampler("test", 5, 2)]
        [[0], [1, 2], [3, 4]]
        >>> [[index for _, index in batch] for batch in EvalSampler("test", 5, 2, rank=1, world_size=2)]
        [[1], [3]]
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
