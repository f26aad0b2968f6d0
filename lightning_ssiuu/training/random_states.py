"""The random generators of every rank, as a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_ssiuu.utils.distributed import gathered, rank, world_size

State = dict[str, Any]


def random_states(device: torch.device) -> list[State]:
    """The states of all ranks; each rank must call it."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return gathered({"cpu": torch.get_rng_state(), "cuda": cuda})


def state_of_rank(states: Sequence[State]) -> State:
    """This rank's of the states in a checkpoint; with a warning where that is of another number of ranks."""
    if len(states) != world_size():
        given = f"the checkpoint is of {len(states)} ranks, this run has {world_size()}"
        rank_zero_warn(f"{given}: what is drawn at random (dropout) will not be what it would have been")
    return states[rank() if rank() < len(states) else 0]


def set_random_state(state: State, device: torch.device) -> None:
    """Take up a rank's state."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
