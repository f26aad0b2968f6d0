"""Low-rank adapters (LoRA, arXiv 2106.09685): train a few small matrices beside frozen, possibly quantised, weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_ssiuu.models.quantization import float_type, n_matrix_weights, was_conv1d
from lightning_ssiuu.utils.errors import UserError

#: The name peft gives the only adapter there is.
ADAPTER = "default"


@dataclass
class LoRA:
    """Options of the adapters an objective trains instead of the weights (through peft).

    A projection with weight W computes ``(W + alpha / r · B A) x``; W is frozen, ``A [r, in]`` starts random and
    ``B [out, r]`` at zero, so that training starts at the original model exactly. Neuron attributions see the sum,
    as neurons are a projection's outputs. :class:`~lightning_ssiuu.regularizers.AttributionRegularizer` acts on
    the parameters that train, which are A and B.

    In a recipe: ``lora: {r: 16, alpha: 32.0, dropout: 0.0, target_modules: null}``.

    Args:
        r: Rank, ≥ 1.
        alpha: Scale of the adapters, > 0, divided by the rank.
        dropout: Probability with which an adapter's input is dropped while training, in [0, 1).
        target_modules: Names, or ends of names, of the projections to adapt, e.g. ``["q_proj", "v_proj"]``; None takes
            every linear layer but the head. Experts of a mixture that are kept as one tensor are no linear layers and
            stay out; the log then says which share of the weights has adapters.

    Raises:
        UserError: If an option is outside its range.

    Example:
        >>> LoRA(r=0)
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: lora.r: got 0, allowed: a whole number ≥ 1
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.r, int) and self.r >= 1):
            raise UserError("lora.r", self.r, "a whole number ≥ 1")
        if not 0 < self.alpha < math.inf:
            raise UserError("lora.alpha", self.alpha, "a finite number > 0")
        if not 0 <= self.dropout < 1:
            raise UserError("lora.dropout", self.dropout, "a probability in [0, 1)")
        if self.target_modules is not None and not self.target_modules:
            raise UserError("lora.target_modules", self.target_modules, "null, or at least one projection")

    def attach(self, model: PreTrainedModel) -> None:
        """Put adapters into ``model`` in place: its class and module names stay, only the adapters train.

        They are drawn on the CPU from torch's global generator, so a seed gives the same ones on any device, and kept
        in float32, or in the model's type where that is wider. On a model without storage (device ``meta``) they have
        none either, and nothing is drawn.

        Raises:
            UserError: If peft is missing, a target names no projection, or the model has adapters already.
        """
        try:
            import peft
        except ImportError as error:
            raise UserError("lora", "adapters", 'null without peft: pip install "lightning-ssiuu[lora]"') from error
        if any(True for _ in adapted_layers(model)):
            raise UserError("lora", "a second set of adapters", "null for a model that has adapters already")
        targets, n_weights = self._targets(model), n_matrix_weights(model)
        config = peft.LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # any float will do
            lora_dropout=self.dropout,
            target_modules=targets,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type="CAUSAL_LM",
        )
        peft.inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=True)
        width = torch.promote_types(float_type(model), torch.float32)
        n_adapted = 0
        for _, layer in adapted_layers(model):
            _initialise(layer, width)
            n_adapted += layer.in_features * layer.out_features
        if self.target_modules is None and (share := n_adapted / max(1, n_weights)) < 0.995:
            text = f"lora adapts projections with {100 * share:.0f} % of the weights outside embeddings and head"
            rank_zero_info(f"{model.config.model_type}: {text}; experts kept as one tensor do not train.")

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Take the adapters out again, if there are any: the weights are those from before, and train."""
        if not (layers := list(adapted_layers(model))):
            return
        for name, layer in layers:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer.base_layer)
        for module in model.modules():
            if hasattr(module, "peft_config"):  # peft's note that there are adapters
                del module.peft_config
        model.requires_grad_(True)

    def _targets(self, model: PreTrainedModel) -> list[str]:
        head, linear = model.get_output_embeddings(), (nn.Linear, Conv1D)
        projections = [n for n, module in model.named_modules() if isinstance(module, linear) and module is not head]
        if self.target_modules is None:
            chosen = set(projections)
        else:
            chosen = set()
            for target in self.target_modules:
                matches = {name for name in projections if f".{name}".endswith(f".{target}")} if target else set()
                if not matches:
                    there = sorted({name.rpartition(".")[2] for name in projections})
                    raise UserError("lora.target_modules", target, f"projections of this model: {there}")
                chosen |= matches
        # Ends of names where they say the same: what is saved beside the adapters should be readable.
        ends = sorted({name.rpartition(".")[2] for name in chosen})
        same = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends} == chosen
        return ends if same else sorted(chosen)


def _initialise(layer: Any, dtype: torch.dtype) -> None:
    device = layer.base_layer.weight.device
    matrices = {"lora_A": (layer.r[ADAPTER], layer.in_features), "lora_B": (layer.out_features, layer.r[ADAPTER])}
    for name, shape in matrices.items():
        matrix = torch.zeros(shape, dtype=torch.float32, device="meta" if device.type == "meta" else "cpu")
        if name == "lora_A":
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))  # as nn.Linear's weight, and peft's A
        getattr(layer, name)[ADAPTER].weight = nn.Parameter(matrix.to(device, dtype))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of the projections that have an adapter."""
    for name, module in model.named_modules():
        if is_adapted(module):
            yield name, module


def is_adapted(module: Any) -> bool:
    """Whether a module is a projection with an adapter around it."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' matrices under peft's own names (``<projection>.lora_A.weight``), in the model's order."""
    return {
        f"{name}.{matrix}.weight": getattr(layer, matrix)[ADAPTER].weight
        for name, layer in adapted_layers(model)
        for matrix in ("lora_A", "lora_B")
    }


def layer_delta(layer: Any, matrix_a: torch.Tensor, matrix_b: torch.Tensor) -> torch.Tensor:
    """``alpha / r · B A`` of A ``[r, in]`` and B ``[out, r]``: what an adapter adds to the weight as it is stored."""
    delta = layer.scaling[ADAPTER] * (matrix_b @ matrix_a)
    return delta.T if was_conv1d(layer.base_layer) else delta


@contextmanager
def adapters_kept_wide(model: nn.Module) -> Iterator[None]:
    """Inside, casting the model to a narrower type leaves the adapters in theirs.

    Lightning's ``bf16-true`` casts a whole module. What an optimiser adds to an adapter in a step is mostly too small
    for bfloat16's eight bits, and adapters are too few for their width to matter.
    """
    before = [(parameter, parameter.data) for parameter in adapter_parameters(model).values()]
    yield
    for parameter, data in before:
        if parameter.dtype.itemsize < data.dtype.itemsize:
            parameter.data = data.to(parameter.device)


def without_frozen(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a state dict that trains: a run with adapters finds the rest in the checkpoint it began with.

    For quantised weights it is also the only part that can be put back: bitsandbytes writes constants beside 4-bit
    weights that it does not read again.
    """
    return {name: state[name] for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_adapter_state(module: nn.Module, state: Mapping[str, Any] | None) -> None:
    """Raise a UserError unless a checkpoint's state holds every adapter (None: a strategy keeps it elsewhere).

    Loading it would leave out what it does not hold.
    """
    if state is None:
        return
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if missing := names - state.keys():
        given = f"a checkpoint without {len(missing)} of {len(names)} adapter matrices"
        raise UserError("ckpt_path", given, "one of a run with the same lora options")
