"""What objectives share whose forget gradient is taken at other weights than those it is applied to.

Inside a training step the trained weights are moved in place, the forget loss is differentiated there, and the weights
are put back bit for bit; the retain loss and the regulariser only ever see the original weights. One copy of the
trained weights is held meanwhile, and one gradient until the optimiser steps (under FSDP2 of this rank's shards).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.training.gradients import extra_gradient, sum_over_ranks
from lightning_ssiuu.training.shards import local, reshard, snapshot, trained_parameters, wide
from lightning_ssiuu.utils.distributed import gathered


@contextmanager
def displaced(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Inside, the trained weights (with adapters: the adapters) may be moved; after it they are what they were.

    Bit for bit, also after an exception. No graph of a forward pass may be kept across its beginning or its end. What
    it yields are the trained parameters, for :func:`gradient_at` and :func:`move`.
    """
    parameters = list(trained_parameters(model).values())
    stash = snapshot(parameters)
    try:
        yield parameters
    finally:
        reshard(model)
        place(parameters, stash)


@torch.no_grad()
def place(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Give the parameters these values (tensors or shards), in place."""
    torch._foreach_copy_([local(p) for p in parameters], [local(value) for value in values])
    torch.clear_autocast_cache()  # it may hold the old weights in narrow types


@torch.no_grad()
def move(parameters: Sequence[nn.Parameter], directions: Sequence[Tensor], size: float) -> None:
    """Add ``size · direction`` to every parameter (or this rank's shard of it), in place."""
    weights = [local(p) for p in parameters]
    torch._foreach_add_(weights, [d.to(w.dtype) for d, w in zip(directions, weights, strict=True)], alpha=size)
    torch.clear_autocast_cache()


def gradient_at(
    total: Tensor, parameters: Sequence[nn.Parameter], model: nn.Module, keep_graph: bool = False
) -> list[Tensor]:
    """``∂/∂φ`` of the sum of all ranks' ``total``, at least float32, equal on all ranks; ``.grad`` stays as it was.

    Each rank must call it with its own scalar, and gets a tensor, or its shard, like each parameter.
    """
    reshard(model)
    gradients = [wide(g) for g in extra_gradient(total, parameters, model, keep_graph)]
    reshard(model)
    sum_over_ranks(parameters, gradients)
    return gradients


def answered_rows(part: Part) -> Tensor:
    """Numbers of the rows with an answer, ``[n]``."""
    return (part["labels"] != -100).any(1).nonzero().squeeze(1)


def rows_of(part: Part, rows: Tensor) -> Part:
    """Some examples of a part, in the order of ``rows``."""
    return {name: value[rows] for name, value in part.items() if isinstance(value, Tensor)}


def share_of_mean(rows: Tensor) -> tuple[Tensor, float]:
    """Rows of this rank to run, and the weight of their mean in the mean over all ranks' rows; each rank must call it.

    A rank without any still takes part in the passes, as sharded weights want: with row 0, which counts nothing.
    """
    everywhere = sum(gathered(len(rows)))
    return rows if len(rows) else rows.new_zeros(1), len(rows) / max(everywhere, 1)


@torch.no_grad()
def add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Add to ``.grad`` of all trained parameters (of this rank's shards)."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        own = local(parameter.grad)
        own.add_(gradient.to(own.dtype))


def unit(vectors: Tensor) -> Tensor:
    """Vectors ``[..., H]`` of length 1 in the same directions; of length 0 they stay."""
    norms = vectors.norm(dim=-1, keepdim=True)
    return vectors / norms.where(norms > 0, 1.0)


def shortened(vectors: Tensor, lengths: Tensor) -> Tensor:
    """Vectors ``[..., H]`` cut to ``lengths [..., 1]`` where they are longer."""
    norms = vectors.norm(dim=-1, keepdim=True)
    return vectors * (lengths / norms.where(norms > 0, 1.0)).clamp(max=1.0)
