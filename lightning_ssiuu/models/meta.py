"""A checkpoint's model on the meta device, and memory for it without values (for ``--estimate-memory``)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import transformers  # whose parts are imported when they are named
from torch import Tensor, nn

from lightning_ssiuu.models.architectures import Architecture, use_architecture
from lightning_ssiuu.models.loading import plain_configuration
from lightning_ssiuu.models.quantization import check_reach, loading_options, prepare_for_training

_CODES_4BIT, _CODES_8BIT, _BLOCK, _OUTER_BLOCK = 16, 256, 64, 256  # of bitsandbytes' doubly quantised NF4


def blueprint(
    checkpoint: str,
    dtype: torch.dtype,
    quantization: Literal["8bit", "4bit"] | None,
    architecture: Architecture | None = None,
) -> transformers.PreTrainedModel:
    """What ``load_model`` gives for the same arguments, on the meta device; only the configuration is read."""
    config = plain_configuration(checkpoint)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.config.use_cache = False
    if quantization is not None:
        _quantize(model, loading_options(quantization, dtype, None)["quantization_config"], dtype)
        check_reach(model, quantization)
        prepare_for_training(model)
    if architecture is not None:
        use_architecture(model, architecture)
    return model.eval()


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Put a blueprint, possibly with adapters, on a device; its values are whatever is there, ties stay."""
    packed = [module for module in model.modules() if is_packed(module)]
    for module in packed:
        _give_packed_weight(module)
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def placed(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            # The old one is kept beside the new: an identity means nothing once its object is gone.
            known[id(tensor)] = tensor, nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return known[id(tensor)][1]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors |= {name: placed(tensor) for name, tensor in tensors.items() if tensor is not None}
    for module in packed:
        _give_scales(module)


def is_packed(module: nn.Module) -> bool:
    """Whether a layer of a blueprint is to be one of bitsandbytes'; after :func:`give_memory` no weight tells."""
    return type(module).__module__.startswith("bitsandbytes.")


def _quantize(model: transformers.PreTrainedModel, options: Any, dtype: torch.dtype) -> None:
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(options, pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"})
    quantizer.postprocess_model(model)


def _give_packed_weight(module: Any) -> None:
    rows, columns = int(module.out_features), int(module.in_features)
    if _is_8bit(module):
        shape, dtype = (rows, columns), torch.int8
    else:
        shape, dtype = (-(-rows * columns // 2), 1), torch.uint8
    # A plain parameter: bitsandbytes' own classes quantise when they are moved.
    module.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def _is_8bit(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear8bitLt"


def _give_scales(module: Any) -> None:
    weight, rows, columns = module.weight, int(module.out_features), int(module.in_features)

    def new(size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=weight.device)

    if _is_8bit(module):
        module.state.CB, module.state.SCB = weight.data, new(rows, torch.float32)
        weight.CB = weight.SCB = None
        return
    from bitsandbytes.functional import QuantState

    n_blocks = -(-rows * columns // _BLOCK)
    outer = QuantState(
        absmax=new(-(-n_blocks // _OUTER_BLOCK), torch.float32),
        blocksize=_OUTER_BLOCK,
        code=new(_CODES_8BIT, torch.float32),
        dtype=torch.float32,
    )
    weight.quant_state = QuantState(
        absmax=new(n_blocks, torch.uint8),
        shape=torch.Size((rows, columns)),
        dtype=module.compute_dtype,
        blocksize=_BLOCK,
        code=new(_CODES_4BIT, torch.float32),
        quant_type="nf4",
        offset=new(1, torch.float32)[0],
        state2=outer,
    )
