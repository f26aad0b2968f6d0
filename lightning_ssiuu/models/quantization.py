"""Frozen weights in 8 or 4 bits through bitsandbytes: how they are asked for, and how they are read back."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from copy import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.extras import check_extra

if TYPE_CHECKING:  # with it comes torch's compiler
    from transformers import PreTrainedModel

#: Parameter classes of bitsandbytes, known by name so that asking does not import it (seconds).
_PACKED = ("Int8Params", "Params4bit")


def loading_options(
    quantization: Literal["8bit", "4bit"], dtype: torch.dtype, device: torch.device | None
) -> dict[str, Any]:
    """What ``from_pretrained`` is told in order to quantise every projection while loading.

    8-bit is LLM.int8() (arXiv 2208.07339). 4-bit is NF4 with doubly quantised constants (QLoRA, arXiv 2305.14314)
    whose products are computed in ``dtype``. The output head, embeddings and norms stay in ``dtype``. The weights
    cannot be moved between kinds of device afterwards; no ``device`` is the CPU.

    Raises:
        UserError: If bitsandbytes (extra ``[quantization]``) is missing or cannot do it in ``dtype``.
    """
    if quantization == "4bit" and dtype == torch.float64:
        raise UserError("quantization", quantization, "null or 8bit with 64-bit floats: 4-bit knows at most 32")
    check_extra("bitsandbytes", "quantization", quantization, "null")
    try:
        import bitsandbytes  # noqa: F401 - only when asked for: importing it takes seconds
    except (ImportError, OSError) as error:
        raise UserError("quantization", quantization, f"null without a working bitsandbytes ({error})") from error
    from transformers import BitsAndBytesConfig

    # It says once per layer and pass that activations become float16 on their way to int8: that is what int8 is.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": config, "device_map": {"": device or torch.device("cpu")}}


def prepare_for_training(model: nn.Module) -> None:
    """Let a model quantised by bitsandbytes be scored and trained in turns.

    Two of its habits are undone. On a CPU with AVX512-BF16 the first scoring would repack the 4-bit weights
    into a form that has no backward pass, and adapters below would silently stop learning. And an 8-bit layer's
    backward pass keeps the layer's input, which only a gradient of the weight would need: activation checkpointing
    would free nothing.
    """
    layers: Iterable[Any] = model.modules()
    for module in layers:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if type(getattr(module, "weight", None)).__name__ == "Int8Params":
            module.register_forward_hook(_forget_input)


def _forget_input(module: nn.Module, inputs: Any, output: Tensor) -> None:
    # What bitsandbytes keeps for the gradient of a weight: ``tensors`` on a GPU, ``A`` on a CPU.
    for name, empty in (("tensors", (None, None, None)), ("A", None)):
        if hasattr(output.grad_fn, name):
            setattr(output.grad_fn, name, empty)


def check_reading(model: nn.Module) -> None:
    """Raise a UserError unless this CPU reads 4-bit weights back as they were packed.

    bitsandbytes packs a weight in blocks of the flattened matrix, and its kernel for CPUs with AVX-512 (seen in 0.50.2)
    reads them as if every row began a block: where the row length is no multiple of the block, most scales are wrong.
    """
    from bitsandbytes import functional

    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if type(weight).__name__ != "Params4bit" or weight.device.type != "cpu":
            continue
        state = weight.quant_state
        if state.shape[-1] % state.blocksize == 0:
            continue
        flat = copy(state)
        flat.shape = torch.Size((1, state.shape.numel()))
        if not torch.equal(*(functional.dequantize_4bit(weight, layout).flatten() for layout in (state, flat))):
            rows = f"bitsandbytes misreads {name}, whose rows of {state.shape[-1]} are no multiple of {state.blocksize}"
            raise UserError("quantization", "4bit", f"8bit or null for this model on this CPU: {rows}")


def check_reach(model: PreTrainedModel, quantization: str) -> None:
    """Say which share of the weights is quantised, where that is not all of them; refuse less than half.

    The share is of the matrices outside embeddings and head. bitsandbytes is given plain linear layers alone;
    transformers keeps all experts of a block in one tensor, and Falcon has linear layers of its own.

    Raises:
        UserError: If less than half of them is.
    """
    if (share := quantized_share(model)) >= 0.995:
        return
    name, reached = getattr(model.config, "model_type", type(model).__name__), f"{100 * share:.0f} %"
    if share < 0.5:
        allowed = f"null for {name}: it would reach {reached} of the weights, those of plain linear layers alone"
        raise UserError("quantization", quantization, allowed)
    rank_zero_info(f"{name}: quantization {quantization} reaches {reached} of the weights outside embeddings and head.")


def quantized_share(model: PreTrainedModel) -> float:
    """Which share of the matrices outside embeddings and head, counted in weights, is in 8 or 4 bits."""
    packed = [module for module in model.modules() if _is_packed(module)]
    return sum(map(_n_weights, packed)) / max(1, n_matrix_weights(model))


def n_matrix_weights(model: PreTrainedModel) -> int:
    """How many weights the matrices outside embeddings and head have, quantised or not."""
    head = model.get_output_embeddings()
    modules = (m for m in model.modules() if not isinstance(m, nn.Embedding) and m is not head)
    return sum(map(_n_weights, modules))


def _is_packed(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.")


def _n_weights(module: Any) -> int:
    if _is_packed(module):  # its parameter's shape is another
        return module.in_features * module.out_features
    return sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)


def float_type(model: PreTrainedModel) -> torch.dtype:
    """The type of what is not quantised: that of the embeddings, which are never adapted either."""
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.dtype


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is in 8 or 4 bits."""
    return type(getattr(module, "weight", None)).__name__ in _PACKED


def dequantized(module: Any) -> Tensor:
    """The weight a quantised layer computes with, in float32 and in the shape its original layer stored it in.

    8-bit: up to the rounding of activations to int8, which happens on GPUs and, on a CPU, outside training mode.
    """
    weight = module.weight
    if type(weight).__name__ == "Int8Params":
        # The scales move from the weight to the layer's state in the first forward pass.
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        plain = weight.data.float() * (scales.to(weight.device).float().unsqueeze(1) / 127)
    else:
        from bitsandbytes.functional import dequantize_4bit

        plain = dequantize_4bit(weight.data, weight.quant_state).float()
    return plain.T if was_conv1d(module) else plain


def was_conv1d(module: Any) -> bool:
    """Whether a layer stores, or before it was quantised stored, its weight as ``[in, out]``, like GPT-2's."""
    return issubclass(getattr(module, "source_cls", type(module)), Conv1D)
