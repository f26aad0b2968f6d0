"""What the processes of a distributed run have to tell each other; one process alone needs no process group."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def world_size() -> int:
    """Number of processes in the run.

    Example:
        >>> world_size()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks; each rank must call it.

    Example:
        >>> gathered("mine")
        ['mine']
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
