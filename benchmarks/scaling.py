"""The formulas of cost_model.py against measured points, and what they say of models nobody has at hand.

    python benchmarks/scaling.py [--parts time memory ranks simulated paper] [--quick]

Prints one JSON line and Markdown tables. Times are CPU seconds of one thread, so that other processes of the machine
count little. Memory is what torch's CPU allocator gave out (its profiler sees every block). Communication is counted
where torch hands tensors to the process group (2 gloo processes).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from cost_model import CHUNK_CPU, Model, Part, Setup, activation_bytes, communicated, memory_bytes, step_flops
from scaling_ranks import counted_communication
from scipy.optimize import nnls
from shapes import random_llama
from simulated import simulated_bytes
from timing import adopted, markdown, random_batch, step
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from lightning_ssiuu import AttributionRegularizer, GradientDifference
from lightning_ssiuu.models.loading import load_tokenizer

NAMES = {False: "gradient difference", True: "SSIUU"}
#: (shape, sequences per part, length): constants are fitted to these ...
FITTED = [("1m", 4, 64), ("1m", 16, 64), ("5m", 4, 64), ("5m", 4, 128), ("20m", 2, 64), ("20m", 4, 64), ("135m", 1, 64)]
#: ... and predict these, among them a model and lengths that were not fitted to.
HELD_OUT = [("1m", 8, 128), ("5m", 8, 64), ("20m", 2, 128), ("50m", 2, 64), ("135m", 2, 64)]
MEMORY = [("5m", 4, 64, False), ("5m", 16, 128, False), ("5m", 16, 128, True), ("20m", 4, 64, False)]
MEMORY += [("20m", 8, 128, True), ("50m", 4, 64, False), ("135m", 2, 64, True)]


class Stepper:
    """An objective on a random model with its optimiser, ready to step."""

    def __init__(self, shape: str, part: Part, ssiuu: bool, checkpointing: bool = False) -> None:
        regularizer = (
            AttributionRegularizer(0.1, "relative", target="length_normalised", passes="two") if ssiuu else None
        )
        model = random_llama(shape)
        module = GradientDifference(regularizer=regularizer, gradient_checkpointing=checkpointing)
        self.module = adopted(module, model, load_tokenizer("tiny"))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=False)
        self.batch = random_batch(model.hf.config.vocab_size, part.sequences, part.length)

    def __call__(self) -> None:
        """One step."""
        step(self.module, self.optimizer, self.batch)


def cpu_seconds(run: Callable[[], None], repeats: int) -> float:
    """The fewest CPU seconds: other processes that share caches and cores only ever add to them."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def features(model: Model, part: Part, ssiuu: bool) -> list[float]:
    """What a step's time is a sum over: arithmetic, activations, weights (plain, regularised), kernel calls."""
    passes = 7 if ssiuu else 6  # two forward, two backward at twice the cost, one extra: in forward passes of a part
    moved = activation_bytes(model, part, 4) * (passes + ssiuu)
    calls = model.num_hidden_layers * (passes + ssiuu)
    return [step_flops(model, part, part, ssiuu), moved, model.parameters, model.parameters * ssiuu, calls]


