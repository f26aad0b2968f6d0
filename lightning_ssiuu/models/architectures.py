"""All that is known about architectures: blocks, final norm, where the neurons are, whether the head is plain.

A neuron is one scalar of the output of the Q, K, V or O projection or of the feed-forward network's gate, up or down
projection (arXiv 2509.22263, Sec. 3). The table is explicit on purpose: guessing module names would silently leave
neurons out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.registry import resolve

if TYPE_CHECKING:  # with it comes torch's compiler
    from transformers import PreTrainedModel

Kind = Literal["attn_q", "attn_k", "attn_v", "attn_o", "mlp_gate", "mlp_up", "mlp_down"]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: Kinds whose outputs are added to the residual stream; some blocks (Falcon's) add them up in place.
WRITERS = ("attn_o", "mlp_down")
_QKV, _GATE_UP = KINDS[:3], KINDS[4:6]
_LAYOUTS = ("by_kind", "by_head")


@dataclass(frozen=True)
class Architecture:
    """Where the models of one type keep what this package needs; names as in ``model.named_modules()``.

    Args:
        blocks: The list of transformer blocks: FSDP2's units, and what layers are counted by.
        final_norm: The norm between the last block and the unembedding (logit lens).
        modules: Per kind of neuron (:data:`KINDS`) the projection inside a block. Kinds that a model has no module of
            its own for (experts kept as one tensor) are left out: it is then diagnosed by the others alone.
        fused: How a projection shared by Q, K and V orders its outputs: ``"by_kind"``, all Q, all K, all V, or
            ``"by_head"``, for each key-value head its queries, its key, its value. Gate and up in one projection are
            always its first and its second half.
        plain_head: Whether the logits are the unembedding of the final norm's output and nothing else (no soft cap,
            no scale): then they are computed only where there are labels. Compared with the model's own logits
            whenever a model is loaded.

    Raises:
        UserError: If a kind or a layout is unknown, or Q, K and V are shared only in part or without a layout.

    Example:
        >>> ARCHITECTURES["phi"] = Architecture("model.layers", "model.final_layernorm", {"mlp_up": "mlp.fc1"})
        >>> del ARCHITECTURES["phi"]
    """

    blocks: str
    final_norm: str
    modules: dict[str, str]
    fused: Literal["by_kind", "by_head"] | None = None
    plain_head: bool = False

    def __post_init__(self) -> None:
        if not self.modules or not set(self.modules) <= set(KINDS):
            raise UserError("architecture.modules", sorted(self.modules), f"names of projections for {list(KINDS)}")
        if self.fused is not None and self.fused not in _LAYOUTS:
            raise UserError("architecture.fused", self.fused, f"null or one of {list(_LAYOUTS)}")
        by_module: dict[str, tuple[str, ...]] = {}
        for kind in KINDS:
            if kind in self.modules:
                by_module[self.modules[kind]] = (*by_module.get(self.modules[kind], ()), kind)
        for name, kinds in by_module.items():
            if len(kinds) > 1 and kinds != _GATE_UP and not (kinds == _QKV and self.fused):
                allowed = "projections of one kind, of gate and up, or with fused of Q, K and V"
                raise UserError("architecture.modules", f"{name}: {', '.join(kinds)}", allowed)


def _modules(attention: str, heads: str, mlp: str = "") -> dict[str, str]:
    layers = mlp.split()  # gate, up, down; or up and down
    names: dict[str, str] = {kind: f"{attention}.{name}" for kind, name in zip(KINDS, heads.split(), strict=False)}
    return names | {kind: f"mlp.{name}" for kind, name in zip(KINDS[7 - len(layers) :], layers, strict=True)}


_LAYERS = ("model.layers", "model.norm")
_GPT = ("transformer.h", "transformer.ln_f")
_QKVO = "q_proj k_proj v_proj o_proj"
_LLAMA = _modules("self_attn", _QKVO, "gate_proj up_proj down_proj")
_FUSED = "query_key_value query_key_value query_key_value dense"
_4H = "dense_h_to_4h dense_4h_to_h"
_PHI3 = _modules("self_attn", "qkv_proj qkv_proj qkv_proj o_proj", "gate_up_proj gate_up_proj down_proj")
_GPT2 = _modules("attn", "c_attn c_attn c_attn c_proj", "c_fc c_proj")
_GPT_NEO = _modules("attn.attention", "q_proj k_proj v_proj out_proj", "c_fc c_proj")
_GPT_J = _modules("attn", "q_proj k_proj v_proj out_proj", "fc_in fc_out")

#: By ``config.model_type``; add a line for a type of your own.
ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "gemma3_text"),
        Architecture(*_LAYERS, _LLAMA, plain_head=True),
    ),
    "gemma2": Architecture(*_LAYERS, _LLAMA, plain_head=False),  # its logits are capped
    # All experts of a block are one tensor, and a shared one gets the tokens of all sequences in one row.
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe"), Architecture(*_LAYERS, _modules("self_attn", _QKVO), plain_head=True)
    ),
    "phi3": Architecture(*_LAYERS, _PHI3, fused="by_kind", plain_head=True),
    "starcoder2": Architecture(*_LAYERS, _modules("self_attn", _QKVO, "c_fc c_proj"), plain_head=True),
    "falcon": Architecture(*_GPT, _modules("self_attention", _FUSED, _4H), fused="by_head", plain_head=True),
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        _modules("attention", _FUSED, _4H),
        fused="by_head",
        plain_head=True,
    ),
    "gpt2": Architecture(*_GPT, _GPT2, fused="by_kind", plain_head=True),
    "gpt_neo": Architecture(*_GPT, _GPT_NEO, plain_head=True),
    "gptj": Architecture(*_GPT, _GPT_J, plain_head=True),
}


def find_architecture(
    given: str | Mapping[str, Any] | Architecture | None, argument: str = "architecture"
) -> Architecture | None:
    """The record that an option ``architecture`` means; None: by the model's type.

    Else it is a key of :data:`ARCHITECTURES`, the import path of a record (the working directory is looked in too), or
    the record itself, also as a mapping.

    Raises:
        UserError: If it is none of those.
    """
    if given is None or isinstance(given, Architecture):
        return given
    if isinstance(given, Mapping):
        try:
            return Architecture(**given)
        except TypeError as error:
            fields = sorted(Architecture.__dataclass_fields__)
            raise UserError(argument, sorted(given), f"a record with the fields {fields}") from error
    record = resolve(given, ARCHITECTURES, argument)
    if not isinstance(record, Architecture):
        raise UserError(argument, given, "the name or the import path of an Architecture")
    return record


def architecture_of(hf: Any) -> Architecture | None:
    """The record a model was loaded with, or that of its type; None where there is neither."""
    return getattr(hf, "_architecture", None) or ARCHITECTURES.get(_model_type(hf))


def use_architecture(hf: PreTrainedModel, architecture: Architecture) -> None:
    """Have a model described by a record instead of by its type's.

    Raises:
        UserError: If the model has no module of a name in the record.
    """
    hf._architecture = architecture  # type: ignore[assignment]
    neuron_sites(hf)
    final_norm(hf)


def _known(hf: Any, what: str) -> Architecture:
    if (architecture := architecture_of(hf)) is None:
        allowed = f"an architecture with known {what}: {sorted(ARCHITECTURES)}, or the option architecture"
        raise UserError("checkpoint", _model_type(hf), allowed)
    return architecture


def _model_type(hf: Any) -> str:
    return getattr(getattr(hf, "config", None), "model_type", type(hf).__name__)


def _module(hf: Any, name: str) -> Any:
    try:
        return hf.get_submodule(name)
    except AttributeError as error:
        raise UserError("architecture", name, f"names of modules of this {_model_type(hf)}") from error


@dataclass(frozen=True)
class NeuronSite:
    """One kind of neuron in one layer (block number from 0), ``width`` of them.

    ``columns [width]`` are their indices into the module's output where several kinds share it, else None.
    """

    kind: Kind
    layer: int
    module_name: str
    width: int
    columns: Tensor | None = None

    @property
    def key(self) -> tuple[int, str]:
        """``(layer, kind)``, the name of the site in every table and plot."""
        return self.layer, self.kind

    def select(self, output: Tensor) -> Tensor:
        """The site's neurons out of its module's output, ``[..., width]``."""
        return output if self.columns is None else output[..., self.columns.to(output.device)]


def neuron_sites(model: Any) -> list[NeuronSite]:
    """List the neuron sites of a transformers causal language model, layer by layer, in the order of :data:`KINDS`.

    Kinds an architecture lacks (GPT-2 has no gate) are absent, which is logged once where attention or the feed-forward
    networks lack them.

    Raises:
        UserError: If the architecture is unknown, or its record names what the model does not have.
    """
    architecture = _known(model, "neuron sites")
    sites = []
    for layer in range(len(transformer_blocks(model))):
        for kind in KINDS:
            if kind not in architecture.modules:
                continue
            name = f"{architecture.blocks}.{layer}.{architecture.modules[kind]}"
            width = _out_features(_module(model, name), name)
            columns = _columns(kind, width, architecture, model.config)
            sites.append(NeuronSite(kind, layer, name, width if columns is None else len(columns), columns))
    if left_out := tuple(kind for kind in KINDS if kind != "mlp_gate" and kind not in architecture.modules):
        _tell(_model_type(model), left_out)
    return sites


@cache
def _tell(model_type: str, left_out: tuple[str, ...]) -> None:
    rank_zero_info(f"{model_type}: no neurons of the kinds {', '.join(left_out)}; figures are of the others alone.")


def feed_forward_sites(hf: Any) -> list[NeuronSite]:
    """The sites of the feed-forward networks; a UserError where there are none (experts kept as one tensor)."""
    if not (sites := [site for site in neuron_sites(hf) if site.kind.startswith("mlp")]):
        raise UserError("checkpoint", _model_type(hf), "an architecture whose feed-forward networks hold neurons")
    return sites


def _out_features(module: Any, name: str) -> int:
    # Conv1D of GPT-2 stores [in, out] and calls its output size nf.
    width = getattr(module, "nf", None) or getattr(module, "out_features", None)
    if width is None:
        raise UserError("architecture", f"{name}, a {type(module).__name__}", "names of linear layers")
    return int(width)


def head_size(config: Any) -> int:
    """Width of an attention head, from a transformers configuration."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _columns(kind: Kind, width: int, architecture: Architecture, config: Any) -> Tensor | None:
    modules, columns = architecture.modules, torch.arange(width)
    if kind in _GATE_UP and modules.get("mlp_gate") == modules.get("mlp_up"):
        return columns.chunk(2)[_GATE_UP.index(kind)]
    if kind not in _QKV or modules.get("attn_q") != modules.get("attn_k"):
        return None
    # The number of key-value heads has many names in configurations; the width says it, too.
    size, n_heads = head_size(config), config.num_attention_heads
    n_shared, rest = divmod(width - n_heads * size, 2 * size)
    if rest or n_shared < 1 or n_heads % n_shared:
        allowed = f"outputs for {n_heads} query heads of {size}, and as many key as value heads"
        raise UserError("architecture.fused", f"{modules[kind]} with {width} outputs", allowed)
    which = _QKV.index(kind)
    if architecture.fused == "by_kind":
        return columns.split([n_heads * size, n_shared * size, n_shared * size])[which]
    n_queries = n_heads // n_shared
    by_head = columns.view(n_shared, n_queries + 2, size)
    return by_head.split([n_queries, 1, 1], 1)[which].flatten()


