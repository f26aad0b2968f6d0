"""A training step on two gloo processes, with every tensor counted that is handed to the process group."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from shapes import random_llama
from timing import adopted, random_batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ssiuu import AttributionRegularizer, GradientDifference
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.training.fsdp import shard

WORLD = 2


class Counting(TorchDispatchMode):
    """Bytes of whole tensors per collective: what is gathered, what is reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and let it happen."""
        if func.namespace == "c10d":
            sizes = [t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor)]
            # Gather and scatter get the shard as well as the whole.
            name = {
                "_allgather_base_": "all_gather",
                "_reduce_scatter_base_": "reduce_scatter",
                "allreduce_": "all_reduce",
            }
            if (kind := name.get(func._opname)) is not None:
                self.bytes[kind] += sum(sizes) if kind == "all_reduce" else max(sizes)
        return func(*args, **(kwargs or {}))


class TrainingStep(nn.Module):
    """A module's ``training_step`` as its forward, as Lightning hands it to DDP."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Tensor:
        """The loss."""
        return self.module.training_step(batch, 0)


Case = tuple[str, int, str, bool]


def counted_communication(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Run every case on one process and on two; both numbers of processes are started once for all cases.

    Args:
        cases: Shape of the random model, sequences per part and rank (64 tokens each), ``"ddp"`` or ``"fsdp2"``,
            whether the step is regularised.

    Returns:
        For each case ``counted``: bytes by collective; ``seconds``: median wall time of a step on rank 0 of two, and
        ``seconds_alone`` of a single process with one rank's batch; ``cpu_seconds``, ``cpu_seconds_alone``: the same
        in CPU time.
    """
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, WORLD):
            torch.multiprocessing.spawn(_rank, (world, cases, folder), nprocs=world)
        alone, together = (torch.load(Path(folder) / str(world)) for world in (1, WORLD))
    return [
        two | {f"{key}_alone": one[key] for key in ("seconds", "cpu_seconds")}
        for one, two in zip(alone, together, strict=True)
    ]


def _rank(rank: int, world: int, cases: Sequence[Case], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    rows = [_case(world, *case) for case in cases]
    if rank == 0:
        torch.save(rows, Path(folder) / str(world))
    dist.destroy_process_group()


def _case(world: int, shape: str, sequences: int, strategy: str, ssiuu: bool) -> dict[str, Any]:
    model = random_llama(shape)
    if strategy == "fsdp2" and world > 1:
        shard(model, init_device_mesh("cpu", (world,)))
    regularizer = AttributionRegularizer(0.1, "relative", target="length_normalised", passes="two") if ssiuu else None
    module = adopted(GradientDifference(regularizer=regularizer), model, load_tokenizer("tiny"))
    run: nn.Module = TrainingStep(module)
    if strategy == "ddp" and world > 1:
        run = DistributedDataParallel(run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batch = random_batch(model.hf.config.vocab_size, sequences, 64)

    def step() -> tuple[float, float]:
        start = time.perf_counter(), time.process_time()
        loss = run(batch)
        optimizer.zero_grad()
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        return time.perf_counter() - start[0], time.process_time() - start[1]

    step()
    wall, cpu = (statistics.median(values) for values in zip(*(step() for _ in range(5)), strict=True))
    with Counting() as counting:
        step()
    counted = {name: counting.bytes[name] for name in ("all_reduce", "all_gather", "reduce_scatter")}
    return {"counted": counted, "seconds": wall, "cpu_seconds": cpu}
