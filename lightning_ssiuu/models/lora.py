"""Low-rank adapters (LoRA, arXiv 2106.09685): train a few small matrices beside frozen, possibly quantised, weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_ssiuu.models.adapter_directory import without_notes
from lightning_ssiuu.models.meta import blueprint
from lightning_ssiuu.models.quantization import float_type, is_quantized, n_matrix_weights, was_conv1d
from lightning_ssiuu.utils.errors import Given, UserError
from lightning_ssiuu.utils.extras import check_extra
from lightning_ssiuu.utils.reading import reading
from lightning_ssiuu.utils.registry import nearest

if TYPE_CHECKING:  # with it comes torch's compiler
    from transformers import PreTrainedModel

#: The name peft gives the only adapter there is.
ADAPTER = "default"
#: What the matrices of experts were called when each was a layer; peft reads these names so wherever they stand.
_TAKEN = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
#: Arguments of peft that are given otherwise, or that are not for adapters as they are here.
_OWN = {
    **dict.fromkeys(("r", "target_modules"), "lora has an option of that name"),
    "lora_alpha": "it is called lora.alpha",
    "lora_dropout": "it is called lora.dropout",
    **dict.fromkeys(
        ("target_parameters", "fan_in_fan_out", "task_type", "inference_mode"), "it follows from the model"
    ),
    "init_lora_weights": "training starts at the original model exactly",
}
#: Arguments that leave out some of the projections chosen.
_CHOOSING = {"exclude_modules", "layers_to_transform", "layers_pattern"}
PLAIN_ROWS = "false beside quantised weights, whose rows bitsandbytes does not give peft to measure on every machine"
#: Kinds of adapters whose sums :func:`merged_weight` knows, by peft's names.
_VARIANTS = {"DoraLinearVariant"}


@dataclass
class LoRA:
    """Options of the adapters an objective trains instead of the weights (through peft).

    A projection with weight W computes ``(W + alpha / r · B A) x``; W is frozen, ``A [r, in]`` starts random and
    ``B [out, r]`` at zero, so that training starts at the original model exactly. Neuron attributions see the sum,
    as neurons are a projection's outputs. :class:`~lightning_ssiuu.regularizers.AttributionRegularizer` acts on
    the parameters that train, which are A and B.

    The experts of a mixture that transformers keeps as one tensor per block (Mixtral, Qwen2-MoE, Qwen3-MoE, …) get an
    A and a B each (peft's ``target_parameters``). Their sums ``W + alpha / r · B A`` are computed in the weights' type
    in every forward pass: memory and time of a second copy of a block's experts.

    ``options`` are passed to peft as they are: with ``use_rslora`` the scale is ``alpha / √r`` (arXiv 2312.03732), with
    ``use_dora`` each row of the sum is given a trained length (arXiv 2402.09353).

    In a recipe: ``lora: {r: 16, alpha: 32.0, dropout: 0.0, target_modules: null, options: {use_dora: true}}``.

    Args:
        r: Rank, ≥ 1.
        alpha: Scale of the adapters, > 0, divided by the rank.
        dropout: Probability with which an adapter's input is dropped while training, in [0, 1); 0 with experts.
        target_modules: Names, or ends of names, of the projections to adapt, e.g. ``["q_proj", "v_proj"]`` or
            ``["experts.down_proj"]``; None takes every linear layer but the head, and all experts. If this leaves
            weights out, the log says which share of them has adapters.
        options: More arguments of ``peft.LoraConfig``, e.g. ``use_dora``, ``use_rslora``, ``rank_pattern``,
            ``layers_to_transform``. Those that train or change other weights than the adapters' are refused.

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
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.r, int) and self.r >= 1):
            raise UserError("lora.r", self.r, "a whole number ≥ 1")
        if not 0 < self.alpha < math.inf:
            raise UserError("lora.alpha", self.alpha, "a finite number > 0")
        if not 0 <= self.dropout < 1:
            raise UserError("lora.dropout", self.dropout, "a probability in [0, 1)")
        if self.target_modules is not None and not self.target_modules:
            raise UserError("lora.target_modules", self.target_modules, "null, or at least one projection")
        for name, value in (self.options or {}).items():
            if name in _OWN:
                raise UserError(f"lora.options.{name}", value, f"none: {_OWN[name]}")

    @property
    def is_dora(self) -> bool:
        """Whether rows have trained lengths."""
        return bool((self.options or {}).get("use_dora"))

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put adapters into ``model`` in place, and return it: names and class stay, only the adapters train.

        They are drawn on the CPU from torch's global generator, so a seed gives the same ones on any device, and kept
        in float32, or in the model's type where that is wider. On a model without storage (device ``meta``) they have
        none either, and nothing is drawn.

        Raises:
            UserError: If peft is missing, a target names no projection or one that peft takes for experts', experts and
                dropout are to go together, or the model has adapters already.
        """
        n_weights = n_matrix_weights(model)
        self._inject(model)
        width = torch.promote_types(float_type(model), torch.float32)
        n_adapted = 0
        for _, layer in adapted_layers(model):
            _initialise(layer, width)
            n_adapted += layer.in_features * layer.out_features * getattr(layer, "num_experts", 1)
        if self.target_modules is None and (share := n_adapted / max(1, n_weights)) < 0.995:
            text = f"lora adapts projections with {100 * share:.0f} % of the weights outside embeddings and head"
            rank_zero_info(f"{model.config.model_type}: {text}; the others do not train.")
        return model

    def check(self, checkpoint: str) -> None:
        """Refuse what :meth:`attach` would; of the checkpoint, the configuration alone is read."""
        with torch.random.fork_rng(devices=[]), reading("checkpoint", checkpoint, "a causal language model"):
            self._inject(blueprint(checkpoint, torch.float32, None))

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Take the adapters out again, if there are any: the weights are those from before, and train."""
        if not (layers := list(adapted_layers(model))):
            return
        for name, layer in layers:
            if not name.endswith(".base_layer"):  # one of several around the same experts
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, layer.get_base_layer())
        without_notes(model)
        model.requires_grad_(True)

    def _inject(self, model: PreTrainedModel) -> None:
        check_extra("peft", "lora", "adapters", "null")
        import peft

        if any(True for _ in adapted_layers(model)):
            raise UserError("lora", "a second set of adapters", "null for a model that has adapters already")
        chosen, modules, experts = self._targets(model)
        if experts and self.dropout:
            allowed = f"0 with adapters on experts, which are added to the weights, or target_modules without {experts}"
            raise UserError("lora.dropout", self.dropout, allowed)
        config = self._config(modules, experts, any(isinstance(module, Conv1D) for module in model.modules()))
        there = sorted({_end(name) for name in modules} - _TAKEN) + experts
        argument, value = "lora.target_modules", cast("object", self.target_modules)
        allowed = f"names that peft does not take for the experts' of {model.config.model_type}: {there}"
        if self.options:
            argument, value, allowed = "lora.options", self._given(), f"options that fit a {model.config.model_type}"
        if self.is_dora and any(map(is_quantized, model.modules())):
            raise UserError("lora.options.use_dora", True, PLAIN_ROWS)
        with reading(argument, value, allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # on names that were taken for others
            peft.inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=True)
        adapted = {_adapted_target(name, layer) for name, layer in adapted_layers(model)}
        leaves_out = bool((self.options or {}).keys() & _CHOOSING)
        more = _beyond_adapters(model)
        if more or not (adapted and adapted <= chosen if leaves_out else adapted == chosen):
            self.detach(model)
            raise UserError(argument, value, f"options that train the adapters alone ({more})" if more else allowed)

    def _config(self, modules: list[str], experts: list[str], transposed: bool) -> Any:
        import peft

        known = peft.LoraConfig.__dataclass_fields__
        for name, value in (self.options or {}).items():
            if name not in known:
                meant = f" ({text})" if (text := nearest(name, known)) else ""
                raise UserError(f"lora.options.{name}", value, f"an argument of peft.LoraConfig{meant}")
        with reading("lora.options", self._given(), "values that peft.LoraConfig takes together"):
            return peft.LoraConfig(
                r=self.r,
                lora_alpha=self.alpha,  # type: ignore[arg-type]  # any float will do
                lora_dropout=self.dropout,
                target_modules=modules,
                target_parameters=experts or None,
                fan_in_fan_out=transposed,
                task_type="CAUSAL_LM",
                **(self.options or {}),
            )

    def _given(self) -> Given:
        return Given(", ".join(f"{name}={value!r}" for name, value in (self.options or {}).items()) or "none")

    def _targets(self, model: PreTrainedModel) -> tuple[set[str], list[str], list[str]]:
        head, linear = model.get_output_embeddings(), (nn.Linear, Conv1D)
        modules = [n for n, module in model.named_modules() if isinstance(module, linear) and module is not head]
        experts = [f"{n}.{own}" for n, module in model.named_modules() for own in _expert_weights(module)]
        if self.target_modules is None:
            chosen = {*modules, *experts}
        else:
            chosen = set()
            for target in self.target_modules:
                ends = f".{target}"
                matches = {n for n in [*modules, *experts] if f".{n}".endswith(ends)} if target else set()
                if not matches:
                    there = sorted({_end(n) for n in modules} | {_end(n, 2) for n in experts})
                    raise UserError("lora.target_modules", target, f"projections of this model: {there}")
                chosen |= matches
        names = [name for name, _ in model.named_modules()]
        return chosen, _ends(chosen & {*modules}, names, 1), _ends(chosen & {*experts}, experts, 2)


