"""A gradient beside the one Lightning takes: of another scalar, through the same forward pass, on any strategy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ssiuu.training.shards import local
from lightning_ssiuu.utils.distributed import world_size


def extra_gradient(
    total: Tensor, parameters: Sequence[nn.Parameter], model: nn.Module, keep_graph: bool = True
) -> list[Tensor]:
    """``∂total/∂φ`` of this rank (under FSDP2: its shard of the ranks' mean), leaving every ``.grad`` as it was.

    Zero where the scalar ``total`` does not depend on a parameter. ``model`` has to be resharded
    (:func:`~lightning_ssiuu.training.shards.reshard`) before the parameters are taken from it. :func:`sum_over_ranks`
    makes the sum over all ranks.
    """
    stash = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    for parameter, _ in stash:
        parameter.grad = None
    try:
        total.backward(retain_graph=keep_graph)
        return [local(p.grad) if p.grad is not None else torch.zeros_like(local(p)) for p in parameters]
    finally:
        for parameter, gradient in stash:
            parameter.grad = gradient


def sum_over_ranks(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Turn what :func:`extra_gradient` gave on each rank into the sum over the ranks, in place."""
    if (ranks := world_size()) == 1:
        return
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if hasattr(parameter, "to_local"):
            gradient.mul_(ranks)  # FSDP2 has already averaged it
        else:
            dist.all_reduce(gradient)  # DDP never saw it
