"""Five steps of training as open-unlearning's Trainer takes them, beside ours from the same weights."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from peer_code import PeerStep, trainer_default
from peer_tables import Table, drawn, relative, toy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssiuu.datamodules.pairs import batch_of
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.objectives import objectives

STEPS = 5
LEARNING_RATE = 1e-4
#: AdamW divides by the gradient's size, and so makes more of what float32 rounds in some of the peer's losses.
LIMIT = 1e-4
TOKENS = {"reduction": "token"}
#: The peer's name, ours, our options, the peer's attributes, batches of a step, what differs.
RUNS: list[tuple[str, str, dict[str, Any], dict[str, Any], int, str]] = [
    ("GradAscent", "GradientAscent", TOKENS, {}, 1, ""),
    ("GradDiff", "GradientDifference", TOKENS, {}, 1, ""),
    ("GradDiff", "GradientDifference", TOKENS, {}, 2, ""),
    ("GradDiff", "GradientDifference", {}, {}, 1, "a mean over all tokens of the batch there, over sequences here"),
    ("NPO", "NPO", TOKENS, {"beta": 0.1}, 1, ""),
    ("SimNPO", "SimNPO", TOKENS, {"beta": 4.5, "delta": 0.0, "gamma": 0.125}, 1, ""),
    ("WGA", "WGA", TOKENS, {"beta": 1.0}, 1, ""),
    ("SatImp", "SatImp", TOKENS, {"beta1": 5.0, "beta2": 1.0, "gamma": 0.1}, 1, ""),
    ("CEU", "CEU", TOKENS, {"ignore_first_n_answer_tokens": 1}, 1, ""),
]
_FORGET, _RETAIN = [(9, 2), (4, 7), (6, 3)], [(3, 6), (8, 2), (5, 4)]


def batches(model: AnswerModel, count: int) -> list[dict[str, dict[str, Tensor]]]:
    """Of three forget and three retain sequences of unequal lengths."""
    made = []
    for number in range(count):
        pairs = {"forget": drawn(_FORGET, 10 + number, model), "retain": drawn(_RETAIN, 50 + number, model)}
        made.append({name: batch_of(some, 1) | {"example_id": torch.arange(3)} for name, some in pairs.items()})
    return made


def ours(name: str, options: Mapping[str, Any], model: AnswerModel, some: list[Any], accumulated: int) -> None:
    """Train a model in place, by our Trainer."""
    optimizer = partial(trainer_default, learning_rate=LEARNING_RATE)
    module = objectives()[name](optimizer=optimizer, reference="second_model", **options)
    module.adopt(model.train(), load_tokenizer("tiny"))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        accumulate_grad_batches=accumulated,
        limit_val_batches=0,
        **quiet,
    )
    trainer.fit(module, DataLoader(some, batch_size=None, collate_fn=lambda ready: ready))  # type: ignore[arg-type]


def theirs(step: PeerStep, some: list[Any], accumulated: int) -> None:
    """Train a model in place, as the peer's Trainer does."""
    step.model.train()
    for first in range(0, STEPS * accumulated, accumulated):
        step(*some[first : first + accumulated])


def flat(model: nn.Module) -> Tensor:
    """All weights, one after the other."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def compare(class_named: Callable[[str], Any]) -> bool:
    """Print the table; whether all that should agree does."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    start = toy(0)
    some = batches(start, 2 * STEPS)
    bare = [{n: {k: v for k, v in p.items() if k != "example_id"} for n, p in one.items()} for one in some]
    table = Table("after five steps", "batches", "ours, loss", "theirs", "rel. difference", "of the weights' change")
    for name, own, options, attributes, accumulated, note in RUNS:
        mine, other = copy.deepcopy(start), copy.deepcopy(start)
        ours(own, options, mine, some[: STEPS * accumulated], accumulated)
        optimizer = trainer_default(other.hf.parameters(), LEARNING_RATE)
        step = PeerStep(class_named, name, other.hf, optimizer, **attributes)
        theirs(step, bare, accumulated)
        losses = []
        with torch.no_grad():  # the peer's, at either's weights
            for model in (other, mine):
                step.model = vars(step.method)["model"] = model.hf
                losses.append(step.loss(bare[0]).double())
        moved = [flat(model) - flat(start) for model in (mine, other)]
        if not all(change.any() for change in moved):
            raise SystemExit(f"error: {name}: no weight has changed")
        differences = relative(losses[1], losses[0]), relative(*moved)
        names = f"{name} {options or ''}".strip(), f"unequal, {accumulated} a step"
        table.row(names, (losses[1].item(), losses[0].item()), differences, note, LIMIT)
    return table.agrees
