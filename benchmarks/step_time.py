"""Time of our training steps over open-unlearning's: same model, same batches of unequal length, alternating.

    python benchmarks/step_time.py --peer open-unlearning [--checkpoint tiny] [--batch 8] [--steps 20]
        [--data forget.jsonl --retain retain.jsonl] [--precision bf16] [--memory]

Ours go as ``fit`` takes them: training step, backward pass, checks, the module's own default optimiser; NPO with what
the original model said read from disk, SSIUU with its second gradient in the loss's backward pass ("one") or in one of
its own ("two"). The peer's go as its Trainer takes them: batches from its own collator, full logits, NPO with a second
model, gradients clipped, the optimiser that the installed transformers takes by default (fused AdamW). Without
``--peer`` ours are compared with gradient difference alone. ``--precision bf16`` puts ours under autocast; the peer
stays in float32.

Batches come from question files, or are random tokens of the lengths that TOFU has (``batches.LENGTHS``). Prints one
JSON line: median seconds per step, of the processor and on the clock; ratios (medians of the pairwise ratios, range);
the floor: matrix products of every sequence alone, without padding and with logits at labels only, over the peer's,
both counted. ``--memory`` adds the peak of the memory allocated in a step, in bytes (on a CPU torch's profiler tells).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from batches import file_batches, shares, unequal_batches
from peer_code import PeerStep, collated, imported, trainer_default
from timing import Batch, adopted, allocated_peak, alternating, cached_reference, ratio, step
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_ssiuu import NPO, AttributionRegularizer, GradientDifference
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model, load_tokenizer

#: So small that the model stays what it is: a step's time depends on neither.
LEARNING_RATE = 1e-9
PLAIN = "gradient difference"
#: The class of the peer's that each of ours is compared with.
PEERS = {PLAIN: "GradDiff", "SSIUU, one pass": "GradDiff", "SSIUU, two passes": "GradDiff", "NPO": "NPO"}
THEIRS = "the peer's {}"


def our_modules() -> dict[str, Any]:
    """By name, all with their defaults but for SSIUU's weight, which is the default recipe's."""
    penalty = partial(AttributionRegularizer, weight=0.1, weight_mode="relative")
    return {
        PLAIN: GradientDifference(),
        "SSIUU, one pass": GradientDifference(regularizer=penalty(passes="one")),
        "SSIUU, two passes": GradientDifference(regularizer=penalty(passes="two")),
        "NPO": NPO(),
    }


def taking(run: Callable[[Any], Any], batches: Iterable[Any]) -> Callable[[], tuple[float, float]]:
    """A step on the next of its batches, again and again; seconds on the clock, and of the processor (all threads)."""
    following = cycle(batches)

    def timed() -> tuple[float, float]:
        batch = next(following)
        wall, processor = time.perf_counter(), time.process_time()
        run(batch)
        return time.perf_counter() - wall, time.process_time() - processor

    return timed


def allocated(run: Callable[[], Any]) -> int:
    """Bytes at a step's peak above what there was before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return allocated_peak(profiler)


def floating_point_operations(run: Callable[[], Any]) -> int:
    """Of the matrix products; the plain attention kernel is all matrix products, which are counted."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def alone(model: AnswerModel, batch: Batch) -> None:
    """Forward and backward pass of every sequence by itself, without padding."""
    for part in batch.values():
        for ids, mask, labels in zip(part["input_ids"], part["attention_mask"], part["labels"], strict=True):
            own = mask.bool()
            model(ids[own][None], mask[own][None], labels[own][None]).logps.sum().backward()
    model.zero_grad()


def pass_of(peer: PeerStep, batch: Any) -> None:
    """The peer's forward and backward pass."""
    peer.loss(batch).backward()


def floors(model: AnswerModel, batch: Batch, peer: Mapping[str, PeerStep], theirs: Batch) -> dict[str, float]:
    """The least arithmetic of a step over that of the peer's step, by the peer's method."""
    least = floating_point_operations(partial(alone, model, batch))
    counted = {
        name: floating_point_operations(lambda one=one: one.loss(theirs).backward()) for name, one in peer.items()
    }  # type: ignore[misc]
    model.zero_grad()
    return {name: round(least / count, 3) for name, count in counted.items()}


def summary(times: Mapping[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Median seconds, ratios to gradient difference and to the peer's, per clock."""
    found: dict[str, Any] = {}
    for number, clock in ((1, "processor"), (0, "wall")):
        each = {name: [pair[number] for pair in pairs] for name, pairs in times.items()}
        ours = [name for name in each if name in PEERS]
        found[clock] = {
            "seconds": {name: round(statistics.median(values), 4) for name, values in each.items()},
            "over gradient difference": {name: ratio(each[name], each[PLAIN]) for name in ours if name != PLAIN},
            "over the peer": {
                name: ratio(each[name], each[peer]) for name in ours if (peer := THEIRS.format(PEERS[name])) in each
            },
        }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--batch", type=int, default=8, help="forget sequences, and as many retain sequences")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--data", help="forget set: question and answer, JSON or JSON Lines")
    parser.add_argument("--retain", help="retain set, the same")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of ours")
    parser.add_argument(
        "--only", nargs="+", choices=list(PEERS), default=list(PEERS), help="ours to measure", metavar="OURS"
    )
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peer", type=Path, help="a checkout of open-unlearning")
    options = parser.parse_args()
    if (options.data is None) != (options.retain is None):
        parser.error("--data and --retain go together")
    model, tokenizer = AnswerModel(load_model(options.checkpoint)).train(), load_tokenizer(options.checkpoint)
    if options.data is None:
        batches = unequal_batches(model.hf.config.vocab_size, options.batch, options.steps)
    else:
        batches = file_batches(options.data, options.retain, tokenizer, options.batch, options.steps, options.template)
    mixed = partial(torch.autocast, "cpu", torch.bfloat16) if options.precision == "bf16" else nullcontext
    modules = {name: module for name, module in our_modules().items() if name in {PLAIN, *options.only}}
    runs: dict[str, Any] = {}
    with (
        imported(options.peer) if options.peer is not None else nullcontext() as class_named,
        tempfile.TemporaryDirectory() as folder,
    ):
        for name, module in modules.items():
            adopted(module, model, tokenizer)
            cached_reference(module, batches, Path(folder) / name)
            if not runs:  # one for all, which have the same default: its states are twice the weights
                optimizer = module.configure_optimizers()
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE
            runs[name] = taking(partial(step, module, optimizer, forward=mixed), batches)
        peer: dict[str, PeerStep] = {}
        theirs: list[Any] = []
        if class_named is not None:
            theirs = [collated(class_named, tokenizer, batch) for batch in batches]
            theirs_optimizer = trainer_default(model.hf.parameters(), LEARNING_RATE)
            for name in dict.fromkeys(PEERS[name] for name in modules):
                peer[name] = PeerStep(class_named, name, model.hf, theirs_optimizer)
                runs[THEIRS.format(name)] = taking(peer[name], theirs)
        found: dict[str, Any] = {
            "checkpoint": options.checkpoint,
            "parameters": sum(p.numel() for p in model.parameters()),
            "sequences": [options.batch, options.batch],
            "shares": shares(batches),
            "precision of ours": options.precision,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "steps": options.steps,
        }
        if peer:
            found["arithmetic floor"] = floors(model, batches[0], peer, theirs[0])
        found |= summary(alternating(runs, options.steps, 1))
        if options.memory:
            found["peak_bytes"] = {name: allocated(run) for name, run in runs.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
