"""Attribution of all neurons: ours in one pass against Captum layer by layer, memory within a budget, linear cost.

    pip install captum
    python benchmarks/attribution.py [--checkpoint tiny] [--batch 2] [--length 16] [--repeats 3]
        [--budget 200MB] [--no-captum]

Prints one JSON line. Times are of the process (all its threads), since those of a shared machine's clock say little;
on a GPU those of the clock. Memory is what the process holds, read while it runs; on a GPU what torch allocates.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from captum_model import FromEmbeddings
from timing import alternating, peak_bytes, random_batch, ratio, wait

from lightning_ssiuu.attribution.activation_gradient import extremes, neuron_attribution
from lightning_ssiuu.attribution.micro_batches import micro_batches, parse_bytes
from lightning_ssiuu.models.answers import AnswerModel, Target, input_positions
from lightning_ssiuu.models.architectures import neuron_sites
from lightning_ssiuu.models.loading import load_model

#: P of random tokens is no float32, and Captum knows no other.
TARGET: Target = "length_normalised"


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """What a call takes: of all threads on a CPU, of the clock on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait(device)
    start = clock()
    run()
    wait(device)
    return clock() - start


def layer_by_layer(model: AnswerModel, batch: dict[str, torch.Tensor], sites: list[Any]) -> torch.Tensor:
    """The same maxima with Captum, one module after the other."""
    from captum.attr import LayerGradientXActivation

    wrapped = FromEmbeddings(model, batch, TARGET)
    embeddings = model.hf.get_input_embeddings()(batch["input_ids"]).detach()
    outside = ~input_positions(batch["attention_mask"], batch["labels"])
    found: dict[str, torch.Tensor] = {}
    maxima = []
    for site in sites:
        if site.module_name not in found:  # a fused projection is attributed once
            method = LayerGradientXActivation(wrapped, model.hf.get_submodule(site.module_name))
            found = {site.module_name: method.attribute(embeddings).detach()}
        maxima.append(extremes(site.select(found[site.module_name]), outside)[0].double().sum(0))
    return torch.cat(maxima)


@contextmanager
def memory(device: torch.device) -> Iterator[list[int]]:
    """Most bytes in use inside beyond those at its beginning; the list holds them at its end."""
    taken: list[int] = []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        peak_bytes(device, reset=True)
        yield taken
        taken.append((peak_bytes(device) or 0) - before)
        return
    with suppress(AttributeError, OSError):  # give back what glibc keeps of earlier calls
        ctypes.CDLL(None).malloc_trim(0)
    done, highest = threading.Event(), [resident()]
    before = highest[0]

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield taken
    finally:
        done.set()
        thread.join()
    taken.append(highest[0] - before)


def resident() -> int:
    """Bytes of memory the process holds."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", default="200MB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--captum", action=argparse.BooleanOptionalAction, default=True, help="compare with it")
    options = parser.parse_args()
    device = torch.device(options.device)
    model = AnswerModel(load_model(options.checkpoint)).to(device)
    sites = neuron_sites(model.hf)

    def batch_of(n: int) -> dict[str, torch.Tensor]:
        return random_batch(model.hf.config.vocab_size, n, options.length, device)["forget"]

    batch = batch_of(options.batch)
    run = partial(neuron_attribution, model, [batch], sites, TARGET)
    ours = run().maximum
    result: dict[str, Any] = {
        "checkpoint": options.checkpoint,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "sites": len(sites),
        "neurons": len(ours),
        "batch": options.batch,
        "length": options.length,
    }
    if options.captum:
        theirs = layer_by_layer(model, batch, sites).cpu()
        variants = {
            "ours": partial(seconds, run, device),
            "captum": partial(seconds, partial(layer_by_layer, model, batch, sites), device),
        }
        times = alternating(variants, options.repeats, warm_up=0)  # both have run once
        result["seconds"] = {name: round(statistics.median(values), 4) for name, values in times.items()}
        result["relative_difference"] = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        result |= ratio(times["captum"], times["ours"])
    many = [batch_of(4 * options.batch)]
    cost = {}
    for n in (1, 2, 4):
        parts = many * n
        cost[n * 4 * options.batch] = min(
            seconds(partial(neuron_attribution, model, parts, sites, TARGET), device) for _ in range(options.repeats)
        )
    result["seconds_per_example"] = {n: round(value / n, 4) for n, value in cost.items()}
    within = partial(neuron_attribution, model, many * 4, sites, TARGET, memory_budget=options.budget)
    with memory(device) as taken:
        within()
    result["budget_bytes"], result["taken_bytes"] = parse_bytes(options.budget), taken[0]
    result["rows_within_budget"] = len(next(micro_batches(model.hf, many * 4, sites, options.budget))[0]["labels"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