def _adapted_target(name: str, layer: Any) -> str:
    own = getattr(layer, "parameter_name", "")
    return f"{name.replace('.base_layer', '')}.{own}".strip(".")


def _end(name: str, n_parts: int = 1) -> str:
    return ".".join(name.split(".")[-n_parts:])


def _ends(chosen: set[str], names: list[str], n_parts: int) -> list[str]:
    # Ends of names where they say the same: what is saved beside the adapters should be readable.
    ends = {_end(name, n_parts) for name in chosen}
    return sorted(ends if {name for name in names if _end(name, n_parts) in ends} == chosen else chosen)


def _expert_weights(module: nn.Module) -> list[str]:
    # transformers marks its modules of experts so, and peft reads there which way round their matrices lie.
    marked = hasattr(module, "is_transposed")
    return [name for name, p in module.named_parameters(recurse=False) if p.dim() == 3] if marked else []


def _beyond_adapters(model: nn.Module) -> str:
    # What would train beside adapters, or be summed otherwise than here; empty where nothing is.
    own = {id(parameter) for parameter in adapter_parameters(model).values()}
    if others := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]:
        return f"other weights would train, first {others[0]}"
    layers = [layer for _, layer in adapted_layers(model)]
    kinds = {type(kind).__name__ for layer in layers for kind in getattr(layer, "lora_variant", {}).values()}
    return f"{' and '.join(sorted(kinds - _VARIANTS))} is not known here" if kinds - _VARIANTS else ""


