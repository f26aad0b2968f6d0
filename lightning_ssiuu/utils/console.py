"""Keep the screen for what the user has to see: results, progress, and warnings that mean something."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm

from lightning_ssiuu.utils.distributed import rank

# Said by libraries about themselves; nothing a user of this package did causes or could change them.
_CHATTER = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*tensorboardX. has been removed as a dependency.*",
    r".*does not have many workers which may be a bottleneck.*",
    r"Paged optimizers are not supported on CPU.*",
)
_TIP = "Tip: For seamless cloud"
_SHORT = 64 << 20  # bytes of weights that load in about a second


def _no_tip(record: logging.LogRecord) -> bool:
    return _TIP not in record.getMessage()


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, libraries' advertisements and notes to their own developers are not shown; all other warnings are."""
    with warnings.catch_warnings(), ExitStack() as at_the_end:
        for message in _CHATTER:
            warnings.filterwarnings("ignore", message=message)
        for name in ("pytorch", "fabric"):
            logger = logging.getLogger(f"lightning.{name}.utilities.rank_zero")
            logger.addFilter(_no_tip)
            at_the_end.callback(logger.removeFilter, _no_tip)
        yield


def hide_short_bars(*directories: str) -> None:
    """Switch transformers' loading and saving bars off where all models are so small that a bar would only flash."""
    from transformers.utils import logging as transformers_logging

    size = sum(file.stat().st_size for folder in directories for file in Path(folder).glob("*.safetensors"))
    if all(map(os.path.isdir, directories)) and size <= _SHORT:
        transformers_logging.disable_progress_bar()


T = TypeVar("T")


def progress(items: Iterable[T], description: str) -> Iterator[T]:
    """Pass items on and show a bar once three seconds have gone by, on the first rank only; it vanishes at the end."""
    return iter(tqdm(items, desc=description, delay=3, leave=False, disable=rank() > 0))
