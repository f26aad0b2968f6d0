"""What the sections of gpu_check.py measure with: figures that are kept as they come, steps, runs of the Trainer."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from shapes import random_llama
from timing import Batch, adopted, peak_bytes, random_batch, step, wait
from torch import nn
from torch.utils.data import DataLoader

from lightning_ssiuu import AttributionRegularizer, GradientDifference
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives import UnlearningModule
from lightning_ssiuu.utils.files import write_json

#: Operations per second of the cards' matrix units in bfloat16, without sparsity, as their makers state them.
DENSE_BF16 = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


class Recorder:
    """Keeps figures in a file as they come, so that a section that is killed leaves what it had.

    Args:
        file: Where.
        device: ``"cuda"`` or ``"cpu"``.
        small: Toy sizes, to see that the code runs.
        peer: A checkout of open-unlearning, if there is one.
    """

    def __init__(self, file: Path, device: str, small: bool, peer: str | None = None) -> None:
        self.file, self.small, self.peer = file, small, peer
        self.device = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
        self.figures: dict[str, Any] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        self.figures[name] = value
        self.write()

    def write(self) -> None:
        """To the file."""
        write_json(self.file, self.figures)

    def size(self, full: Any, small: Any) -> Any:
        """One value for a GPU, one for toys."""
        return small if self.small else full

    def model(self, dtype: torch.dtype) -> AnswerModel:
        """Random weights of Llama-3.2-1B's shape."""
        return random_llama(self.size("1b", "toy"), dtype, self.device)

    def batch(self, model: AnswerModel, size: int = 8, length: int = 512) -> Batch:
        """Random tokens."""
        vocabulary = model.hf.config.vocab_size
        return random_batch(vocabulary, self.size(size, 2), self.size(length, 16), self.device)


def saved(r: Recorder, folder: str, shape: str | None = None) -> None:
    """A random model, of Llama-3.2-1B's shape if none is told, and the embedded tokenizer, as a directory to load."""
    model = r.model(torch.bfloat16) if shape is None else random_llama(shape, torch.bfloat16, r.device)
    model.hf.save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)


def utilization(model: AnswerModel, batch: Batch, seconds: float, device: torch.device) -> dict[str, Any]:
    """Useful matrix products of a step per second, and their share of what the card can do in bfloat16.

    Useful are those of the tokens without padding, logits at labels only, no recomputation, no attention scores: two
    operations per weight and token forward, two back to the input, two for the weight's gradient if it is trained.
    """
    head = model.hf.get_output_embeddings()
    blocks = trained = 0
    for module in model.hf.modules():
        if isinstance(module, nn.Linear) and module is not head:
            size = module.in_features * module.out_features  # quantised weights are stored otherwise
            blocks += size
            trained += size * bool(module.weight.requires_grad)
    vocabulary = model.hf.config.vocab_size * model.hf.config.hidden_size
    tokens = sum(int(part["attention_mask"].sum()) for part in batch.values())
    labels = sum(int((part["labels"] != -100).sum()) for part in batch.values())
    operations = tokens * (4 * blocks + 2 * trained) + labels * vocabulary * (6 if head.weight.requires_grad else 4)
    found: dict[str, Any] = {"useful_flops_per_second": operations / seconds}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for card, peak in DENSE_BF16.items():
        if card in name:
            found["utilization"] = operations / seconds / peak
    return found


def regularized() -> AttributionRegularizer:
    """The default recipe's regulariser."""
    return AttributionRegularizer(0.1, "relative", target="length_normalised")


def adapted(folder: str, width: str | None) -> GradientDifference:
    """SSIUU on adapters over a checkpoint in this width (None: not quantised)."""
    quantization: Any = width
    return GradientDifference(folder, adamw, regularizer=regularized(), lora=LoRA(), quantization=quantization)


def free() -> None:
    """Give back to the device what the last variant held."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def measured(
    module: Any,
    model: AnswerModel,
    batch: Batch,
    make: Callable[[Any], torch.optim.Optimizer],
    steps: int,
    forward: Callable[[], Any] = contextlib.nullcontext,
) -> dict[str, Any]:
    """Median seconds of a step and peak memory of an objective, from the second step on (states and anchor exist).

    Raises:
        FloatingPointError: If a loss or a figure of the regulariser is not finite.
    """
    free()
    adopted(module, model, load_tokenizer("tiny"), batch)
    optimizer = make(module.model.parameters())
    device = batch["forget"]["input_ids"].device
    for _ in range(2):
        step(module, optimizer, batch, forward)
    peak_bytes(device, reset=True)
    seconds = [step(module, optimizer, batch, forward) for _ in range(steps)]
    figures = finite(module.logged)
    result = {"seconds": statistics.median(seconds), "peak_bytes": peak_bytes(device), **figures}
    model.zero_grad()
    return result


def compared(row: dict[str, Any], base: dict[str, Any], parameters: int) -> dict[str, Any]:
    """The row with its ratios to ``base``; memory also as extra bytes per parameter."""
    row = row | {"seconds_ratio": row["seconds"] / base["seconds"]}
    if row["peak_bytes"] is not None:
        extra = row["peak_bytes"] - base["peak_bytes"]
        row |= {"peak_ratio": row["peak_bytes"] / base["peak_bytes"], "extra_bytes_per_parameter": extra / parameters}
    return row


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Torch's, fused; random models are not to be learned from."""
    return torch.optim.AdamW(parameters, lr=1e-6, fused=True)


def adamw8bit(parameters: Any) -> torch.optim.Optimizer:
    """Of bitsandbytes, which takes seconds to import."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-6)


def trainer(device: torch.device, steps: int, *callbacks: L.Callback) -> L.Trainer:
    """A silent Trainer in bf16-true."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(
        accelerator=device.type,
        devices=1,
        precision="bf16-true",
        max_steps=steps,
        limit_val_batches=0,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        **quiet,
    )


def trained(r: Recorder, module: UnlearningModule, batch: Batch) -> dict[str, Any]:
    """A few steps under the Trainer: seconds of the last, peak memory, what was logged last.

    Raises:
        FloatingPointError: If a loss or a figure of the regulariser is not finite.
    """
    steps, clock = r.size(6, 2), Clock()
    peak_bytes(r.device, reset=True)
    run = trainer(r.device, steps, clock)
    run.fit(module, DataLoader([batch] * steps, batch_size=None))
    return {"seconds": clock.last, "peak_bytes": peak_bytes(r.device), **finite(run.callback_metrics)}


def finite(logged: Mapping[str, Any]) -> dict[str, float]:
    """Figures as plain numbers.

    Raises:
        FloatingPointError: If one is not finite.
    """
    figures = {name.removeprefix("train/"): float(value) for name, value in logged.items()}
    if not all(math.isfinite(value) for value in figures.values()):
        raise FloatingPointError(f"not finite: {figures}")
    return figures


class Clock(L.Callback):
    """Seconds of the last training step, and its batch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start."""
        wait(pl_module.device)
        self.batch = batch
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop."""
        wait(pl_module.device)
        self.last = time.perf_counter() - self._start
