"""What a sweep of relearning attacks costs beside its fine-tuning and its evaluation.

    python benchmarks/attack_cost.py [--checkpoint tiny] [--p 0.1 0.3] [--runs 12] [--epochs 10] [--score all_tokens]

Times a whole sweep of one model (loading, snapshots, Trainers, the report) and, inside it, every training step with the
making of its batch, and every evaluation. ``beyond work`` is what the sweep took more than their sum, in percent.
``beyond lone runs`` compares with what as many runs on their own would train and evaluate: each scores the model before
its attack, which a sweep does once for each scored set; it should stay below 5. Medians over ``--repeats`` sweeps.
``--cpu_time`` counts processor time instead, on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import lightning as L
from timing import markdown, wait

from lightning_ssiuu import Facts
from lightning_ssiuu.attacks import Harmful, finetune
from lightning_ssiuu.cli.attack import attack
from lightning_ssiuu.datamodules.sampling import ResumableLoader
from lightning_ssiuu.training.devices import Devices


class Times(L.Callback):
    """Seconds spent in training steps and evaluations."""

    def __init__(self) -> None:
        self.steps = self.evaluations = 0.0
        self.n_steps = self.n_evaluations = 0
        self._begin = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self._begin = clock()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step ends."""
        wait(pl_module.device)
        self.steps += clock() - self._begin
        self.n_steps += 1

    def batches(self, loader: ResumableLoader) -> Iterator[Any]:
        """A loader's batches, with a clock."""
        iterator = _batches(loader)
        while True:
            begin = clock()
            batch = next(iterator, None)
            self.steps += clock() - begin
            if batch is None:
                return
            yield batch

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, with a clock."""
        begin = clock()
        scores = _evaluate(*args, **kwargs)
        self.evaluations += clock() - begin
        self.n_evaluations += 1
        return scores


_evaluate, _trainer, _batches = finetune.evaluate, Devices.trainer, ResumableLoader.__iter__
clock: Callable[[], float] = time.perf_counter


def sweep(checkpoint: str, p: list[float], runs: int, epochs: int, score: str, accelerator: str) -> dict[str, float]:
    """One sweep; seconds and counts."""
    times = Times()
    rates = [1e-5 * (1 + number) for number in range(runs // len(p))]
    runs = len(rates) * len(p)

    def trainer(self: Devices, epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
        return _trainer(self, epochs, [times, *callbacks])

    with ExitStack() as clocks:
        clocks.enter_context(patch.object(finetune, "evaluate", times.evaluate))
        clocks.enter_context(patch.object(Devices, "trainer", trainer))
        clocks.enter_context(patch.object(ResumableLoader, "__iter__", lambda loader: times.batches(loader)))
        folder = clocks.enter_context(tempfile.TemporaryDirectory())
        begin = clock()
        method = Harmful(p=p, seeds=[0], learning_rates=rates, epochs=epochs)
        options: dict[str, Any] = {"output": folder, "devices": Devices(accelerator)}
        attack(checkpoint, attack=method, data=Facts(tokenizer=checkpoint), score=score, **options)
        whole = clock() - begin
    work = times.steps + times.evaluations
    lone = times.steps + times.evaluations * runs * (epochs + 1) / times.n_evaluations
    return {
        "runs": runs,
        "sweep_s": whole,
        "steps": times.n_steps,
        "steps_s": times.steps,
        "evaluations": times.n_evaluations,
        "evaluations_s": times.evaluations,
        "beyond_work_percent": 100 * (whole / work - 1),
        "beyond_work_ms_per_run": 1000 * (whole - work) / runs,
        "beyond_lone_runs_percent": 100 * (whole / lone - 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny", help="scored and attacked on the embedded facts")
    parser.add_argument("--p", type=float, nargs="+", default=[0.1, 0.3], help="attacked fractions")
    parser.add_argument("--runs", type=int, default=12, help="attacks, as many for each p")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--score", default="all_tokens")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu_time", action="store_true", help="processor time instead of the clock's")
    options = parser.parse_args()
    if options.cpu_time:
        global clock
        clock = time.process_time
    args = options.epochs, options.score, options.accelerator
    sweep(options.checkpoint, options.p[:1], 1, *args)  # what is done once per process is no part of a sweep
    found = [sweep(options.checkpoint, options.p, options.runs, *args) for _ in range(options.repeats)]
    median = {name: round(statistics.median(one[name] for one in found), 3) for name in found[0]}
    print(markdown([name.replace("_", " ") for name in median], [[f"{value:g}" for value in median.values()]]))
    print(json.dumps(median))


if __name__ == "__main__":
    main()
