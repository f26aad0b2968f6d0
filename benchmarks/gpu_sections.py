"""What gpu_check.py measures: one function per section, each in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from arithmetic import ARITHMETICS, ProbabilityGradient, attribution, autocast, flips, model_in, probability_gradient
from arithmetic import relative_error as error
from gpu_performance import adapters, peer, speed
from gpu_tools import (
    Recorder,
    adamw,
    adamw8bit,
    adapted,
    compared,
    free,
    measured,
    regularized,
    saved,
    trained,
    trainer,
)
from shapes import random_llama
from timing import alternating, peak_bytes, random_batch, wait
from torch import Tensor

from lightning_ssiuu import Facts, GradientDifference
from lightning_ssiuu.__main__ import main as lightning_ssiuu
from lightning_ssiuu.attribution.activation_gradient import neuron_attribution
from lightning_ssiuu.attribution.influence import influence_variation
from lightning_ssiuu.cli.memory import estimate_memory
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import neuron_sites
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives import objectives

ROOT = Path(__file__).parent.parent
PACKAGES = ("lightning", "transformers", "bitsandbytes", "peft", "lightning-ssiuu")


def environment(r: Recorder) -> None:
    """Card, driver, versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    r["versions"] = versions
    if r.device.type == "cuda":
        card = torch.cuda.get_device_properties(r.device)
        r["card"], r["memory_bytes"] = card.name, card.total_memory
        r["capability"], r["cards"] = f"{card.major}.{card.minor}", torch.cuda.device_count()
        r["cuda"], r["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        with contextlib.suppress(OSError):
            r["driver"] = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30).stdout.strip()


def tests(r: Recorder) -> None:
    """The tests marked ``gpu``."""
    import pytest

    marked = sorted(str(f) for f in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in f.read_text("utf-8"))
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        status = pytest.main(["-m", "gpu", f"--junitxml={report}", *marked])
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    bad = [case.attrib["name"] for case in suite.iter("testcase") if case.find("failure") or case.find("error")]
    r["counts"], r["failed"] = counts, bad
    if status:
        raise RuntimeError(f"pytest ended with status {int(status)}")


def parity(r: Recorder) -> None:
    """CPU against the device: g, I⁻, neuron attributions and D± of the embedded model."""
    data = Facts(batch_size=r.size(12, 4))
    batch = next(iter(data.train_dataloader()))
    forget = first(data, r.size(64, 4))
    original = AnswerModel(load_model("tiny"))
    changed = model_in(original, torch.float32)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(0.97)
    sites = neuron_sites(original.hf)
    for name in ("64-true", "32-true"):
        dtype, _ = ARITHMETICS[name]
        sides = []
        for device in (torch.device("cpu"), r.device):
            before, after = (model_in(model, dtype).to(device) for model in (original, changed))
            part = {key: value.to(device) for key, value in batch["forget"].items()}
            gradient = on_cpu(probability_gradient(before, part))
            ways = [neuron_attribution(model, forget, sites, "length_normalised") for model in (before, after)]
            sides.append((gradient, influence_variation(*ways)))
        (here, expected), (there, found) = sides
        a_there, a_here = (attribution(side, torch.promote_types(dtype, torch.float32)) for side in (there, here))
        r[name] = {
            "gradient_error": error(there.values, here.values),
            "negative_set": flips(a_there, a_here),
            "d_plus_error": error([found.d_plus], [expected.d_plus]),
            "d_minus_error": error([found.d_minus], [expected.d_minus]),
            "d_minus_total": [expected.d_minus.sum().item(), found.d_minus.sum().item()],
        }
        limit = 1e-9 if name == "64-true" else 1e-3
        if (worst := max(v for k, v in r.figures[name].items() if k.endswith("error"))) > limit:
            raise ArithmeticError(f"{name}: the device is {worst:.1e} from the CPU, allowed {limit:g}")


def large(r: Recorder) -> None:
    """SSIUU on all weights of a random model of Llama-3.2-3B's shape: bf16 weights, 8-bit AdamW, checkpointing.

    On paper, 3.21 B parameters: weights 6.4, gradients 6.4, optimiser 6.4, A_{t−1}, g and A_t 12.9 each: 58 GB, and
    about 5 GB for the work on the largest weight; activations are gone by then.
    """
    model = random_llama(r.size("3b", "toy"), torch.bfloat16, r.device)
    batch = r.batch(model, 4)
    parameters = sum(p.numel() for p in model.parameters())
    make = adamw if r.small else adamw8bit
    r["parameters"] = parameters
    r["batch"] = {"sequences": 2 * len(batch["forget"]["labels"]), "tokens": batch["forget"]["labels"].shape[1]}
    steps = r.size(5, 1)
    plain = measured(GradientDifference(gradient_checkpointing=True), model, batch, make, steps)
    r["GradientDifference"] = plain
    module = GradientDifference(gradient_checkpointing=True, regularizer=regularized())
    r["SSIUU"] = compared(measured(module, model, batch, make, steps), plain, parameters)


