"""Time of an SSIUU step over a gradient-difference step: same model, same batch, in one process, alternating.

    python benchmarks/step_time.py [--checkpoint tiny] [--batch 8] [--length 64] [--steps 20]

Prints one JSON line: median seconds per step of both and the ratio (median of the pairwise ratios).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from lightning_ssiuu import AttributionRegularizer, GradientDifference
from lightning_ssiuu.models import AnswerModel, load_model, load_tokenizer
from lightning_ssiuu.objectives import UnlearningModule


def make_batch(vocabulary: int, batch: int, length: int) -> dict[str, dict[str, torch.Tensor]]:
    """Random tokens; the last half of every sequence is the answer."""
    generator = torch.Generator().manual_seed(0)

    def part() -> dict[str, torch.Tensor]:
        ids = torch.randint(vocabulary, (batch, length), generator=generator)
        labels = ids.clone()
        labels[:, : length // 2] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return {"forget": part(), "retain": part()}


def step(
    module: UnlearningModule, optimizer: torch.optim.Optimizer, batch: dict[str, dict[str, torch.Tensor]]
) -> float:
    """One optimiser step as the Trainer does it, without its logging; returns seconds."""
    start = time.perf_counter()
    optimizer.zero_grad()
    module.training_step(batch, 0).backward()
    module.on_before_optimizer_step(optimizer)
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    model, tokenizer = AnswerModel(load_model(options.checkpoint)), load_tokenizer(options.checkpoint)
    batch = make_batch(model.hf.config.vocab_size, options.batch, options.length)
    plain = GradientDifference()
    regularised = GradientDifference(regularizer=AttributionRegularizer(weight=0.1, weight_mode="relative"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for module in (plain, regularised):
        module.adopt(model, tokenizer)
        module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]  # there is no Trainer to log to
        for _ in range(2):
            step(module, optimizer, batch)
    times: dict[str, list[float]] = {"gradient_difference": [], "ssiuu": []}
    for _ in range(options.steps):
        times["gradient_difference"].append(step(plain, optimizer, batch))
        times["ssiuu"].append(step(regularised, optimizer, batch))
    ratios = [b / a for a, b in zip(times["gradient_difference"], times["ssiuu"], strict=True)]
    print(
        json.dumps(
            {
                "checkpoint": options.checkpoint,
                "threads": torch.get_num_threads(),
                "parameters": sum(p.numel() for p in model.parameters()),
                "seconds": {name: round(statistics.median(values), 4) for name, values in times.items()},
                "ratio": round(statistics.median(ratios), 3),
                "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
            }
        )
    )


if __name__ == "__main__":
    main()
