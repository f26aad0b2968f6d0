"""Where an interrupted run goes on: Lightning's counters and the loader's position, from one count of batches."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L

_COUNTS = ("ready", "started", "processed", "completed")


def is_over(trainer: L.Trainer) -> bool:
    """Whether no step follows, without what Lightning does when it asks: say so, and count the epoch as completed."""
    telling, epoch = logging.getLogger("lightning.pytorch.utilities.rank_zero"), trainer.fit_loop.epoch_progress.current
    was, completed = telling.disabled, epoch.completed
    telling.disabled = True
    try:
        return trainer.fit_loop.done
    finally:
        telling.disabled, epoch.completed = was, completed


def settle_progress(checkpoint: dict[str, Any], accumulate: int = 1) -> None:
    """Make what a checkpoint says of its place in the run one statement, before Lightning reads it.

    Lightning counts epochs and batches in several places, each by how far it had come when the checkpoint was written,
    and guesses from their differences where to go on. A run that is taken up at the end of an epoch is then counted
    differently from one that was not interrupted, and goes on wrongly when it is taken up again. So everything is
    derived here from the epoch that the loader serves and the number of its batches that have been trained on: within
    an epoch the next batch follows, after its last one the next epoch begins. Gradients that were being accumulated are
    not in a checkpoint; the batches since the last optimiser step (every ``accumulate``) are done again.

    Checkpoints without the state of a :class:`~lightning_ssiuu.datamodules.sampling.ResumableLoader` are left alone.
    """
    loop = checkpoint["loops"]["fit_loop"]
    loaders = loop["state_dict"].get("combined_loader") or [{}]
    if set(loaders[0]) != {"epoch", "position"}:
        return
    epoch, batches = loaders[0]["epoch"], loop["epoch_loop.batch_progress"]
    total, done = (batches[kind]["processed"] for kind in ("total", "current"))
    again = 0 if batches["is_last_batch"] else done % accumulate
    is_validated = again > 0 or batches["current"]["completed"] == done
    if batches["is_last_batch"]:
        epoch, done = epoch + 1, 0
        # What comes after an epoch counts this; it is no part of going on with the next one.
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]
    else:
        total, done = total - again, done - again
    # An epoch that has begun is ready and started, but neither processed nor completed.
    begun = epoch + (done > 0)
    loop["epoch_progress"] = _both({"ready": begun, "started": begun, "processed": epoch, "completed": epoch})
    # One that is not completed tells Lightning that its end, a validation perhaps, was not seen.
    lacking = int(done > 0 and not is_validated)
    loop["epoch_loop.batch_progress"] = {
        "total": dict.fromkeys(_COUNTS, total) | {"completed": total - lacking},
        "current": dict.fromkeys(_COUNTS, done) | {"completed": done - lacking},
        "is_last_batch": False,
    }
    # A validation that had begun is done from its beginning, one that is due and had not begun counts as begun.
    validation = dict.fromkeys(_COUNTS, 0)
    loop["epoch_loop.val_loop.batch_progress"] = {
        "total": validation | {"ready": lacking, "started": lacking},
        "current": validation,
        "is_last_batch": False,
    }
    loop["state_dict"]["combined_loader"] = [{"epoch": epoch, "position": done}]


def _both(counts: dict[str, int]) -> dict[str, dict[str, int]]:
    return {"total": dict(counts), "current": dict(counts)}
