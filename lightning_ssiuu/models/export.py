"""Write a trained model as a plain transformers directory: shards gathered, adapters merged, weights dequantised."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.models.lora import (
    ADAPTER,
    adapted_name,
    adapter_parameters,
    is_adapted,
    layer_parameters,
    merged_weight,
)
from lightning_ssiuu.models.quantization import dequantized, float_type, is_quantized
from lightning_ssiuu.utils.distributed import rank
from lightning_ssiuu.utils.files import written_atomically

if TYPE_CHECKING:  # with it comes torch's compiler
    from transformers import PreTrainedModel


def plain_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under their original names, on the CPU: shards gathered, adapters merged, quantised ones unpacked.

    Adapters are merged in float32 onto what their projection computes with, which for a quantised projection is
    the dequantised weight: the result is the model that was trained and scored, not the original with the adapters
    put on. It has the type of the weights that are not quantised. Both give the same logits up to rounding (float32:
    1e-6 relative); only, on a GPU, and on a CPU outside training mode, an 8-bit projection also rounds its
    input to 8 bits, which a plain one does not.

    Every rank must call this; weights are gathered one at a time and kept by the first, on others the result is empty.
    Tied weights are one tensor under several names, and weights that need no work share their memory with the model.
    """
    keep, dtype = rank() == 0, float_type(model)
    known: dict[int, Tensor | None] = {}
    plain: dict[str, Tensor] = {}
    for entry in _entries(model):
        if id(entry.tensor) not in known:
            known[id(entry.tensor)] = entry.plain(dtype, keep)
        if (tensor := known[id(entry.tensor)]) is not None:
            plain[entry.name] = tensor
    return plain


def plain_bytes(model: PreTrainedModel, adapter: bool = False, merged: bool = True) -> int:
    """Size in bytes of the weights :func:`save_pretrained` (and :func:`save_adapter`) writes; nothing is computed."""
    dtype = float_type(model)
    sizes = {id(entry.tensor): entry.plain_bytes(dtype) for entry in _entries(model)} if merged else {}
    alone = adapter_parameters(model).values() if adapter else ()
    return sum(sizes.values()) + sum(p.numel() * p.element_size() for p in alone)


def save_pretrained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | os.PathLike[str]
) -> None:
    """Save model and tokenizer as one transformers directory, whole or not at all; every rank must call it.

    ``AutoModelForCausalLM.from_pretrained`` loads it with neither peft nor bitsandbytes: safetensors weights as
    :func:`plain_state_dict` gives them, and a configuration that knows nothing of quantisation or adapters. An earlier
    directory is replaced once the new files are complete.
    """
    state = plain_state_dict(model)
    if rank() > 0:
        return
    skeleton = _skeleton(model)
    with written_atomically(directory) as temporary:
        skeleton.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)


def save_adapter(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    base: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Save the adapters alone in peft's format, whole or not at all; every rank must call it.

    ``PeftModel.from_pretrained(base_model, directory)`` puts them on. Trained beside quantised weights they belong to
    those: put on a base loaded in another width they give a slightly different model. ``base`` is the name of the
    checkpoint they were trained on, by which they are put on it again; a local directory's is made absolute.
    """
    matrices = adapter_parameters(model)
    state = {f"base_model.model.{name}": _whole(matrix).cpu() for name, matrix in matrices.items()}
    if rank() > 0:
        return
    adapted: Any = model
    config = copy.deepcopy(adapted.peft_config[ADAPTER])
    config.base_model_name_or_path = os.path.abspath(base) if base != "tiny" and os.path.exists(base) else base
    config.inference_mode = True
    with written_atomically(directory) as temporary:
        config.save_pretrained(os.fspath(temporary))
        save_file(state, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


@dataclass
class _Entry:
    """One tensor of the original model; ``layer`` is what holds its adapter, if it has one."""

    name: str
    tensor: Tensor
    module: Any
    layer: Any

    @property
    def _packed(self) -> bool:
        return is_quantized(self.module) and self.tensor is self.module.weight

    def plain(self, dtype: torch.dtype, keep: bool) -> Tensor | None:
        # All ranks take part in gathering it.
        parts = [] if self.layer is None else layer_parameters(self.layer).values()
        whole, *matrices = [_whole(part) for part in (self.tensor, *parts)]
        if not keep:
            return None
        dtype = dtype if self._packed else whole.dtype
        if self._packed:
            whole = dequantized(self.module)
        if matrices:
            wide = torch.promote_types(whole.dtype, torch.float32)
            whole = merged_weight(self.layer, whole.to(wide), *(matrix.to(wide) for matrix in matrices))
        return whole.to("cpu", dtype).contiguous()

    def plain_bytes(self, dtype: torch.dtype) -> int:
        if self._packed:
            return self.module.in_features * self.module.out_features * dtype.itemsize
        return self.tensor.numel() * self.tensor.element_size()


def _entries(module: Any, prefix: str = "", layers: Mapping[str, Any] = MappingProxyType({})) -> Iterator[_Entry]:
    if is_adapted(module):
        yield from _entries(module.base_layer, prefix, {**layers, adapted_name(module): module})
        return
    persistent = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
    for name, tensor in [*module._parameters.items(), *persistent.items()]:
        if tensor is not None:
            yield _Entry(prefix + name, tensor, module, layers.get(name))
    for name, child in module._modules.items():
        if child is not None:
            yield from _entries(child, f"{prefix}{name}.")


def _whole(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _skeleton(model: Any) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton = type(model)(config).to(float_type(model))
    skeleton.generation_config = model.generation_config
    if hasattr(model, "_weight_conversions") and not getattr(model, "is_quantized", False):
        # How the file's names became the model's, to be undone.
        skeleton._weight_conversions = model._weight_conversions
    return skeleton
