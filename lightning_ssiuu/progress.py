"""Progress bars for what takes more than a few seconds, and silence for what does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch.distributed as dist
from tqdm.auto import tqdm

from lightning_ssiuu.ranks import world_size

T = TypeVar("T")


def progress(items: Iterable[T], description: str) -> Iterator[T]:
    """Pass items on and show a bar once three seconds have gone by, on the first rank only; it vanishes at the end.

    Example:
        >>> list(progress([1, 2], "counting"))
        [1, 2]
    """
    hidden = world_size() > 1 and dist.get_rank() > 0
    return iter(tqdm(items, desc=description, delay=3, leave=False, disable=hidden))
