"""FSDP2: cut a model's weights over the ranks (Lightning's ModelParallelStrategy)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import transformer_blocks
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.errors import UserError

FLOATS_ONLY = "null under FSDP2, which cannot cut quantised weights; strategy ddp holds them whole on every device"


def use_all_devices(strategy: Strategy) -> None:
    """Have FSDP2 shard over all devices of all nodes where ``data_parallel_size`` is ``"auto"``.

    Lightning's own default shards over nodes alone and leaves the devices of a node to tensor parallelism, which is not
    used here: each would hold all weights.

    Raises:
        UserError: If the sizes given leave devices without a part, or ask for tensor parallelism.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    n_devices = strategy.num_nodes * strategy.num_processes
    if strategy._tensor_parallel_size == "auto":
        strategy._tensor_parallel_size = 1
    if strategy._data_parallel_size == "auto":
        strategy._data_parallel_size = n_devices
    _refuse_tensor_parallel(strategy._tensor_parallel_size)
    if strategy._data_parallel_size != n_devices:
        allowed = f'"auto" or {n_devices}, the number of devices'
        raise UserError("trainer.strategy.data_parallel_size", strategy._data_parallel_size, allowed)


def data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks of ``ModelParallelStrategy``'s mesh that share a batch: all of them.

    Raises:
        UserError: If the mesh has tensor-parallel ranks; they would hold and compute the same thing several times.
    """
    _refuse_tensor_parallel(mesh["tensor_parallel"].size())
    return mesh["data_parallel"]


def shard(model: AnswerModel, mesh: DeviceMesh) -> None:
    """Cut the weights over a one-dimensional mesh in place: a unit per transformer block, and one of all the rest.

    The model may be on the CPU, on the mesh's device, or without memory (on the meta device). Tied weights stay tied,
    frozen weights may stand beside trained ones. ``forward`` and ``generate`` gather what they need; other methods of
    ``model`` or of what is inside it see shards (``torch.distributed.fsdp.fully_shard``).

    Raises:
        UserError: If the weights are quantised, trained weights have several types, or the blocks are not known.
    """
    if getattr(model.hf, "is_quantized", False):
        raise UserError("quantization", str(model.hf.config.quantization_config.quant_method), FLOATS_ONLY)
    types = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(types) > 1:
        allowed = "one type for all trained weights, or strategy ddp: FSDP2 sums the gradients of a block together"
        raise UserError("trainer.precision", sorted(map(str, types)), allowed)
    blocks = transformer_blocks(model.hf)
    from torch.distributed.fsdp import (  # in torch 2.6 and later
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # Summed in bfloat16, gradients would depend on the number of ranks.
    wide = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(next(iter(types), torch.float32), torch.float32))
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=wide)
    fully_shard(model, mesh=mesh, mp_policy=wide)
    register_fsdp_forward_method(model, "generate")


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is a shard."""
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def load_sharded(
    build: Callable[..., AnswerModel], mesh: DeviceMesh, device: torch.device, quantization: str | None = None
) -> AnswerModel:
    """Build a model of which each rank holds its shards alone; the first rank reads it and hands them out.

    So the host memory is one whole model for all ranks of a node together, not one for each. Every rank must call this.
    ``build()`` makes the model from the checkpoint, ``build(device_map="meta")`` one without memory.

    Raises:
        UserError: On every rank alike: as ``build`` and :func:`shard`; quantised weights, a tensor-parallel mesh.
    """
    ranks = data_parallel(mesh)
    if quantization is not None:
        raise UserError("quantization", quantization, FLOATS_ONLY)
    model = build(device_map="meta")
    shard(model, ranks)
    model.to_empty(device=device)
    whole, mistake = None, None
    if dist.get_rank() == 0:
        try:
            whole = build()
        except UserError as error:
            mistake = error
    # The others wait for this rank: they have to hear of its mistakes.
    source = model if whole is None else whole  # what a model without values cannot try out
    mistake, model.plain_head, model.packs = gathered((mistake, source.plain_head, source.packs))[0]
    if mistake is not None:
        raise mistake
    weights = {} if whole is None else whole.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    sources = {} if whole is None else dict(whole.named_buffers())
    for name, buffer in model.named_buffers():  # those that no state dict holds, too
        if name in sources:
            buffer.copy_(sources[name])
        dist.broadcast(buffer, src=0)
    return model


def _refuse_tensor_parallel(size: int) -> None:
    if size != 1:
        allowed = "1, and data_parallel_size the number of devices: weights are sharded by FSDP2 alone"
        raise UserError("trainer.strategy.tensor_parallel_size", size, allowed)