def all_objectives(r: Recorder) -> None:
    """Time and memory of a step of every registered objective over gradient difference's, Llama-3.2-1B's shape."""
    model = r.model(torch.bfloat16)
    batch = r.batch(model)
    parameters = sum(p.numel() for p in model.parameters())
    base = measured(GradientDifference(), model, batch, adamw, r.size(10, 1))
    r["errors"] = {}
    for name, objective in objectives().items():
        try:
            module = objective(regularizer=regularized()) if name == "SSIUU" else objective()
            row = measured(module, model, batch, adamw, r.size(10, 1))
            r[name] = compared(row, base, parameters)
        except Exception as problem:  # the others are worth having all the same
            r["errors"] = r.figures["errors"] | {name: f"{type(problem).__name__}: {problem}"[:300]}
    if r.figures["errors"]:
        raise RuntimeError(f"no figures for {sorted(r.figures['errors'])}")


def attribution_throughput(r: Recorder) -> None:
    """Neuron attribution of all sites over a forward and backward pass alone, Llama-3.2-1B's shape."""
    model = r.model(torch.bfloat16)
    part = r.batch(model)["forget"]
    sites = neuron_sites(model.hf)

    def timed(run: Callable[[], Any]) -> float:
        wait(r.device)
        start = time.perf_counter()
        run()
        wait(r.device)
        return time.perf_counter() - start

    def bare() -> None:
        embedding = model.hf.get_input_embeddings().weight
        torch.autograd.grad(model(part["input_ids"], part["attention_mask"], part["labels"]).logps.sum(), embedding)

    peak_bytes(r.device, reset=True)
    ways = {"bare": partial(timed, bare), "all": partial(timed, partial(neuron_attribution, model, [part], sites))}
    times = {name: statistics.median(values) for name, values in alternating(ways, r.size(5, 1), 1).items()}
    r["pass_seconds"], r["neurons"] = times, sum(site.width for site in sites)
    r["over_a_bare_pass"] = times["all"] / times["bare"]
    r["sequences_per_second"] = len(part["labels"]) / times["all"]
    r["tokens_per_second"] = part["labels"].numel() / times["all"]
    r["peak_bytes"] = peak_bytes(r.device)


def precision(r: Recorder) -> None:
    """How far the device's bfloat16 moves g and I⁻ of the embedded model; step time per precision at 1 B."""
    part = next(iter(Facts(batch_size=r.size(12, 4)).train_dataloader()))["forget"]
    part = {key: value.to(r.device) for key, value in part.items()}
    tiny = AnswerModel(load_model("tiny")).to(r.device)
    reference = probability_gradient(model_in(tiny, torch.float64), part)
    truth = attribution(reference, torch.float64)
    for name, tf32 in (("32-true", False), ("32-true", True), ("bf16-mixed", False), ("bf16-true", False)):
        dtype, mixed = ARITHMETICS[name]
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        gradient = probability_gradient(model_in(tiny, dtype), part, mixed)
        shift = math.exp(gradient.scale - reference.scale)
        row = {"gradient_error": error([g * shift for g in gradient.values], reference.values)}
        row |= flips(attribution(gradient, torch.float32), truth)
        r[f"gradient, {name}{', TF32' if tf32 else ''}"] = row
    torch.set_float32_matmul_precision("highest")
    for name in ("32-true", "bf16-mixed", "bf16-true"):
        dtype, mixed = ARITHMETICS[name]
        model = r.model(dtype)
        batch, forward = r.batch(model), partial(autocast, r.device, mixed)
        plain = measured(GradientDifference(), model, batch, adamw, r.size(5, 1), forward)
        module = GradientDifference(regularizer=regularized())
        row = measured(module, model, batch, adamw, r.size(5, 1), forward)
        parameters = sum(p.numel() for p in model.parameters())
        r[f"step, {name}"] = {"GradientDifference": plain, "SSIUU": compared(row, plain, parameters)}
        del model, module


