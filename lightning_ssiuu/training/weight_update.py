"""Keep a part of what training did to the weights: its largest changes, and as much of each as is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ssiuu.training.shards import local, over_shards, shard_device, wide

# The bits of a float32 that is not negative are ordered as it is: first the upper ones are counted, then the lower.
_LOW_BITS = 15
_BINS = 1 << 16


class WeightUpdate:
    """Gives weights ``θ₀ + scale · m ⊙ (θ − θ₀)``: θ₀ before training, θ after it, m the largest changes alone.

    m is 1 for the share ``keep`` of all coordinates whose change is largest in size (and for those that change by as
    much as the smallest of these), over all parameters and all ranks together. Of scale and keep 1 is θ, bit for bit.
    Trimming by size is that of TIES (arXiv 2306.01708), the line that of WiSE-FT (arXiv 2109.01903).

    Args:
        parameters: What is set; under FSDP2 shards.
        before: θ₀, tensors (of this rank's shards) in the same order, on any device.
        after: θ in the same order, where the parameters are, and not their own storage.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        self.parameters, self.before, self.after = list(parameters), list(before), list(after)
        self._least: dict[float, float] = {1.0: 0.0}

    @torch.no_grad()
    def put(self, scale: float, keep: float = 1.0) -> None:
        """Set the parameters; ``scale`` ≥ 0, ``keep`` in (0, 1]. Each rank must call it."""
        least = self.smallest_kept(keep)
        for parameter, before, after in zip(self.parameters, self.before, self.after, strict=True):
            start, end = wide(before.to(after.device)), wide(after)
            values = torch.lerp(start, end, scale)
            if least > 0:
                values = values.where((end - start).abs() >= least, start)
            local(parameter).copy_(values)
        torch.clear_autocast_cache()  # it may hold other weights in narrow types

    def smallest_kept(self, keep: float) -> float:
        """The size of the smallest change that is kept; each rank must call it."""
        if keep not in self._least:
            shards = shard_device(self.parameters)
            n_kept = max(1, round(keep * over_shards(sum(t.numel() for t in self.after), shards)))
            upper, n_above = _bin_of(self._counts(None), n_kept)
            lower, _ = _bin_of(self._counts(upper), n_kept - n_above)
            bits = torch.tensor((upper << _LOW_BITS) + lower, dtype=torch.int32)
            self._least[keep] = float(bits.view(torch.float32))
        return self._least[keep]

    def _counts(self, upper: int | None) -> Tensor:
        # How many changes have each value of the upper bits; or, among those with this one, of the lower bits.
        counts = torch.zeros(_BINS, dtype=torch.long)
        for bits in self._bits():
            if upper is None:
                chosen = bits >> _LOW_BITS
            else:
                chosen = bits[bits >> _LOW_BITS == upper] & ((1 << _LOW_BITS) - 1)
            counts += torch.bincount(chosen, minlength=_BINS).cpu()
        if (device := shard_device(self.parameters)) is not None:
            counts = counts.to(device)
            dist.all_reduce(counts)
        return counts.cpu()

    def _bits(self) -> Iterator[Tensor]:
        for before, after in zip(self.before, self.after, strict=True):
            size = (wide(after) - wide(before.to(after.device))).abs().float()
            yield size.flatten().view(torch.int32)


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th largest, and how many are in bins above it."""
    from_above = counts.flip(0).cumsum(0)
    index = int((from_above < rank).sum())
    return len(counts) - 1 - index, int(from_above[index - 1]) if index else 0
