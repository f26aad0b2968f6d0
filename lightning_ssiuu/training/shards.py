"""Sums and copies over parameters that may be cut over the ranks (FSDP2), in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ssiuu.utils.distributed import world_size

# Elements handled together: large enough to launch few kernels, small enough that temporaries do not matter.
_CHUNK = 1 << 24
# The same on a CPU, whose cache then holds them from one operation to the next.
_CACHED = 1 << 18


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, each tied one once; under FSDP2 those that show this rank's shards, also after a forward pass."""
    reshard(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train_only(model: nn.Module, names: Collection[str]) -> None:
    """Freeze all parameters but those of these names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def chunks(tensors: Sequence[Tensor], limit: int | None = None) -> Iterator[slice]:
    """Slices of a list, of about ``limit`` elements each (by default what launches few kernels on a GPU)."""
    start = size = 0
    limit = _CHUNK if limit is None else limit
    for index, tensor in enumerate(tensors):
        if size and size + tensor.numel() > limit:
            yield slice(start, index)
            start, size = index, 0
        size += tensor.numel()
    if start < len(tensors):
        yield slice(start, len(tensors))


def blocks(*lists: Sequence[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Go through lists of tensors side by side, a few at a time; on a CPU large ones are cut, into views.

    Tensors at the same place have the same shape. What is done to them has to be done element by element.
    """
    columns: list[list[Tensor]] = [[] for _ in lists]
    on_cpu = bool(lists[0]) and lists[0][0].device.type == "cpu"
    limit = min(_CHUNK, _CACHED) if on_cpu else _CHUNK
    for row in zip(*lists, strict=True):
        cuts = on_cpu and row[0].numel() > limit and all(t.is_contiguous() for t in row)
        for column, tensor in zip(columns, row, strict=True):
            column += tensor.view(-1).split(limit) if cuts else [tensor]
    for piece in chunks(columns[0], limit):
        yield [column[piece] for column in columns]


def shard_device(parameters: Iterable[Tensor]) -> torch.device | None:
    """Where the parameters are if any of them is a shard, else None."""
    from torch.distributed.tensor import DTensor  # nine tenths of a second, and nobody's before a model is loaded

    return next((p.device for p in parameters if isinstance(p, DTensor)), None)


def reduced(value: Tensor, operation: Any) -> float:
    """A scalar over all ranks; each must call it."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value, op=operation)
    return value.item()


def over_shards(value: float, shards: torch.device | None) -> float:
    """The sum of this rank's count or squared norm over the shards; replicas hold all of it each.

    ``shards`` is :func:`shard_device`'s: NCCL needs the sum on the device.
    """
    if shards is None:
        return value
    return reduced(torch.tensor(value, dtype=torch.float64, device=shards), dist.ReduceOp.SUM)


def square(tensors: Sequence[Tensor]) -> float:
    """Sum of squares of this rank's tensors, in at least float32."""
    # Chunk by chunk: widened copies of all bfloat16 gradients at once would be the step's memory peak.
    norms = (n for (part,) in blocks(tensors) for n in torch._foreach_norm([wide(t) for t in part]))
    return math.fsum(float(n) ** 2 for n in norms)


def shard_like(part: Tensor, parameter: Tensor) -> Tensor:
    """The shard that ``part`` is where ``parameter`` is one; what checkpoints are written from."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return part
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)


def local_state(
    state: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A state by parameter name where its parameters are, and this rank's parts of it.

    A resumed run's comes from the file to the CPU, wherever the weights are.
    """
    moved = {name: state[name].to(p.device) for name, p in parameters.items()}
    return moved, [local(value) for value in moved.values()]


def snapshot(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Copies of this rank's parts of the weights."""
    return [local(p.detach()).clone() for p in parameters]


def reshard(model: nn.Module) -> None:
    """Have FSDP2 cut its weights again; nothing for other models.

    It leaves its root whole after a forward pass, under parameters that never see a reduced gradient nor a change to
    the shards; resharded, it shows those that do. A backward pass gathers it again.
    """
    for module in model.modules():
        if callable(cut := getattr(module, "reshard", None)):
            cut()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be cut over the ranks."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def wide(tensor: Tensor) -> Tensor:
    """In at least float32, without history: bfloat16 loses what attributions differ by (docs/how-to/precision.md)."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def norm_over_shards(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> float:
    """Euclidean norm of tensors, over all shards where these parameters are cut; equal on all ranks."""
    return math.sqrt(over_shards(square(tensors), shard_device(parameters)))


def participation(tensors: Sequence[Tensor], norm: float, shards: torch.device | None = None) -> float:
    """Participation ratio ``(Σ x²)² / (n Σ x⁴)`` of n coordinates, in percent; 0 of nothing but zeros.

    100 if all are as large, 100 / n if all but one are zero. ``norm`` is that of all tensors, ``shards`` as for
    :func:`over_shards`.

    Example:
        >>> participation([torch.tensor([1.0, -1.0, 1.0, 1.0]), torch.zeros(4)], 2.0)
        50.0
    """
    if norm == 0:
        return 0.0
    fourth = 0.0
    for (part,) in blocks(tensors):
        unit = torch._foreach_div([wide(t) for t in part], norm)
        torch._foreach_mul_(unit, unit)
        fourth += math.fsum(float(n) ** 2 for n in torch._foreach_norm(unit))
        del unit  # or it is held while the next is made
    count = over_shards(sum(t.numel() for t in tensors), shards)
    return 100 / (count * over_shards(fourth, shards))


def cut_like(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's part of a tensor that broadcasts to ``parameter``; each rank must call it with the same tensor."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device)
    expanded = whole.expand(parameter.shape).contiguous().to(parameter.device)
    return local(distribute_tensor(expanded, parameter.device_mesh, parameter.placements))