def _initialise(layer: Any, dtype: torch.dtype) -> None:
    device = adapted_weight(layer).device
    for name in ("lora_A", "lora_B"):
        shape = getattr(layer, name)[ADAPTER].weight.shape
        matrix = torch.zeros(shape, dtype=torch.float32, device="meta" if device.type == "meta" else "cpu")
        if name == "lora_A":
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))  # as nn.Linear's weight, and peft's A
        getattr(layer, name)[ADAPTER].weight = nn.Parameter(matrix.to(device, dtype))
    if (lengths := _lengths(layer)) is None:
        return
    values = torch.empty(layer.out_features, device="meta")
    if device.type != "meta":  # of the rows as they are
        parts = {"lora_A": layer.lora_A[ADAPTER].weight, "lora_B": layer.lora_B[ADAPTER].weight}
        lengths.update_layer(base_layer=layer.get_base_layer(), scaling=layer.scaling[ADAPTER], **parts)
        values = lengths.weight.detach()
    lengths.weight = nn.Parameter(values.to(device, dtype))


def _lengths(layer: Any) -> Any:
    # DoRA's module with the trained length of each row, if there is one.
    vectors = dict(getattr(layer, "lora_magnitude_vector", None) or {})
    return vectors.get(ADAPTER)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of the projections that have an adapter."""
    for name, module in model.named_modules():
        if is_adapted(module):
            yield name, module


def adapted_name(layer: Any) -> str:
    """The name of the parameter an adapter belongs to, in the module that it is around."""
    return getattr(layer, "parameter_name", "weight")


def adapted_weight(layer: Any) -> Any:
    """The frozen parameter an adapter belongs to: a projection's weight, or that of all experts of a block."""
    return getattr(layer.get_base_layer(), adapted_name(layer))


def is_adapted(module: Any) -> bool:
    """Whether a module is a projection with an adapter around it."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' weights under peft's own names (``<projection>.lora_A.weight``), in the model's order."""
    return {f"{name}.{own}": p for name, layer in adapted_layers(model) for own, p in layer_parameters(layer).items()}


def layer_parameters(layer: Any) -> dict[str, nn.Parameter]:
    """What of an adapted projection trains: A, B and, with DoRA, the lengths of the rows."""
    own = {f"{name}.weight": getattr(layer, name)[ADAPTER].weight for name in ("lora_A", "lora_B")}
    return own if (lengths := _lengths(layer)) is None else own | {"lora_magnitude_vector": lengths.weight}


def merged_weight(
    layer: Any, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """What a projection computes with, as it is stored: the frozen weight with the adapter's parts in it.

    Parts as in :func:`layer_parameters`; ``W + alpha / r · B A`` (√r for rsLoRA), with DoRA every row of it brought to
    its length.
    """
    whole = weight + _layer_delta(layer, a, b)
    if lengths is None:
        return whole
    rows = whole.T if was_conv1d(layer.get_base_layer()) else whole
    rows = rows * (lengths / torch.linalg.vector_norm(rows, dim=1)).unsqueeze(1)
    return rows.T if was_conv1d(layer.get_base_layer()) else rows


def _layer_delta(layer: Any, matrix_a: torch.Tensor, matrix_b: torch.Tensor) -> torch.Tensor:
    # For E experts A is [E · r, in], expert by expert, and B [out, r · E], rank by rank, as peft keeps them; the sum is
    # one product for each expert.
    base, scaling = layer.get_base_layer(), layer.scaling[ADAPTER]
    if (n_experts := getattr(layer, "num_experts", None)) is None:
        delta = scaling * (matrix_b @ matrix_a)
        return delta.T if was_conv1d(base) else delta
    a, b = matrix_a.unflatten(0, (n_experts, -1)), matrix_b.unflatten(1, (-1, n_experts))
    delta = scaling * torch.einsum("ore,eri->eoi", b, a)
    return delta.mT if base.is_transposed else delta


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