def times(repeats: int, quick: bool) -> dict[str, Any]:
    """Count arithmetic, measure time, fit the constants to some points and predict the others."""
    points = []
    for fitted, group in ((True, FITTED), (False, HELD_OUT)):
        for shape, sequences, length in group[:2] if quick else group:
            part = Part(sequences, length)
            for ssiuu in (False, True):
                run = Stepper(shape, part, ssiuu)
                run()
                # The plain kernel: what it does is all matrix products, which are counted; the fused one is not.
                with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                    run()
                point = {"shape": shape, "sequences": sequences, "length": length, "ssiuu": ssiuu, "fitted": fitted}
                point |= {"flops": counter.get_total_flops(), "seconds": cpu_seconds(run, repeats)}
                flops = step_flops(Model(shape), part, part, ssiuu, attention_factor=2)
                points.append(point | {"flops_predicted": flops})
    rows = np.array([features(Model(p["shape"]), Part(p["sequences"], p["length"]), p["ssiuu"]) for p in points])
    seconds = np.array([p["seconds"] for p in points])
    chosen = np.array([p["fitted"] for p in points])
    # Relative errors: every point counts alike, whatever its size.
    constants, _ = nnls(rows[chosen] / seconds[chosen, None], np.ones(chosen.sum()))
    for point, predicted in zip(points, rows @ constants, strict=True):
        point["seconds_predicted"] = float(predicted)
    names = ("per_flop", "per_activation_byte", "per_weight", "per_regularised_weight", "per_block_pass")
    return {"constants": dict(zip(names, constants.tolist(), strict=True)), "points": points}