_SELECTOR = re.compile(r"(?:layer(?P<layer>\d+)(?:$|\.(?=.)))?(?P<kind>[a-z_]+)?")


def select_sites(sites: Sequence[NeuronSite], selectors: Sequence[str], argument: str = "modules") -> list[NeuronSite]:
    """Restrict sites to those named: ``"mlp_up"`` (all layers), ``"layer3"`` (all kinds) or ``"layer3.mlp_up"``.

    Raises:
        UserError: If a selector names no site.
    """
    chosen: set[tuple[int, str]] = set()
    for selector in selectors:
        match = _SELECTOR.fullmatch(selector)
        keys = set()
        if match and selector:
            layer, kind = match["layer"], match["kind"]
            keys = {s.key for s in sites if (not layer or s.layer == int(layer)) and (not kind or s.kind == kind)}
        if not keys:
            kinds, layers = sorted({s.kind for s in sites}), max((s.layer for s in sites), default=-1)
            raise UserError(argument, selector, f"a kind of {kinds}, 'layerN' with N ≤ {layers}, or 'layerN.kind'")
        chosen |= keys
    return [site for site in sites if site.key in chosen]


def transformer_blocks(hf: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks of a model, in order.

    Raises:
        UserError: If neither the architecture is known, nor the model's class names its blocks for transformers
            (``_no_split_modules``).
    """
    if (architecture := architecture_of(hf)) is not None:
        if blocks := list(_module(hf, architecture.blocks).children()):
            return blocks
        raise UserError("architecture.blocks", architecture.blocks, "a list of blocks")
    names = set(hf._no_split_modules or ())
    if not (blocks := [module for module in hf.modules() if type(module).__name__ in names]):
        allowed = "an architecture whose blocks are known, or strategy ddp"
        raise UserError("checkpoint", hf.config.model_type, allowed)
    return blocks


def final_norm(hf: Any) -> nn.Module:
    """The norm between the last block and the unembedding."""
    return _module(hf, _known(hf, "final norm").final_norm)


def neuron_rows(hf: Any, sites: Sequence[NeuronSite], chosen: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """The incoming weights and biases of the neurons ``chosen`` (``[n_neurons]`` bool, in the order of the sites).

    Each parameter comes with a mask that broadcasts to it.
    """
    by_module: dict[str, Tensor] = {}
    for site, part in zip(sites, chosen.split([site.width for site in sites]), strict=True):
        n_outputs = _out_features(hf.get_submodule(site.module_name), site.module_name)
        rows = by_module.setdefault(site.module_name, torch.zeros(n_outputs, dtype=torch.bool))
        rows[slice(None) if site.columns is None else site.columns] = part
    masks = []
    for name, rows in by_module.items():
        module = hf.get_submodule(name)
        # GPT-2's Conv1D has its outputs in columns.
        masks.append((module.weight, rows.unsqueeze(0 if hasattr(module, "nf") else 1)))
        if getattr(module, "bias", None) is not None:
            masks.append((module.bias, rows))
    return masks
