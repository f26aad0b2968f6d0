"""A training run that takes milliseconds, draws random numbers, and is interrupted as often as one likes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from toys.data import Toy, byte_tokenizer, examples
from toys.models import bare_trainer

from lightning_ssiuu import UnlearningModule
from lightning_ssiuu.callbacks import KeepCheckpoints
from lightning_ssiuu.datamodules.splits import Splits
from lightning_ssiuu.training.checkpoints import newest_checkpoint

STEPS = 12
TOKENIZER = byte_tokenizer()


class KilledError(Exception):
    """Stands for SIGKILL: nothing but the checkpoints is left of a run."""


class Kill(Callback):
    """Ends the run in the middle of the step after ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if trainer.global_step == self.step:
            raise KilledError


class Ids(Callback):
    """Which examples every batch had, by the number of the batch since the beginning; the last life's."""

    def __init__(self, seen: dict[int, Any]) -> None:
        self.seen = seen

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        ids = [part["example_id"].tolist() for part in batch.values()]
        self.seen[trainer.fit_loop.total_batch_idx] = trainer.current_epoch, batch_idx, ids


class Scores(Callback):
    """What validation gave, by the number of batches before it."""

    def __init__(self, seen: dict[int, float]) -> None:
        self.seen = seen

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen[trainer.fit_loop.total_batch_idx] = trainer.callback_metrics["score"].item()


class Small(UnlearningModule):
    """A few weights without a language model, whose loss depends on which examples a batch has and on dropout."""

    def configure_model(self) -> None:
        if not self.is_loaded:
            self.model = nn.Sequential(nn.Embedding(40, 4), nn.Dropout(0.2), nn.Linear(4, 1))  # type: ignore[assignment]
            with torch.no_grad():
                for number, weight in enumerate(self.parameters()):
                    weight.copy_(torch.sin(torch.arange(weight.numel()) + number).view_as(weight))

    def forward(self, batch: Any) -> Any:
        logits = self.model(batch["example_id"])
        return SimpleNamespace(logits=logits, peaks=logits.detach().amax(-1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = sum(self.model(part["example_id"]).square().mean() for part in batch.values())
        self.log("train/loss", loss)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.scores_seen: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        (part,) = batch.values()
        self.scores_seen.append(self.model(part["example_id"]).mean().item())

    def on_validation_epoch_end(self) -> None:
        self.log("score", sum(self.scores_seen))


def small() -> Small:
    """With a schedule that moves in every step."""
    return Small(
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95),
        forget_weight=0.0,
    )


def data(n_batches: int, **options: Any) -> Toy:
    """A set of so many batches of two, the last of which runs over into the next permutation."""
    splits = Splits(examples(0, max(2, 2 * n_batches - 1)), examples(20, 7))
    return Toy(splits, TOKENIZER, **options)


def life(
    folder: Path, every: int | None, end: int | None, n_batches: int = 3, workers: int = 0, **options: Any
) -> dict[str, Any] | None:
    """Train from the newest checkpoint on; None if killed after step ``end``, else what equal runs have in common."""
    resume = newest_checkpoint(folder)
    L.seed_everything(0 if resume is None else 1, verbose=False)
    module = small()
    seen, scores = {}, {}  # type: tuple[dict[int, Any], dict[int, float]]
    more = options.pop("callbacks", ())
    kill = [] if end is None else [Kill(end)]
    callbacks = [*more, Ids(seen), Scores(scores), *kill, KeepCheckpoints(every, folder.name)]
    limits = {} if "max_epochs" in options else {"max_steps": STEPS, "max_epochs": -1}
    defaults = {"default_root_dir": folder.parent, "enable_checkpointing": True, "check_val_every_n_epoch": 10**6}
    trainer = bare_trainer(**(defaults | limits | options), callbacks=callbacks)
    try:
        trainer.fit(module, data(n_batches, num_workers=workers), ckpt_path=resume)
    except KilledError:
        return None
    return {
        "steps": trainer.global_step,
        "epoch": trainer.current_epoch,
        "batches": trainer.fit_loop.total_batch_idx,
        "bits": digest([*module.state_dict().values(), *states(trainer.optimizers[0])]),
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "seen": seen,
        "scores": scores,
    }


def states(optimizer: Any) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def digest(tensors: Sequence[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


Known = dict[tuple[int, ...], tuple[str, bytes] | None]


def lives(folder: Path, every: int, kills: Sequence[int], known: Known | None = None, **options: Any) -> dict[str, Any]:
    """A run killed after each of these steps and taken up each time.

    ``known`` remembers what runs that were killed alike so far had left, so that their common lives are lived once.
    """
    known = {} if known is None else known
    folder.mkdir(parents=True, exist_ok=True)
    _leave(folder, None)
    for count, end in enumerate(kills, 1):
        past = tuple(kills[:count])
        if past in known:
            _leave(folder, known[past])
            continue
        assert life(folder, every, end, **options) is None, "it ended before it was killed"
        newest = newest_checkpoint(folder)
        known[past] = (newest.name, newest.read_bytes()) if newest else None
    result = life(folder, every, None, **options)
    assert result is not None
    return result


def _leave(folder: Path, left: tuple[str, bytes] | None) -> None:
    for path in folder.glob("*.ckpt"):
        path.unlink()
    if left is not None:
        (folder / left[0]).write_bytes(left[1])