def quantization(r: Recorder) -> None:
    """8-bit and 4-bit weights with adapters through the Trainer; 8-bit and paged optimisers on full weights."""
    import bitsandbytes as bnb

    with tempfile.TemporaryDirectory() as folder:
        saved(r, folder)
        model = r.model(torch.bfloat16)
        batch = random_batch(model.hf.config.vocab_size, r.size(8, 2), r.size(512, 16))
        for name, make in (
            ("AdamW", adamw),
            ("AdamW8bit", adamw8bit),
            ("PagedAdamW8bit", lambda p: bnb.optim.PagedAdamW8bit(p, lr=1e-6)),
            ("Lion8bit", lambda p: bnb.optim.Lion8bit(p, lr=1e-7)),
        ):
            module = GradientDifference(regularizer=regularized())
            there = {key: {k: v.to(r.device) for k, v in part.items()} for key, part in batch.items()}
            r[f"full weights, {name}"] = measured(module, model, there, make, r.size(5, 1))
        del model, module
        for width in (None, "8bit", "4bit"):
            free()
            module = adapted(folder, width)
            r[f"LoRA, {width or 'bf16'}"] = trained(r, module, batch)
            del module


def memory(r: Recorder) -> None:
    """What the planner says a training step needs against the most that was allocated, Llama-3.2-1B's shape."""
    with tempfile.TemporaryDirectory() as folder:
        saved(r, folder)
        data = Facts(tokenizer=folder, batch_size=r.size(8, 2), multiple_choice=False)
        variants: dict[str, dict[str, Any]] = {
            "GradientDifference": {},
            "SSIUU": {"regularizer": regularized()},
            "SSIUU, checkpointing": {"regularizer": regularized(), "gradient_checkpointing": True},
            "SSIUU, LoRA": {"regularizer": regularized(), "lora": LoRA()},
            "SSIUU, LoRA, 8bit": {"regularizer": regularized(), "lora": LoRA(), "quantization": "8bit"},
        }
        for name in r.size(list(variants), ["SSIUU"]):
            options = variants[name]
            module = GradientDifference(folder, adamw, **options)
            estimated = estimate_memory(module, data, trainer(r.device, 3)).by_phase["training step"]
            free()
            peak_bytes(r.device, reset=True)
            trainer(r.device, 3).fit(module, data)
            most = peak_bytes(r.device)
            r[name] = {"estimated_bytes": estimated, "peak_bytes": most}
            if most is not None:
                r[name] = r.figures[name] | {"estimated_over_measured": estimated / most}
            del module


def recipe(r: Recorder) -> None:
    """The default recipe by its command, per precision: steps, scores, D±, seconds."""
    short = ("--trainer.max_steps", "1", "--attribution.probe_examples", "4", "--stopping.threshold", "null")
    short += ("--model.init_args.scores", "[first_token]", "--data.init_args.eval_batch_size", "64")
    short += ("--data.init_args.multiple_choice", "false", "--attribution.every_n_steps", "null")
    short += ("--data.init_args.max_eval_examples", "8")
    for name in r.size(("32-true", "bf16-mixed", "bf16-true"), ("32-true",)):
        with tempfile.TemporaryDirectory() as folder:
            where = ["--trainer.default_root_dir", folder, "--trainer.accelerator", r.device.type]
            command = ["fit", "--config", str(ROOT / "recipes" / "ssiuu.yaml"), "--trainer.precision", name, *where]
            start = time.perf_counter()
            if status := lightning_ssiuu([*command, *r.size((), short)]):
                raise RuntimeError(f"{name}: fit ended with status {status}")
            metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
            kept = {key: metrics[key] for key in ("steps", "stopped_by", "before", "after")}
            r[name] = {"seconds": time.perf_counter() - start, **kept}


def first(data: Facts, n: int) -> list[dict[str, Tensor]]:
    """The first forget batches of an evaluation."""
    loader = data.eval_dataloader("forget")
    return [batch["forget"] for batch in islice(loader, max(1, n // data.eval_batch_size))]


def on_cpu(gradient: ProbabilityGradient) -> ProbabilityGradient:
    """The same, on the CPU."""
    sides: Iterator[list[Tensor]] = ([t.cpu() for t in side] for side in (gradient.weights, gradient.values))
    return ProbabilityGradient(next(sides), next(sides), gradient.scale)


@dataclass(frozen=True)
class Section:
    """What to run, and for how many seconds at most."""

    run: Callable[[Recorder], None]
    limit: float


#: In the order of what is worth most when time runs out.
SECTIONS: dict[str, Section] = {
    "environment": Section(environment, 60),
    "parity": Section(parity, 90),
    "tests": Section(tests, 180),
    "speed": Section(speed, 90),
    "peer": Section(peer, 60),
    "large": Section(large, 180),
    "adapters": Section(adapters, 180),
    "objectives": Section(all_objectives, 120),
    "precision": Section(precision, 120),
    "quantization": Section(quantization, 150),
    "memory": Section(memory, 120),
    "attribution": Section(attribution_throughput, 60),
    "recipe": Section(recipe, 150),
}
