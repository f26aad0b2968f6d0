"""However often a run is interrupted, it takes the steps, and ends with the bits, of one that was not."""

from __future__ import annotations

import logging
import os
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from toys.interrupted import STEPS, Known, life, lives
from toys.ranks import ranks

EPOCH = 4
COMMON = ("steps", "epoch", "batches", "bits", "rate")


@pytest.fixture(autouse=True)
def silent(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        caplog.set_level(logging.ERROR, name)


def same(result: dict[str, Any], whole: dict[str, Any], *which: object) -> None:
    """Steps and bits, and what the last life saw: its batches and its validations, none left out."""
    for key in COMMON:
        assert result[key] == whole[key], (*which, key, result[key], whole[key])
    first = min(result["seen"])
    for key in ("seen", "scores"):
        assert all(whole[key].get(batch) == value for batch, value in result[key].items()), (*which, key)
        assert {batch for batch in whole[key] if batch >= first} <= set(result[key]), (*which, key)


@pytest.mark.filterwarnings("ignore")
def test_every_pair_and_random_triples(tmp_path: Path) -> None:
    """Checkpoints every 1, 2, 3 and all steps of an epoch.

    What is lost between a checkpoint and the kill makes no difference, so of the kills that leave the same checkpoints
    one is drawn.
    """
    draw = random.Random(0)
    steps, options = 2 * EPOCH + 2, {"n_batches": EPOCH, "max_steps": 2 * EPOCH + 2}
    whole = lives(tmp_path / "whole", steps, (), **options)
    assert (whole["steps"], whole["batches"]) == (steps, steps - 1)
    for every in (1, 2, 3, EPOCH):
        known: Known = {}
        kept = list(range(0, steps, every))
        kill = {step: min(step + draw.randrange(every), steps - 1) for step in kept}
        pairs = [*combinations(kept[every == 1 :], 2), *((step, step) for step in kept if every > 1)]
        triples = [sorted(draw.choices(kept, k=3)) for _ in range(8 if every == 1 else 4)]
        for places in (*pairs, *triples):
            kills = [kill[place] for place in places]
            same(lives(tmp_path / "run", every, kills, known, **options), whole, every, kills)


#: Options of the Trainer and the data, and batches an epoch.
SETTINGS: dict[str, dict[str, Any]] = {
    "epochs of three, as reported": {"n_batches": 3},
    "an epoch of one batch": {"n_batches": 1},
    "by epochs": {"n_batches": 3, "max_epochs": 4},
    "accumulated, the last of an epoch alone": {"n_batches": 5, "accumulate_grad_batches": 2},
    "accumulated, by epochs": {"n_batches": 5, "accumulate_grad_batches": 2, "max_epochs": 4},
    "a part of every epoch": {"n_batches": 3, "limit_train_batches": 2},
    "a part of every epoch, by epochs": {"n_batches": 3, "limit_train_batches": 2, "max_epochs": 5},
    "validated after every epoch": {"n_batches": 3, "check_val_every_n_epoch": 1},
    "validated, by epochs": {"n_batches": 3, "check_val_every_n_epoch": 1, "max_epochs": 4},
    "validated within epochs": {"n_batches": 5, "check_val_every_n_epoch": 1, "val_check_interval": 2},
    "validated across epochs": {"n_batches": 3, "check_val_every_n_epoch": None, "val_check_interval": 4},
    "validated while accumulating": {
        **{"n_batches": 5, "check_val_every_n_epoch": 1, "val_check_interval": 3, "accumulate_grad_batches": 2}
    },
    "with workers": {"n_batches": 3, "workers": 1},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, tmp_path: Path) -> None:
    draw, options = random.Random(name), SETTINGS[name]
    whole = lives(tmp_path / "whole", STEPS, (), **options)
    assert whole["steps"] >= 10
    if "max_epochs" in options:
        assert whole["epoch"] == options["max_epochs"]
    assert bool(whole["scores"]) == name.startswith("validated")
    end = whole["steps"]
    for every, kills in ((1, (3, 6, 9)), *((n, draw.sample(range(1, end), 3)) for n in (2, 3))):
        if "workers" in options and every > 1:
            continue  # they take time to start
        kills = sorted(kills)
        same(lives(tmp_path / f"{every} {kills}", every, kills, **options), whole, every, kills)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("max_epochs", [None, 4])
@pytest.mark.parametrize("when", ["steps", "validation", "epoch end"])
def test_checkpoints_of_a_callback_of_ones_own(when: str, max_epochs: int | None, tmp_path: Path) -> None:
    """Written by ModelCheckpoint at every step, after every validation, at every epoch's end; from each, and again."""
    options: dict[str, Any] = {"n_batches": 3} | ({} if max_epochs is None else {"max_epochs": max_epochs})
    if when == "validation":
        options |= {"check_val_every_n_epoch": 1, "val_check_interval": 2}
    given = {
        "steps": {"every_n_train_steps": 1},
        "validation": {"save_on_train_epoch_end": False, "every_n_epochs": 1},
        "epoch end": {"save_on_train_epoch_end": True, "every_n_epochs": 1},
    }[when]

    def run(folder: Path, resume: Path | None) -> dict[str, Any]:
        folder.mkdir()
        if resume is not None:
            (folder / resume.name).write_bytes(resume.read_bytes())
        keep = ModelCheckpoint(folder / "own", "{step}", save_top_k=-1, **given)
        result = life(folder, None, None, callbacks=[keep], **options)
        assert result is not None
        return result

    def saved(folder: Path) -> list[Path]:
        found = sorted((folder / "own").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
        return [path for path in found if path.stem != f"step={STEPS}"]

    whole = run(tmp_path / "whole", None)
    firsts = saved(tmp_path / "whole")
    assert len(firsts) >= 3
    for first in firsts:
        once = tmp_path / f"from {first.stem}"
        result = run(once, first)
        assert [result[key] for key in COMMON] == [whole[key] for key in COMMON], first
        for second in saved(once)[:: 1 if when == "epoch end" else 5]:
            twice = run(once / second.stem, second)
            assert [twice[key] for key in COMMON] == [whole[key] for key in COMMON], (first, second)


@pytest.mark.filterwarnings("ignore")
def test_a_callback_that_stops_by_validation_counts_on(tmp_path: Path) -> None:
    """Its patience is used up at the same step: no validation is left out, none counts twice."""
    options = {"n_batches": 3, "check_val_every_n_epoch": 1, "max_steps": 30}

    def stop() -> list[Any]:
        return [EarlyStopping("score", patience=2, mode="max", min_delta=10.0)]

    (tmp_path / "whole").mkdir()
    whole = life(tmp_path / "whole", None, None, callbacks=stop(), **options)
    assert whole is not None
    assert whole["steps"] == 9  # one measurement, and two that are no better
    for kills in ((3,), (3, 6), (4, 6, 8)):
        folder = tmp_path / str(kills)
        folder.mkdir()
        for end in kills:
            assert life(folder, 1, end, callbacks=stop(), **options) is None
        again = life(folder, 1, None, callbacks=stop(), **options)
        assert again is not None
        assert [again[key] for key in COMMON] == [whole[key] for key in COMMON], kills


def test_the_kill_is_one(tmp_path: Path) -> None:
    assert life(tmp_path, 1, 4) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step=4.ckpt"]


def test_two_ranks(tmp_path: Path) -> None:
    """Each has dropout masks of its own; a batch of two is shared between them."""
    patterns: list[tuple[int, list[int]]] = [(STEPS, []), (1, [3, 6, 9]), (2, [5, 7]), (3, [2, 9])]
    options = {"n_batches": 3, "strategy": "ddp", "devices": 2}

    def do() -> int:
        rank = os.environ.get("LOCAL_RANK", 0)
        for number, (every, kills) in enumerate(patterns):
            torch.save(lives(tmp_path / str(number), every, kills, **options), tmp_path / f"{number}.{rank}")
        return 0

    end = ranks(do, tmp_path / "ranks", timeout=200)
    assert end.status == 0, end.err[-3000:]
    for rank in range(2):
        whole, *interrupted = (torch.load(tmp_path / f"{number}.{rank}") for number in range(len(patterns)))
        assert whole["steps"] == STEPS
        for result, pattern in zip(interrupted, patterns[1:], strict=True):
            same(result, whole, rank, pattern)
    first, second = (torch.load(tmp_path / f"0.{rank}")["seen"] for rank in range(2))
    assert all(first[batch][2] != second[batch][2] for batch in first)  # other examples
