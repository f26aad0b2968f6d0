"""What the processes of a distributed run have to tell each other; one process alone needs no process group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of processes in the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars on one device, averaged over the ranks in one go; each rank must call it."""
    if world_size() == 1 or not values:
        return {name: value.detach() for name, value in values.items()}
    stacked = torch.stack([value.detach() for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, stacked / world_size(), strict=True))


def total_over_ranks(count: Tensor) -> Tensor:
    """A number added up over the ranks; each rank must call it."""
    if world_size() == 1:
        return count
    total = count.clone()
    dist.all_reduce(total)
    return total


def all_ranks(flag: Tensor) -> Tensor:
    """Whether a bool is true on every rank; each rank must call it."""
    if world_size() == 1:
        return flag
    agreed = flag.to(torch.uint8)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return agreed.bool()


def gathered(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks; each rank must call it."""
    if world_size() == 1:
        return [value]
    if dist.get_backend() == "fake":  # simulated ranks: each is like this one
        return [value] * world_size()
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
