"""States that are cut over the ranks like the weights, in and out of Lightning's checkpoints.

Lightning lets each rank write its part of ``checkpoint["state_dict"]`` alone; whatever else a checkpoint holds is the
first rank's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def put_state(checkpoint: dict[str, Any], key: str, state: Mapping[str, Any]) -> None:
    """Put ``state`` under ``key`` into a checkpoint; each rank must call it.

    In a distributed checkpoint (a folder) the shards go beside the weights, each rank's by that rank; in one file they
    are put together on the first rank's CPU. A state without shards stands there as it is.

    Args:
        checkpoint: As Lightning gives it to ``on_save_checkpoint``: shards among its weights tell that it is a folder.
        key: What the checkpoint is to call it.
        state: Plain values, tensors, dictionaries of those; shards (``DTensor``) under their parameter's name.

    Example:
        >>> checkpoint = {"state_dict": {}}
        >>> put_state(checkpoint, "regularizer", {"scale": 1.0})
        >>> checkpoint
        {'state_dict': {}, 'regularizer': {'scale': 1.0}}
    """
    weights = checkpoint["state_dict"]
    in_folder = any(isinstance(value, DTensor) for value in weights.values())

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(inner, f"{path}.{name}") for name, inner in value.items()}
        if not isinstance(value, DTensor):
            return value
        if in_folder:
            weights[path] = value
        elif weights:  # the first rank's; the others' are thrown away, but gathering takes all
            return value.full_tensor().cpu()
        else:
            value.full_tensor()
        return torch.empty(0, dtype=value.dtype)  # stands for what is elsewhere

    checkpoint[key] = plain(state, key)


def take_state(checkpoint: Mapping[str, Any], key: str, model: nn.Module, folder: str | os.PathLike[str] | None) -> Any:
    """Read back what :func:`put_state` put there, cut as the model is now; each rank must call it.

    The number of ranks may be another one, and shards may have become whole or the other way round.

    Args:
        checkpoint: As Lightning gives it to ``on_load_checkpoint``.
        key: What the checkpoint calls it.
        model: Its parameters' names and shards are the pattern.
        folder: The checkpoint, where it is a folder.

    Returns:
        The state, or None if the checkpoint has none.

    Example:
        >>> take_state({"regularizer": {"anchor": {"weight": torch.ones(1, 2)}}}, "regularizer", nn.Linear(2, 1), None)
        {'anchor': {'weight': tensor([[1., 1.]])}}
    """
    parameters = dict(model.named_parameters())
    elsewhere: dict[str, Tensor] = {}

    def cut(value: Any, path: str, name: str) -> Any:
        if isinstance(value, Mapping):
            return {inner: cut(one, f"{path}.{inner}", inner) for inner, one in value.items()}
        if not isinstance(value, Tensor) or name not in parameters:
            return value
        parameter = parameters[name].detach()
        if value.numel() == 0:
            elsewhere[path] = torch.empty_like(parameter, dtype=value.dtype)
            return elsewhere[path]
        if isinstance(parameter, DTensor):
            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        return value

    state = cut(checkpoint.get(key), key, "")
    if elsewhere:
        distributed_checkpoint.load({"state_dict": elsewhere}, checkpoint_id=folder)  # into the tensors given
    return state
