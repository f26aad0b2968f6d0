"""FSDP2: cut a model's weights over the ranks (Lightning's ModelParallelStrategy)."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_ssiuu.models import AnswerModel


def shard(model: AnswerModel, mesh: DeviceMesh) -> None:
    """Shard every block, then the rest, over the mesh's data-parallel ranks."""
    raise NotImplementedError


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is a shard."""
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())
