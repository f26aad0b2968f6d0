"""Callbacks that need validation, and what ``validate`` and ``test`` score and print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.table import Column, Table

from lightning_ssiuu.callbacks import KeepCheckpoints
from lightning_ssiuu.callbacks.save_pretrained import ADAPTER_END
from lightning_ssiuu.evaluation.scorer import Scorer
from lightning_ssiuu.models.adapter_directory import is_adapter_directory
from lightning_ssiuu.objectives import UnlearningModule
from lightning_ssiuu.utils.distributed import rank
from lightning_ssiuu.utils.errors import Given, UserError
from lightning_ssiuu.utils.registry import shortened
from lightning_ssiuu.utils.terminal import text_console

#: ``trainer.check_val_every_n_epoch`` where nobody asked for validation. The package's callbacks look at the model when
#: they need to; a validation run per epoch would cost more than the training.
NEVER = 1_000_000
_HOOKS = [f"on_validation_{when}" for when in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")]


def validation_options(callbacks: Iterable[L.Callback], given: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer options that let the user's callbacks act: checkpoints allowed, a validation run after each epoch.

    ``given`` are the Trainer's options as configured; what was set there stays.
    """
    callbacks = list(callbacks)
    options: dict[str, Any] = {}
    for callback in callbacks:
        is_on_score = isinstance(callback, EarlyStopping) and not callback.monitor.startswith("train/")
        if is_on_score and callback._check_on_train_epoch_end is None:  # type: ignore[attr-defined]
            # By itself it would look at each epoch's end, where a run that ends within an epoch has no score.
            callback._check_on_train_epoch_end = False  # type: ignore[attr-defined]
    if any(isinstance(callback, Checkpoint) for callback in callbacks):
        options["enable_checkpointing"] = True
    wanted = given.get("enable_checkpointing") or given.get("val_check_interval") is not None
    if (wanted or any(map(_needs_validation, callbacks))) and given.get("check_val_every_n_epoch") == NEVER:
        options["check_val_every_n_epoch"] = 1
    return options


def _needs_validation(callback: L.Callback) -> bool:
    if isinstance(callback, KeepCheckpoints):
        return False
    if isinstance(callback, ModelCheckpoint) and callback.monitor is None:
        return not (callback._every_n_train_steps or callback._train_time_interval)
    return any(is_overridden(hook, callback, L.Callback) for hook in _HOOKS)


def check_callbacks(trainer: L.Trainer, module: UnlearningModule, data: Any) -> None:
    """Refuse callbacks that could not act, before anything is trained.

    Raises:
        UserError: If one watches a score that nobody computes, or logs where there is no logger.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LearningRateMonitor) and not trainer.loggers:
            raise UserError("trainer.callbacks", "LearningRateMonitor", "a logger to log to: trainer.logger is false")
        monitor = getattr(callback, "monitor", None)
        if not isinstance(callback, ModelCheckpoint | EarlyStopping) or monitor is None:
            continue
        if monitor in ("epoch", "step") or monitor.startswith("train/"):  # regularisers have names of their own
            continue
        names = [f"train/{part}_loss" for part in ("forget", "retain")]
        for split in data.eval_splits:
            part = next(iter(data.eval_dataloader(split)))[split]
            names += [f"{split}/{name}" for name in Scorer(None, None, module.scores).names(part)]  # type: ignore[arg-type]
        is_own = not type(module).__module__.startswith("lightning_ssiuu.")  # which may log whatever it likes
        if monitor not in names and not (is_own and monitor.partition("/")[0] not in data.eval_splits):
            raise UserError(f"trainer.callbacks.{type(callback).__name__}.monitor", monitor, f"one of {names}")


@contextmanager
def callback_mistakes() -> Iterator[None]:
    """Inside, what Lightning and its callbacks say of a configuration they cannot follow is a UserError."""
    try:
        yield
    except UserError:
        raise
    except MisconfigurationException as error:
        raise UserError("trainer", Given("what Lightning cannot follow"), shortened(str(error))) from error
    except RuntimeError as error:
        if not str(error).startswith("Early stopping conditioned on metric"):
            raise
        raise UserError("trainer.callbacks", "EarlyStopping", shortened(str(error))) from error


def finished_run(config: Any) -> Path | None:
    """The model of a finished run whose own ``config.yaml`` is what was given as ``--config``."""
    saved = (config.get("saving") or {}).get("folder")
    for file in map(Path, map(str, config.get("config") or ())):
        folder = file.parent
        if not (saved and file.name == "config.yaml" and (folder / "metrics.json").is_file()):
            continue
        alone = folder / f"{saved}{ADAPTER_END}"
        if (folder / saved / "config.json").is_file():
            return folder / saved
        if is_adapter_directory(alone):
            return alone
    return None


def print_scores(results: Sequence[Mapping[str, float]], of: str) -> None:
    """Print what ``validate`` or ``test`` found, each score once under its name, in percent."""
    if rank() > 0:
        return
    # Lightning gives every score again for each loader.
    scores = {name.split("/dataloader_idx_")[0]: value for result in results for name, value in result.items()}
    table = Table(Column("", no_wrap=True), Column("", justify="right"), "", box=None, show_header=False)
    for name, value in scores.items():
        table.add_row(name, f"{value:.1f}", "%")
    console = text_console()
    console.print(f"Scores of {of}", soft_wrap=True, highlight=False, markup=False)
    console.print(table)
