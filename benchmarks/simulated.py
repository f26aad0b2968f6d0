"""A training step of any size without memory or arithmetic: what the planner's simulation says beside cost_model.py."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from cost_model import Part, Setup
from shapes import llama_config
from timing import adopted, random_batch, step
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_ssiuu import AttributionRegularizer, GradientDifference
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.models.meta import blueprint, give_memory
from lightning_ssiuu.training.fsdp import shard
from lightning_ssiuu.utils.simulation import Simulation

_WIDTHS: dict[float, Any] = {2: None, 1: "8bit", 0.52: "4bit"}


class Adam(torch.optim.Optimizer):
    """States of the given size and an update in place: all of an optimiser that memory depends on."""

    def __init__(self, parameters: Any, state_bytes: float) -> None:
        super().__init__(parameters, {})
        self.state_bytes = state_bytes

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the states the first time, then change the weights in place."""
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if not self.state[parameter]:
                half = round(self.state_bytes * local.numel()) // 2
                self.state[parameter]["all"] = torch.empty(half, dtype=torch.float16, device=local.device)
            gradient = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
            local.add_(gradient, alpha=0.0)


@contextlib.contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """Inside, this process is the first of so many, and what it sends comes to nothing."""
    if ranks == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def simulated_bytes(shape: str, part: Part, ssiuu: bool, setup: Setup) -> int:
    """The most that one device holds in the second step, bytes.

    Args:
        shape: Of the model.
        part: Forget and retain part alike, per device.
        ssiuu: Whether the step is regularised.
        setup: As for :func:`cost_model.memory_bytes`; DDP's buckets are not simulated.
    """
    dtype = torch.float32 if setup.weight == 4 else torch.bfloat16
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder, pretended(setup.ranks):
        llama_config(shape).save_pretrained(folder)
        hf = blueprint(folder, dtype, _WIDTHS[setup.frozen] if setup.rank else None)
        if setup.rank is not None:
            LoRA(r=setup.rank).attach(hf)
        model = AnswerModel(hf)
        regularizer = (
            AttributionRegularizer(0.1, "relative", target="length_normalised", passes="two") if ssiuu else None
        )
        module = GradientDifference(regularizer=regularizer, gradient_checkpointing=setup.checkpointing)
        batch = random_batch(hf.config.vocab_size, part.sequences, part.length)
        with Simulation(cpu) as simulation:
            give_memory(model, cpu)
            if setup.sharded:
                shard(model, init_device_mesh("cpu", (setup.ranks,)))
            module = adopted(module, model, load_tokenizer("tiny"))
            module.train()
            optimizer = Adam([p for p in model.parameters() if p.requires_grad], setup.optimizer)
            step(module, optimizer, batch)
            with simulation.phase("second step"):
                step(module, optimizer, batch)
        return simulation.peak("second step").total
