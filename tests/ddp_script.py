"""Trains a tiny model on any number of gloo processes and saves its weights: run by test_distributed.py, not a test.

Arguments: ranks, folder to write to, JSON list of jobs [name, strategy (auto, ddp, fsdp), settings]. All in one
process group: starting Python anew for each costs more than the training.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from data_toys import Toy
from lightning.pytorch.strategies import ModelParallelStrategy
from model_toys import answer_model, bare_trainer

from lightning_ssiuu.callbacks import ForgetThresholdStopping, NeuronAttributionCallback
from lightning_ssiuu.callbacks.loaders import evaluation_loaders
from lightning_ssiuu.evaluation import mismatched_level
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.regularizers import AttributionRegularizer

SCRIPT = __file__


class TinySSIUU(SSIUU):
    """SSIUU on a random float64 model over bytes, sharded where asked."""

    def __init__(self, sharded: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sharded = sharded

    def configure_model(self) -> None:
        """Build the model; shard it where there is a mesh."""
        if not self.is_loaded:
            model = answer_model(vocab_size=260, max_position_embeddings=64)
            if self.sharded:
                from torch.distributed.fsdp import fully_shard

                for block in model.hf.model.layers:
                    fully_shard(block, mesh=self.device_mesh["data_parallel"])
                fully_shard(model, mesh=self.device_mesh["data_parallel"])
            self.adopt(model.train(), Toy().tokenizer)


def train(strategy: Any, ranks: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train; weights, figures and what the callbacks measured."""
    options = dict(settings)
    accumulate, steps = options.pop("accumulate", 1), options.pop("steps", 3)
    looking, clip = options.pop("looking", False), options.pop("clip", None)
    module = TinySSIUU(
        strategy == "fsdp",
        regularizer=AttributionRegularizer(**options),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    if strategy == "fsdp":
        strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, process_group_backend="gloo")
    attribution = NeuronAttributionCallback(4, every_n_steps=1, write=False)
    stopping = ForgetThresholdStopping("probability", "mismatched")
    trainer = bare_trainer(
        steps,
        strategy=strategy,
        devices=ranks,
        accumulate_grad_batches=accumulate,
        callbacks=[attribution, stopping] if looking else [],
        gradient_clip_val=clip,
        log_every_n_steps=1,
        limit_val_batches=1.0 if looking else 0,
    )
    trainer.fit(module, Toy(batch_size=4))
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in module.model.parameters()]
    result: dict[str, Any] = {"weights": whole, "steps": trainer.global_step}
    result["figures"] = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
    if looking and attribution.variation is not None:
        forget = next(one for one in evaluation_loaders(trainer) if "forget" in next(iter(one)))
        rouge_level = mismatched_level("rouge_l", module.model, module.tokenizer, forget)
        result |= {"d_minus": attribution.variation.d_minus, "value": stopping.value, "rouge_level": rouge_level}
    return result


def main(ranks: str, folder: str, jobs: str) -> None:
    """Do the jobs; every rank writes a file per job."""
    torch.set_num_threads(1)
    for name, strategy, settings in json.loads(jobs):
        result = train(strategy, int(ranks), settings)
        torch.save(result, f"{folder}/{name}.{strategy}.{os.environ.get('LOCAL_RANK', 0)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
