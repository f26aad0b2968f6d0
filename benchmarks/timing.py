"""What the benchmarks share: random batches, an optimiser step without a Trainer, alternating timings, table rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.objectives import UnlearningModule
from lightning_ssiuu.training.reference import LiveReference, StoredReference, store

Batch = dict[str, dict[str, Tensor]]
T = TypeVar("T")


def random_batch(vocabulary: int, batch: int, length: int, device: torch.device | str = "cpu") -> Batch:
    """Forget and retain part of random tokens; the last half of every sequence is the answer."""
    generator = torch.Generator().manual_seed(0)

    def part() -> dict[str, Tensor]:
        ids = torch.randint(vocabulary, (batch, length), generator=generator)
        labels = ids.clone()
        labels[:, : length // 2] = -100
        tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        tensors["example_id"] = torch.arange(batch)
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    return {"forget": part(), "retain": part()}


def adopted(
    module: UnlearningModule, model: AnswerModel, tokenizer: PreTrainedTokenizerBase, batch: Batch | None = None
) -> Any:
    """The objective on a model in memory; what it logs without a Trainer is in its dictionary ``logged``.

    Args:
        module: The objective.
        model: Its model.
        tokenizer: Its tokenizer.
        batch: What an objective that compares with the original model will be given: kept in memory, as a run reads
            what it kept on disk.
    """
    module.adopt(model, tokenizer)
    if batch is not None:
        module._trainer = L.Trainer(accelerator=model.hf.device.type.replace("cuda", "gpu"), devices=1, barebones=True)
        module.training_parts = lambda name, *_: iter([batch[name]])  # type: ignore[method-assign]
        known: dict[str, Tensor] = {}

        def original(name: str, _: Part | None = None) -> Tensor:
            if name not in known:
                known[name] = LiveReference(model, observed())(name, batch[name.partition("/")[0]])
            return known[name]

        observed, module.references = module.references, dict  # type: ignore[method-assign]
        for one in (module, *module._backbone):
            one._reference = original  # type: ignore[assignment]
        module.on_train_start()
        for name in observed():  # now, of the weights as they are
            original(name)
    logged: dict[str, Any] = {}
    module.logged = logged  # type: ignore[assignment]
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign]
    return module


def cached_reference(module: UnlearningModule, batches: Sequence[Batch], folder: Path) -> None:
    """What a run computes before its first step and keeps on disk, for the given batches; ids are given anew."""
    for number, batch in enumerate(batches):
        for part in batch.values():
            part["example_id"] = torch.arange(len(part["labels"])) + number * len(part["labels"])
    if observations := module.references():
        parts = {name: partial(iter, [batch[name] for batch in batches]) for name in ("forget", "retain")}
        store(folder, module.model, observations, parts)
        module._reference = StoredReference(folder)


def step(
    module: UnlearningModule,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    forward: Callable[[], AbstractContextManager] = nullcontext,
) -> float:
    """One optimiser step as the Trainer does it, without its logging; returns seconds.

    Args:
        module: The objective.
        optimizer: Over its model's parameters.
        batch: Of both parts, on the model's device.
        forward: Makes the context of the forward pass, autocast for instance.
    """
    device = batch["forget"]["input_ids"].device
    wait(device)
    start = time.perf_counter()
    with forward():
        loss = module.training_step(batch, 0)
    optimizer.zero_grad()  # the Trainer's order: the last gradients outlive the forward pass
    loss.backward()
    module.on_before_optimizer_step(optimizer)
    optimizer.step()
    if module.regularizer is not None:
        module.regularizer.after_step(module.model)
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device, reset: bool = False) -> int | None:
    """Most memory allocated on the device since the last reset; None on a CPU, which does not count."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return peak


def allocated_peak(profiler: torch.profiler.profile) -> int:
    """Most bytes allocated on the CPU while torch's profiler looked (``profile_memory=True``), above its start."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), n, e.nbytes()) for n, e in enumerate(events) if e.name() == "[memory]")
    return max(accumulate((size for *_, size in changes), initial=0))


def alternating(steps: Mapping[str, Callable[[], T]], repeats: int, warm_up: int = 2) -> dict[str, list[T]]:
    """Seconds of every variant, in turn, so that what else the machine does meets all of them alike."""
    for _ in range(warm_up):
        for run in steps.values():
            run()
    times: dict[str, list[T]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, run in steps.items():
            times[name].append(run())
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float | list[float]]:
    """Median and range of the pairwise ratios."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
