"""Time of an SSIUU step over a gradient-difference step: same model, same batch, in one process, alternating.

    python benchmarks/step_time.py [--checkpoint tiny] [--batch 8] [--length 64] [--steps 20] [--peer open-unlearning]

SSIUU takes its second gradient in the loss's backward pass ("one") or in one of its own ("two"). With a checkout of
open-unlearning its GradDiff loss takes the same steps, full logits and all. Prints one JSON line: median seconds per
step, on the clock and of the processor (what else the machine does is not in the latter), ratios (medians of the
pairwise ratios, range), and the peak of the memory allocated beside gradient difference's, as multiples of the trained
weights in float32. On a CPU torch's profiler tells what is allocated, in a step that is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peer_parity import imported
from timing import adopted, allocated_peak, alternating, random_batch, ratio, step

from lightning_ssiuu import AttributionRegularizer, GradientDifference
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model, load_tokenizer

PEER = "open-unlearning's GradDiff"


def peer_step(
    class_named: Callable[[str], Any], model: AnswerModel, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any]
) -> float:
    """A step of the peer's loss on our model; returns seconds."""
    peer_class = class_named("GradDiff")
    peer = peer_class.__new__(peer_class)  # its Trainer is not needed
    vars(peer).update(gamma=1.0, alpha=1.0, retain_loss_type="NLL", model=model.hf)
    inputs = {name: {k: v for k, v in one.items() if k != "example_id"} for name, one in batch.items()}
    start = time.perf_counter()
    loss = peer.compute_loss(model.hf, inputs)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return time.perf_counter() - start


def timed(run: Callable[[], float]) -> tuple[float, float]:
    """Seconds on the clock, and of the processor (all threads)."""
    start = time.process_time()
    return run(), time.process_time() - start


def memory(run: Callable[[], float], regularizer: Any) -> int:
    """Bytes at a step's peak above what every variant holds between steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    kept = (getattr(regularizer, "_anchor", None) or {}).values()
    return allocated_peak(profiler) + sum(anchor.nbytes for anchor in kept)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peer", type=Path, help="a checkout of open-unlearning")
    options = parser.parse_args()
    model, tokenizer = AnswerModel(load_model(options.checkpoint)).train(), load_tokenizer(options.checkpoint)
    batch = random_batch(model.hf.config.vocab_size, options.batch, options.length)
    penalty = partial(AttributionRegularizer, weight=0.1, weight_mode="relative")
    modules = {
        "gradient difference": GradientDifference(),
        "SSIUU, two passes": GradientDifference(regularizer=penalty(passes="two")),
        "SSIUU, one pass": GradientDifference(regularizer=penalty(passes="one")),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    steps: dict[str, Any] = {
        name: partial(step, adopted(module, model, tokenizer), optimizer, batch) for name, module in modules.items()
    }
    with imported(options.peer) if options.peer is not None else nullcontext() as class_named:
        if class_named is not None:
            steps[PEER] = partial(peer_step, class_named, model, optimizer, batch)
        times = alternating({name: partial(timed, run) for name, run in steps.items()}, options.steps, 1)
    n_bytes = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    peaks = {name: memory(steps[name], module.regularizer) / n_bytes for name, module in modules.items()}
    plain = "gradient difference"
    found: dict[str, Any] = {
        "checkpoint": options.checkpoint,
        "threads": torch.get_num_threads(),
        "parameters": n_bytes // 4,
        "peak_beside_gradient_difference": {
            name: round(peak - peaks[plain], 3) for name, peak in peaks.items() if name != plain
        },
    }
    for number, clock in enumerate(("wall", "processor")):
        each = {name: [pair[number] for pair in pairs] for name, pairs in times.items()}
        found[clock] = {
            "seconds": {name: round(statistics.median(values), 4) for name, values in each.items()},
            "over gradient difference": {name: ratio(each[name], each[plain]) for name in modules if name != plain},
        }
        if PEER in each:
            found[clock][f"over {PEER}"] = {name: ratio(each[name], each[PEER]) for name in modules}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
