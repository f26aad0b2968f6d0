"""What gpu_check.py measures of speed: what makes a step quick, adapters on quantised weights, and the peer's step."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from batches import shares, unequal_batches
from gpu_tools import (
    Clock,
    Recorder,
    adamw,
    adapted,
    compared,
    free,
    measured,
    regularized,
    saved,
    trainer,
    utilization,
)
from peer_code import PeerStep, imported
from timing import adopted, alternating, peak_bytes, ratio, step, wait

from lightning_ssiuu import NPO, Facts, GradientDifference
from lightning_ssiuu.cli.memory import estimate_memory
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_tokenizer


@contextmanager
def having(model: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute of a model is another."""
    before = getattr(model, name)
    setattr(model, name, value)
    try:
        yield
    finally:
        setattr(model, name, before)


def speed(r: Recorder) -> None:
    """A gradient-difference step at Llama-3.2-1B's shape: as it is, and without each thing that makes it quick.

    Sequences of unequal length, of which padding would be a share. ``chunked logits`` has a bound that all answers
    exceed. ``utilization`` is of the card's matrix units, for the products without padding.
    """
    model = r.model(torch.bfloat16)
    (batch,) = unequal_batches(model.hf.config.vocab_size, r.size(32, 2), 1, r.device)
    parameters, steps = sum(p.numel() for p in model.parameters()), r.size(10, 1)
    r["shares"] = shares([batch])
    nothing = partial(having, model, "packs", model.packs)
    foreach = partial(torch.optim.AdamW, lr=1e-6, foreach=True)
    variants: dict[str, tuple[Any, Callable[[Any], Any], Any]] = {
        "as it is": ({}, adamw, nothing),
        "padded": ({}, adamw, partial(having, model, "packs", False)),
        "foreach": ({}, foreach, nothing),
        "chunked logits": ({}, adamw, partial(having, model, "logit_bytes", 1)),
        "compiled": ({"torch_compile": r.size(True, "eager")}, adamw, nothing),
        "SSIUU": ({"regularizer": regularized()}, adamw, nothing),
    }
    base = None
    for name, (options, make, changed) in variants.items():
        with changed():
            row = measured(GradientDifference(**options), model, batch, make, steps)
        base = base or row
        r[name] = compared(row, base, parameters) | utilization(model, batch, row["seconds"], r.device)
        model._compiled = None


def adapters(r: Recorder) -> None:
    """SSIUU on adapters over weights in 8 and 4 bits, 1 B and 8 B: seconds, utilization, memory beside its estimate."""
    for shape in r.size(("1b", "8b"), ("toy",)):
        with tempfile.TemporaryDirectory() as folder:
            saved(r, folder, shape)
            free()
            data = Facts(tokenizer=folder, batch_size=r.size(8, 2), multiple_choice=False)
            for width in r.size(("8bit", "4bit"), ("4bit",)):
                module = adapted(folder, width)
                estimated = estimate_memory(module, data, trainer(r.device, 3)).by_phase["training step"]
                free()
                peak_bytes(r.device, reset=True)
                clock = Clock()
                trainer(r.device, r.size(5, 2), clock).fit(module, data)
                row = {"seconds": clock.last, "peak_bytes": peak_bytes(r.device), "estimated_bytes": estimated}
                if row["peak_bytes"] is not None:
                    row["estimated_over_measured"] = estimated / row["peak_bytes"]
                r[f"{shape}, {width}"] = row | utilization(module.model, clock.batch, clock.last, r.device)
                del module


def peer(r: Recorder) -> None:
    """Steps beside open-unlearning's own on one batch, Llama-3.2-1B's shape, bf16 weights, fused AdamW for both."""
    if r.peer is None:
        r["skipped"] = "no checkout of open-unlearning was given (--peer DIR)"
        return
    model = r.model(torch.bfloat16)
    (batch,) = unequal_batches(model.hf.config.vocab_size, r.size(32, 2), 1, r.device)
    theirs = {name: {k: v for k, v in part.items() if k != "example_id"} for name, part in batch.items()}
    with imported(Path(r.peer)) as class_named:
        for ours, name in ((GradientDifference(), "GradDiff"), (NPO(), "NPO")):
            r[name] = beside(
                r, model, ours, batch, PeerStep(class_named, name, model.hf, adamw(model.parameters())), theirs
            )


def beside(r: Recorder, model: AnswerModel, ours: Any, batch: Any, one: PeerStep, theirs: Any) -> dict[str, Any]:
    """Seconds in turn and peak memory of a step of ours and one of the peer's."""
    adopted(ours, model, load_tokenizer("tiny"), batch)
    optimizer = adamw(model.parameters())

    def seconds(run: Callable[[], Any]) -> float:
        wait(r.device)
        start = time.perf_counter()
        run()
        wait(r.device)
        return time.perf_counter() - start

    ways = {"ours": partial(step, ours, optimizer, batch), "the peer's": partial(one, theirs)}
    times = alternating({name: partial(seconds, run) for name, run in ways.items()}, r.size(10, 1), 2)
    row: dict[str, Any] = {"seconds": {name: statistics.median(values) for name, values in times.items()}}
    row |= ratio(times["ours"], times["the peer's"])
    for name, run in ways.items():
        peak_bytes(r.device, reset=True)
        run()
        row[f"peak_bytes, {name}"] = peak_bytes(r.device)
    return row
