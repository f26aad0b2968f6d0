"""Trains a tiny model on any number of gloo processes and saves its weights: run by test_distributed.py, not a test.

Arguments: strategy (none, ddp, fsdp), ranks, file to write, settings as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from data_toys import Toy
from model_toys import answer_model, bare_trainer

from lightning_ssiuu.callbacks import ForgetThresholdStopping, NeuronAttributionCallback
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.regularizers import AttributionRegularizer


class TinySSIUU(SSIUU):
    """SSIUU on a random float64 model over bytes, sharded where asked."""

    def __init__(self, sharded: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sharded = sharded

    def configure_model(self) -> None:
        """Build the model; shard it where there is a mesh."""
        if self.model is None:
            model = answer_model(vocab_size=260, max_position_embeddings=64)
            if self.sharded:
                from torch.distributed.fsdp import fully_shard

                for block in model.hf.model.layers:
                    fully_shard(block, mesh=self.device_mesh["data_parallel"])
                fully_shard(model, mesh=self.device_mesh["data_parallel"])
            self.adopt(model.train(), Toy().tokenizer)


def main(strategy: str, ranks: str, target: str, settings: str) -> None:
    """Train and save ``{"weights": [...], "level": ..., "flagged": ...}`` on the first rank."""
    torch.set_num_threads(1)
    options = json.loads(settings)
    accumulate, steps = options.pop("accumulate", 1), options.pop("steps", 3)
    looking, score, clip = options.pop("looking", False), options.pop("score", "probability"), options.pop("clip", None)
    chosen: Any = {"none": "auto", "ddp": "ddp"}.get(strategy)
    if strategy == "fsdp":
        from lightning.pytorch.strategies import ModelParallelStrategy

        chosen = ModelParallelStrategy(process_group_backend="gloo")
    module = TinySSIUU(
        strategy == "fsdp",
        regularizer=AttributionRegularizer(**options),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    callbacks: list[Any] = []
    if looking:
        callbacks = [
            NeuronAttributionCallback(4, every_n_steps=1, write=False),
            ForgetThresholdStopping(score, "mismatched"),
        ]
    trainer = bare_trainer(
        steps,
        strategy=chosen,
        devices=int(ranks),
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        gradient_clip_val=clip,
        log_every_n_steps=1,
    )
    data = Toy(batch_size=4)
    trainer.fit(module, data)
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in module.model.parameters()]
    result: dict[str, Any] = {"weights": full, "steps": trainer.global_step}
    result["figures"] = {k: float(v) for k, v in trainer.callback_metrics.items()}
    if looking:
        result |= {"d_minus": callbacks[0].variation.d_minus, "level": callbacks[1].level, "value": callbacks[1].value}
    torch.save(result, f"{target}.{trainer.global_rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
