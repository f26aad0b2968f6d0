"""SIGKILL at ten random points; a run taken up from the newest checkpoint ends with the bits of one left alone."""

from __future__ import annotations

import io
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from toys.data import Toy
from toys.models import bare_trainer, weights
from toys.training import Tiny, adam

from lightning_ssiuu.callbacks import (
    ForgetThresholdStopping,
    KeepCheckpoints,
    NeuronAttributionCallback,
    forget_threshold,
)
from lightning_ssiuu.regularizers import AttributionRegularizer
from lightning_ssiuu.training.checkpoints import AtomicCheckpointIO, newest_checkpoint

STEPS = 7  # three batches an epoch
EVERY = 2  # steps between two checkpoints: some steps are lost and have to be done again
#: How a child dies, and how often of the ten times. A step, and a share of a file or of the run's time, are drawn.
WAYS = {
    "time": 2,  # whatever it is doing
    "file half written": 2,
    "before the rename": 1,
    "before the last one is removed": 1,
    "between backward and optimiser step": 1,
    "after the optimiser step": 1,
    "measuring attribution": 1,
    "looking at the stopping score": 1,
}


class Ids(Callback):
    """Writes down which examples every step saw, where a killed process leaves it."""

    def __init__(self, file: Path) -> None:
        self.file, self.begin = file, 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.begin = time.monotonic()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        ids = [part["example_id"].tolist() for part in batch.values()]
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{trainer.global_step} {ids}\n")


class Deadly(Callback):
    """Kills its process, the hard way, at the given step."""

    def __init__(self, way: str, step: int, share: float) -> None:
        self.way, self.step, self.share, self.calls = way, step, share, 0

    def die(self, *_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def before_call(self, number: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function``, but die instead of calling it for the ``number``-th time."""
        self.calls += 1
        return self.die() if self.calls == number else function(*args, **kwargs)

    def half_saved(self, save: Callable[..., None], content: Any, file: Any) -> None:
        self.calls += 1
        if self.calls * EVERY < self.step - 1:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: int(self.share * whole.tell())])
        file.flush()
        return self.die()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        saves = max(1, self.step // EVERY)
        keep = next(one for one in trainer.callbacks if isinstance(one, KeepCheckpoints))
        watch = next(one for one in trainer.callbacks if isinstance(one, NeuronAttributionCallback))
        if self.way == "file half written":
            torch.save = partial(self.half_saved, torch.save)
        elif self.way == "before the rename":
            Path.replace = partial(self.before_call, saves, Path.replace)  # type: ignore[method-assign, assignment]
        elif self.way == "before the last one is removed":
            keep._remove = partial(self.before_call, saves + 1, keep._remove)  # type: ignore[method-assign]
        elif self.way == "measuring attribution":
            watch.method = partial(self.before_call, self.step + 2, watch.method)  # two are before training
        elif self.way == "looking at the stopping score":
            forget_threshold.score_above = partial(self.before_call, self.step, forget_threshold.score_above)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.way == "after the optimiser step":
            trainer.optimizers[0].register_step_post_hook(partial(self.before_call, self.step, lambda *_: None))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.way == "between backward and optimiser step" and trainer.global_step + 1 == self.step:
            self.die()


def run(folder: Path, resume: Path | None = None, deadly: Deadly | None = None) -> dict[str, Any]:
    """Train; everything that two equal runs have in common."""
    L.seed_everything(0 if resume is None else 1, verbose=False)
    regularizer = AttributionRegularizer(0.2, "relative", target="length_normalised")
    module = Tiny(optimizer=adam, regularizer=regularizer)
    watch = NeuronAttributionCallback(4, every_n_steps=1, write=False)
    stop = ForgetThresholdStopping("probability", 0.0, unknown="warn")
    ids = Ids(folder / "ids.txt")
    trainer = bare_trainer(
        STEPS,
        callbacks=[watch, stop, KeepCheckpoints(EVERY), ids, *([deadly] if deadly else [])],
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=True,
        default_root_dir=folder,
        check_val_every_n_epoch=10**6,
    )
    trainer.fit(module, datamodule=Toy(), ckpt_path=resume)
    assert trainer.global_step == STEPS
    return {
        "seconds": time.monotonic() - ids.begin,
        "weights": weights(module),
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "regularizer": regularizer.state(),  # A_{t−1}
        "history": watch.history,
        "stopping": stop.value,
    }


def killed(folder: Path, deadly: Deadly, seconds: float = 0.0) -> bool:
    """Fork, so that nothing is imported again; the child trains, from what is left there on, until it is killed."""
    if (child := os.fork()) == 0:
        try:
            run(folder, newest_checkpoint(folder / "checkpoints"), deadly)
            time.sleep(60 if deadly.way == "time" else 0)  # it was quicker than thought
        finally:
            os._exit(1)
    if deadly.way == "time":
        while not (folder / "ids.txt").exists():
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.filterwarnings("ignore")
def test_killed_at_ten_random_points(tmp_path: Path) -> None:
    draw = random.Random(3)
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole")
    seconds = whole.pop("seconds")
    ids = dict(line.split(" ", 1) for line in (tmp_path / "whole" / "ids.txt").read_text().splitlines())
    assert len(ids) == STEPS
    resumed_at = []
    for number, way in enumerate(way for way, times in WAYS.items() for _ in range(times)):
        folder = tmp_path / str(number)
        folder.mkdir()
        deadly = Deadly(way, draw.randint(1, STEPS), draw.random())
        assert killed(folder, deadly, deadly.share * seconds)
        checkpoint = newest_checkpoint(folder / "checkpoints")
        again = run(folder, checkpoint)
        for key, value in whole.items():
            assert same(value, again[key]), (way, deadly.step, checkpoint, key)
        for line in (folder / "ids.txt").read_text().splitlines():  # of both lives, what was done twice included
            step, seen = line.split(" ", 1)
            assert seen == ids[step], (way, deadly.step, step)
        assert [file.name for file in (folder / "checkpoints").iterdir()] == [f"step={STEPS - STEPS % EVERY}.ckpt"]
        resumed_at.append(checkpoint and checkpoint.name)
    assert len(set(resumed_at)) > 2, resumed_at


@pytest.mark.filterwarnings("ignore")
def test_killed_three_times_in_a_row(tmp_path: Path) -> None:
    """The regulariser's anchor, the attribution's history and the stopping score, too; the last ends an epoch."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, folder = run(tmp_path / "whole"), tmp_path / "killed"
    del whole["seconds"]
    for step, left in ((4, 2), (6, 4), (7, 6)):
        assert killed(folder, Deadly("between backward and optimiser step", step, 0.0))
        assert [file.name for file in (folder / "checkpoints").iterdir()] == [f"step={left}.ckpt"]
    again = run(folder, folder / "checkpoints" / "step=6.ckpt")
    for key, value in whole.items():
        assert same(value, again[key]), key
