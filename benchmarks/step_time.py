"""Time of an SSIUU step over a gradient-difference step: same model, same batch, in one process, alternating.

    python benchmarks/step_time.py [--checkpoint tiny] [--batch 8] [--length 64] [--steps 20]

Prints one JSON line: median seconds per step of both and the ratio (median of the pairwise ratios).
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial

import torch
from timing import adopted, alternating, random_batch, ratio, step

from lightning_ssiuu import AttributionRegularizer, GradientDifference
from lightning_ssiuu.models import AnswerModel, load_model, load_tokenizer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    model, tokenizer = AnswerModel(load_model(options.checkpoint)), load_tokenizer(options.checkpoint)
    batch = random_batch(model.hf.config.vocab_size, options.batch, options.length)
    modules = {
        "gradient_difference": GradientDifference(),
        "ssiuu": GradientDifference(regularizer=AttributionRegularizer(weight=0.1, weight_mode="relative")),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    variants = {name: partial(step, adopted(m, model, tokenizer), optimizer, batch) for name, m in modules.items()}
    times = alternating(variants, options.steps)
    print(
        json.dumps(
            {
                "checkpoint": options.checkpoint,
                "threads": torch.get_num_threads(),
                "parameters": sum(p.numel() for p in model.parameters()),
                "seconds": {name: round(statistics.median(values), 4) for name, values in times.items()},
            }
            | ratio(times["ssiuu"], times["gradient_difference"])
        )
    )


if __name__ == "__main__":
    main()
