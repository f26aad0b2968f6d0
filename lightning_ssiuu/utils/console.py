"""Keep the screen for what the user has to see: results, progress, and warnings that mean something."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from tqdm.auto import tqdm

from lightning_ssiuu.utils.distributed import world_size

# Said by libraries about themselves; nothing a user of this package did causes or could change them.
_CHATTER = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*tensorboardX. has been removed as a dependency.*",
    r".*does not have many workers which may be a bottleneck.*",
    r"Paged optimizers are not supported on CPU.*",
)
_TIP = "Tip: For seamless cloud"
_SHORT = 64 << 20  # bytes of weights that load in about a second


class _NoTips(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return _TIP not in record.getMessage()


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, libraries' advertisements and notes to their own developers are not shown; all other warnings are.

    Example:
        >>> with warnings.catch_warnings(record=True) as shown, quiet():
        ...     warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated")
        ...     warnings.warn("the model forgot everything")
        >>> [str(warning.message) for warning in shown]
        ['the model forgot everything']
    """
    loggers = [logging.getLogger(f"lightning.{name}.utilities.rank_zero") for name in ("pytorch", "fabric")]
    tips = _NoTips()
    with warnings.catch_warnings():
        for message in _CHATTER:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.addFilter(tips)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(tips)


def hide_short_bars(*directories: str) -> None:
    """Switch transformers' loading and saving bars off where all models are so small that a bar would only flash."""
    from transformers.utils import logging as transformers_logging

    sizes = [
        sum(file.stat().st_size for file in Path(d).glob("*.safetensors")) for d in directories if Path(d).is_dir()
    ]
    if len(sizes) == len(directories) and sum(sizes) <= _SHORT:
        transformers_logging.disable_progress_bar()


T = TypeVar("T")


def progress(items: Iterable[T], description: str) -> Iterator[T]:
    """Pass items on and show a bar once three seconds have gone by, on the first rank only; it vanishes at the end."""
    hidden = world_size() > 1 and dist.get_rank() > 0
    return iter(tqdm(items, desc=description, delay=3, leave=False, disable=hidden))