def allocated(make: Callable[[], Callable[[], None]]) -> int:
    """The most that was allocated at once in the second step of what ``make`` makes, bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        # From the beginning: of a block that was there before, the profiler does not see the end.
        run = make()
        run()
        with record_function("second step"):
            run()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    start = max(event.start_ns() for event in events if event.name() == "second step")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    sums = np.cumsum([size for _, size in changes])
    return int(max(total for (when, _), total in zip(changes, sums, strict=True) if when >= start))


def memory(quick: bool) -> list[dict[str, Any]]:
    """Peak memory of a step, predicted and allocated, float32."""
    rows = []
    for shape, sequences, length, checkpointing in MEMORY[:1] if quick else MEMORY:
        part = Part(sequences, length)
        for ssiuu in (False, True):
            setup = Setup(weight=4, optimizer=8, checkpointing=checkpointing, chunk=CHUNK_CPU)
            moments = memory_bytes(Model(shape), part, part, ssiuu, setup)
            peak = allocated(lambda s=shape, p=part, r=ssiuu, c=checkpointing: Stepper(s, p, r, c))  # type: ignore[misc]
            moment = max(moments, key=lambda name: moments[name])
            row = {"shape": shape, "sequences": sequences, "length": length, "checkpointing": checkpointing}
            rows.append(row | {"ssiuu": ssiuu, "moment": moment, "predicted": moments[moment], "measured": peak})
    return rows


def ranks(quick: bool) -> list[dict[str, Any]]:
    """What two processes send in a step, predicted and counted, and how long their step takes on one thread each."""
    cases = [
        (shape, sequences, strategy, ssiuu)
        for shape, sequences in ((("toy", 4),) if quick else (("1m", 8), ("20m", 4)))
        for strategy in ("ddp", "fsdp2")
        for ssiuu in (False, True)
    ]
    rows = []
    for (shape, _, strategy, ssiuu), counted in zip(cases, counted_communication(cases), strict=True):
        predicted = communicated(Model(shape), ssiuu, Setup(weight=4, ranks=2, sharded=strategy == "fsdp2"))
        rows.append({"shape": shape, "strategy": strategy, "ssiuu": ssiuu, "predicted": predicted} | counted)
    return rows


GIGA = 1e9
CARD = 80 * GIGA
#: Name, options of Setup, whether FSDP2 can cut it.
SETUPS: list[tuple[str, dict[str, Any], bool]] = [
    ("all weights, fp32, AdamW", {"weight": 4, "optimizer": 8}, True),
    ("all weights, bf16, AdamW in bf16", {"weight": 2, "optimizer": 4}, True),
    ("all weights, bf16, 8-bit AdamW", {"weight": 2, "optimizer": 2}, True),
    ("LoRA on bf16", {"rank": 16, "optimizer": 8}, True),
    ("LoRA on 8 bits", {"rank": 16, "optimizer": 8, "frozen": 1}, False),
    ("LoRA on 4 bits", {"rank": 16, "optimizer": 8, "frozen": 0.52}, False),
]


def simulated(quick: bool) -> list[dict[str, Any]]:
    """Peak memory of models that nobody has at hand, by formula and by the planner's simulation of the same step."""
    sharded = Setup(weight=2, optimizer=2, ranks=8, sharded=True)
    cases = [("1b", "all weights", sharded), ("8b", "all weights", sharded), ("70b", "all weights", sharded)]
    cases += [(shape, "LoRA on 8 bits", Setup(rank=16, optimizer=8, frozen=1)) for shape in ("1b", "70b")]
    if quick:
        cases = [("toy", "all weights", sharded)]
    rows, part = [], Part(4, 512)
    for shape, name, setup in cases:
        for ssiuu in (False, True):
            moments = memory_bytes(Model(shape), part, part, ssiuu, setup)
            row = {"shape": shape, "setup": name, "ssiuu": ssiuu, "predicted": max(moments.values())}
            rows.append(row | {"simulated": simulated_bytes(shape, part, ssiuu, setup)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def simulated_table(rows: Sequence[dict[str, Any]]) -> str:
    """One row per model and objective."""
    lines = []
    for r in rows:
        cells = [r["shape"], r["setup"], NAMES[r["ssiuu"]], f"{r['predicted'] / GIGA:.3g}"]
        off = 100 * (r["predicted"] / r["simulated"] - 1)
        lines.append([*cells, f"{r['simulated'] / GIGA:.3g}", f"{off:+.0f} %"])
    return markdown(["model", "setup", "objective", "GB by formula", "GB simulated", "error"], lines)


def paper() -> dict[str, Any]:
    """Predictions for 4 + 4 sequences of 512 tokens per device, checkpointing on, FSDP2 where it can."""
    part = Part(4, 512)
    memory_rows, cost_rows = [], []
    for shape in ("1b", "3b", "8b", "70b"):
        model = Model(shape)
        for name, options, can_shard in SETUPS:
            for devices in (1, 2, 8):
                setup = Setup(**options, ranks=devices, sharded=can_shard and devices > 1)
                peaks = [max(memory_bytes(model, part, part, ssiuu, setup).values()) for ssiuu in (False, True)]
                row = {"shape": shape, "setup": name, "devices": devices, "sharded": setup.sharded}
                memory_rows.append(row | {"gradient_difference": peaks[0], "ssiuu": peaks[1]})
        for ssiuu in (False, True):
            flops = {
                s: step_flops(model, part, part, ssiuu, s == "fsdp2", checkpointing=True) for s in ("ddp", "fsdp2")
            }
            sent = {s: communicated(model, ssiuu, Setup(ranks=8, sharded=s == "fsdp2")) for s in ("ddp", "fsdp2")}
            cost_rows.append({"shape": shape, "ssiuu": ssiuu, "flops": flops, "sent": sent})
    return {"memory": memory_rows, "cost": cost_rows}


# ---- tables ---------------------------------------------------------------------------------------------------------


def time_tables(result: dict[str, Any]) -> list[str]:
    """One row per measured point, and a line on the errors."""
    header = [
        "model",
        "batch",
        "objective",
        "GFLOP counted",
        "predicted",
        "CPU seconds",
        "predicted",
        "error",
        "fitted to",
    ]
    lines = []
    for p in result["points"]:
        off = 100 * (p["seconds_predicted"] / p["seconds"] - 1)
        cells = [p["shape"], f"2 × {p['sequences']} × {p['length']}", NAMES[p["ssiuu"]], f"{p['flops'] / GIGA:.4g}"]
        cells += [f"{p['flops_predicted'] / GIGA:.4g}", f"{p['seconds']:.3g}", f"{p['seconds_predicted']:.3g}"]
        lines.append([*cells, f"{off:+.0f} %", "yes" if p["fitted"] else "no"])
    return [markdown(header, lines), json.dumps(result["constants"])]


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """One row per point."""
    header = ["model", "batch", "checkpointing", "objective", "MB predicted", "allocated", "error", "when"]
    lines = []
    for r in rows:
        cells = [r["shape"], f"2 × {r['sequences']} × {r['length']}", "yes" if r["checkpointing"] else "no"]
        cells += [NAMES[r["ssiuu"]], f"{r['predicted'] / 1e6:.0f}", f"{r['measured'] / 1e6:.0f}"]
        lines.append([*cells, f"{100 * (r['predicted'] / r['measured'] - 1):+.1f} %", r["moment"]])
    return markdown(header, lines)


def ranks_table(rows: Sequence[dict[str, Any]]) -> str:
    """One row per run: MB predicted → counted of each collective, seconds of a step with the same batch per rank."""
    header = ["model", "strategy", "objective", "all-reduce MB", "all-gather MB", "reduce-scatter MB"]
    header += ["wall s, 2 ranks / 1 rank", "CPU s per rank, 2 ranks / 1 rank"]
    lines = []
    for r in rows:
        cells = [r["shape"], r["strategy"], NAMES[r["ssiuu"]]]
        for name, value in r["predicted"].items():
            cells.append(f"{value / 1e6:.4g} → {r['counted'][name] / 1e6:.4g}")
        cells += [f"{r[key]:.3g} / {r[f'{key}_alone']:.3g}" for key in ("seconds", "cpu_seconds")]
        lines.append(cells)
    return markdown(header, lines)


def paper_tables(result: dict[str, Any]) -> list[str]:
    """GB per device, gradient difference → SSIUU, bold where SSIUU fits; arithmetic and communication per step."""
    lines = []
    for start in range(0, len(result["memory"]), 3):
        rows = result["memory"][start : start + 3]
        cells = [rows[0]["shape"], rows[0]["setup"]]
        for r in rows:
            text = f"{r['gradient_difference'] / GIGA:.3g} → {r['ssiuu'] / GIGA:.3g}"
            cells.append(f"**{text}**" if r["ssiuu"] <= 0.95 * CARD else text)
        lines.append(cells)
    first = markdown(["model", "setup", "1 device", "2 devices", "8 devices"], lines)
    lines = []
    for r in result["cost"]:
        ddp, fsdp = r["sent"]["ddp"], r["sent"]["fsdp2"]
        cells = [r["shape"], NAMES[r["ssiuu"]], *(f"{f / 1e12:.4g} / {f / 4e14:.3g}" for f in r["flops"].values())]
        # A ring passes 7/8 of a gathered tensor through every device, twice that of a reduced one.
        sent = [2 * 7 / 8 * ddp["all_reduce"], 7 / 8 * (fsdp["all_gather"] + fsdp["reduce_scatter"])]
        lines.append([*cells, *(f"{value / GIGA:.3g} / {value / 3e11:.2g}" for value in sent)])
    header = ["model", "objective", "DDP, TFLOP per device / s at 400 TFLOP/s", "FSDP2, the same"]
    header += ["DDP, GB sent per device / s at 300 GB/s", "FSDP2, the same"]
    return [first, markdown(header, lines)]


def main() -> None:
    """Measure, fit, predict and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ("time", "memory", "ranks", "simulated", "paper")
    parser.add_argument("--parts", nargs="+", choices=every, default=list(every))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few points, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    tables: list[str] = []
    if "time" in options.parts:
        result["time"] = times(options.repeats, options.quick)
        tables += time_tables(result["time"])
    if "memory" in options.parts:
        result["memory"] = memory(options.quick)
        tables.append(memory_table(result["memory"]))
    if "ranks" in options.parts:
        result["ranks"] = ranks(options.quick)
        tables.append(ranks_table(result["ranks"]))
    if "simulated" in options.parts:
        result["simulated"] = simulated(options.quick)
        tables.append(simulated_table(result["simulated"]))
    if "paper" in options.parts:
        result["paper"] = paper()
        tables += paper_tables(result["paper"])
    print(json.dumps(result))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
