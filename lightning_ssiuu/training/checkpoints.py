"""Checkpoints of a training run that are whole or absent, and a clear error for one that is neither."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import clear_leftovers, written_atomically

# The two files that end a distributed checkpoint: torch writes the index when all shards are there, Lightning the rest.
_INDEX, _REST = ".metadata", "meta.pt"
_UNREADABLE = (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError, ValueError)
_STEP = re.compile(r"step=(\d+)\.ckpt$")
_DAMAGED = "a complete checkpoint of fit: this one is damaged, was cut off, or is none"
_NOT_PLAIN = "a checkpoint of plain values and tensors, or --weights_only false for one you trust: it can run any code"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, through to the disk, and then renames it.

    Lightning's own way builds the whole file in memory first and then moves it from the system's temporary directory;
    on another disk that is a copy, and a process killed within it leaves half a file under the checkpoint's name. Here
    nothing is held twice, and a process killed at any moment leaves the last checkpoint as it was.

    Reads plain values and tensors only, unless ``weights_only`` is False: pickled objects can run any code. Paths with
    a protocol (``s3://``) are left to Lightning.

    Raises:
        UserError: If the disk refuses, or there is no checkpoint or it cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.ckpt"
        >>> AtomicCheckpointIO().save_checkpoint({"step": 3}, path)
        >>> AtomicCheckpointIO().load_checkpoint(path)
        {'step': 3}
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)  # type: ignore[arg-type]
            return
        # Through a file of ours, not by name: only so does the reason come back with the error.
        with written_atomically(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        weights_only = True if weights_only is None else weights_only
        if not _is_local(path):
            return super().load_checkpoint(path, map_location, weights_only)  # type: ignore[arg-type]
        try:
            return torch.load(path, map_location=map_location, weights_only=weights_only)
        except FileNotFoundError as error:
            raise UserError("ckpt_path", str(path), "an existing checkpoint") from error
        except _UNREADABLE as error:
            raise _unreadable("ckpt_path", path, error) from error


def write_whole_checkpoints(trainer: L.Trainer) -> None:
    """Have a Trainer that has not started write checkpoints whole or not at all, whatever its strategy.

    Strategies that use a ``CheckpointIO`` get :class:`AtomicCheckpointIO` where the user chose none. Those that write
    by themselves (FSDP2's folders of shards) do so beside the checkpoint's place, and the first rank renames when
    all have written.
    """
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
    if type(strategy).save_checkpoint is Strategy.save_checkpoint:
        return
    write = strategy.save_checkpoint

    def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if not _is_local(filepath):
            write(checkpoint, filepath, storage_options)
            return
        with ExitStack() as stack:
            first = stack.enter_context(written_atomically(filepath)) if strategy.is_global_zero else None
            write(checkpoint, strategy.broadcast(str(first)), storage_options)
            strategy.barrier()

    strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the latest step (``step=<n>.ckpt``) in a directory, or None."""
    clear_leftovers(folder)
    steps = {int(match[1]): path for path in Path(folder).glob("*.ckpt") if (match := _STEP.search(path.name))}
    return steps[max(steps)] if steps else None


def check_checkpoint(argument: str, path: str | os.PathLike[str], weights_only: bool = True) -> dict[str, Any]:
    """Raise a UserError unless a checkpoint (a file, or a folder of shards) is there and whole; nothing is loaded.

    What it holds besides the weights comes back; tensors are mapped from the file, not read. It is empty for what only
    Lightning can read (a path with a protocol, or pickled objects, which ``weights_only=False`` allows).
    """
    place = Path(path)
    if not _is_local(path):
        return {}
    clear_leftovers(place.parent)
    if not place.exists():
        newest = newest_checkpoint(place.parent)
        hint = f"; the newest there is {newest}" if newest else ""
        raise UserError(argument, str(path), f"an existing checkpoint{hint}")
    try:
        if place.is_dir():
            _check_shards(place)
        elif (broken := zipfile.ZipFile(place).testzip()) is not None:
            raise ValueError(broken)
        if not weights_only:
            return {}
        rest = place / _REST if place.is_dir() else place
        content = torch.load(rest, map_location="cpu", mmap=True, weights_only=True)
        if missing := {"loops", "global_step"} - set(content):
            raise KeyError(missing)
    except _UNREADABLE as error:
        raise _unreadable(argument, path, error) from error
    return content


def _unreadable(argument: str, path: str | os.PathLike[str], error: Exception) -> UserError:
    is_plain = not isinstance(error, pickle.UnpicklingError) or "Weights only load failed" not in str(error)
    return UserError(argument, str(path), _DAMAGED if is_plain else _NOT_PLAIN)


def _check_shards(folder: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    # A folder that lacks the index was killed before all shards were written; one that has it may have lost some since.
    for stored in FileSystemReader(folder).read_metadata().storage_data.values():
        size = (folder / stored.relative_path).stat().st_size
        if size < stored.offset + stored.length:
            raise ValueError(f"{stored.relative_path} has {size} bytes")


def _is_local(path: str | os.PathLike[str]) -> bool:
    return not re.search(r"://|::", os.fspath(path))


class Stateful:
    """What objectives and regularisers have in common: state that an interrupted run goes on with.

    Those that need more than some attributes override :meth:`state` and :meth:`load_state`.

    Example:
        >>> class Counter(Stateful):
        ...     state_attributes = ("_n_steps",)
        ...     _n_steps = 0
        >>> counter = Counter()
        >>> counter.load_state({"n_steps": 3})
        >>> counter.state()
        {'n_steps': 3}
    """

    #: Names of the attributes that make up the state; an underscore at the beginning is no part of the state's name.
    state_attributes: ClassVar[tuple[str, ...]] = ()
    #: Names in the state that checkpoints of earlier versions need not have.
    optional_state: ClassVar[frozenset[str]] = frozenset()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values, tensors, and dictionaries of those.

        Under FSDP2 this runs on every rank; tensors that are shards (``DTensor``) have to stand in a dictionary under
        the name of the parameter they are cut like, as ``model.named_parameters()`` has it.
        """
        return {name.removeprefix("_"): getattr(self, name) for name in self.state_attributes}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state of an interrupted run; tensors are on the CPU, shards where the weights are."""
        for name in self.state_attributes:
            setattr(self, name, state[name.removeprefix("_")])


def check_states(content: Mapping[str, Any], owners: Mapping[str, Stateful], path: Any) -> None:
    """Raise a UserError unless a checkpoint has the states to go on with: by key, those of objective and regulariser.

    Without them a run would go on as if they were new, and end elsewhere than an uninterrupted one.
    """
    for key, owner in owners.items():
        if (set(owner.state()) ^ set(content.get(key) or ())) - owner.optional_state:
            name = type(owner).__name__
            raise UserError("ckpt_path", str(path), f"a checkpoint with the {key}'s state, as {name} writes it now")


def put_state(checkpoint: dict[str, Any], key: str, state: Mapping[str, Any]) -> None:
    """Put ``state`` under ``key`` into a checkpoint, as ``on_save_checkpoint`` gets it; each rank must call it.

    In a distributed checkpoint (a folder: there are shards among its weights) the shards of a state go beside the
    weights, each rank's by that rank; in one file they are put together on the first rank's CPU. Shards have to stand
    under the name of the parameter they are cut like; everything else stands there as it is.
    """
    from torch.distributed.tensor import DTensor

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
    """What :func:`put_state` put under ``key``, cut as ``model`` is now, or None; each rank must call it.

    The number of ranks may be another one, and shards may have become whole or the other way round. ``folder`` is the
    checkpoint, where it is a folder.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = dict(model.named_parameters())
    elsewhere: dict[str, Tensor] = {}

    def cut(value: Any, path: str, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(inner, f"{path}.{key}", key) for key, inner in value.items()}
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
        from torch.distributed import checkpoint as distributed_checkpoint

        distributed_checkpoint.load({"state_dict": elsewhere}, checkpoint_id=folder)  # into the tensors given
    return state
