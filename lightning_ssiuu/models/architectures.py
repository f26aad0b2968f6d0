"""Neuron sites: which outputs of which modules count as neurons, architecture by architecture.

A neuron is one scalar of the output of the Q, K, V or O projection or of the feed-forward network's gate, up or down
projection (arXiv 2509.22263, Sec. 3). The table below is explicit on purpose: guessing module names would silently
leave neurons out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ssiuu.utils.errors import UserError

Kind = Literal["attn_q", "attn_k", "attn_v", "attn_o", "mlp_gate", "mlp_up", "mlp_down"]
KINDS: tuple[Kind, ...] = ("attn_q", "attn_k", "attn_v", "attn_o", "mlp_gate", "mlp_up", "mlp_down")


@dataclass(frozen=True)
class SiteTable:
    """Where one architecture keeps its neurons: the list of blocks and, per kind, the module inside a block.

    ``fused`` names how a shared query-key-value projection orders its outputs: ``"thirds"`` (all Q, all K, all V) or
    ``"per_head"`` (Q, K, V of head 0, then of head 1, ...).
    """

    blocks: str
    modules: dict[str, str]
    fused: Literal["thirds", "per_head"] | None = None


_LLAMA = SiteTable(
    "model.layers",
    {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_o": "self_attn.o_proj",
        "mlp_gate": "mlp.gate_proj",
        "mlp_up": "mlp.up_proj",
        "mlp_down": "mlp.down_proj",
    },
)

SITE_TABLES: dict[str, SiteTable] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3"), _LLAMA),
    "gpt_neox": SiteTable(
        "gpt_neox.layers",
        {
            **dict.fromkeys(("attn_q", "attn_k", "attn_v"), "attention.query_key_value"),
            "attn_o": "attention.dense",
            "mlp_up": "mlp.dense_h_to_4h",
            "mlp_down": "mlp.dense_4h_to_h",
        },
        fused="per_head",
    ),
    "gpt2": SiteTable(
        "transformer.h",
        {
            **dict.fromkeys(("attn_q", "attn_k", "attn_v"), "attn.c_attn"),
            "attn_o": "attn.c_proj",
            "mlp_up": "mlp.c_fc",
            "mlp_down": "mlp.c_proj",
        },
        fused="thirds",
    ),
    "gpt_neo": SiteTable(
        "transformer.h",
        {
            "attn_q": "attn.attention.q_proj",
            "attn_k": "attn.attention.k_proj",
            "attn_v": "attn.attention.v_proj",
            "attn_o": "attn.attention.out_proj",
            "mlp_up": "mlp.c_fc",
            "mlp_down": "mlp.c_proj",
        },
    ),
}


@dataclass(frozen=True)
class NeuronSite:
    """One kind of neuron in one layer.

    Args:
        kind: One of :data:`KINDS`.
        layer: Block number, from 0.
        module_name: Dotted name inside the transformers model.
        width: Number of neurons.
        columns: ``[width]`` indices into the module's output where it is shared by several kinds, else None.
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

    Args:
        model: A model whose ``config.model_type`` is in :data:`SITE_TABLES`.

    Returns:
        One site per layer and kind; kinds an architecture lacks (GPT-2 has no gate) are absent.

    Raises:
        UserError: If the architecture is not in the table.

    Example:
        >>> from lightning_ssiuu.models.loading import load_model
        >>> sites = neuron_sites(load_model("tiny"))
        >>> [site.kind for site in sites[:3]], sites[0].layer
        (['attn_q', 'attn_k', 'attn_v'], 0)
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    table = SITE_TABLES.get(model_type)
    if table is None:
        raise UserError("checkpoint", model_type, f"an architecture with known neuron sites: {sorted(SITE_TABLES)}")
    blocks = model.get_submodule(table.blocks)
    if not isinstance(blocks, Iterable):
        raise UserError("checkpoint", model_type, f"a model with a list of blocks at {table.blocks}")
    sites = []
    for layer, block in enumerate(blocks):
        for kind in KINDS:
            if (inner := table.modules.get(kind)) is None:
                continue
            module = block.get_submodule(inner)
            columns = None
            width = _out_features(module)
            if table.fused and kind in ("attn_q", "attn_k", "attn_v"):
                columns = _fused_columns(kind, width, table.fused, model.config.num_attention_heads)
                width = len(columns)
            sites.append(NeuronSite(kind, layer, f"{table.blocks}.{layer}.{inner}", width, columns))
    return sites


def _out_features(module: Any) -> int:
    # Conv1D of GPT-2 stores [in, out] and calls its output size nf.
    return int(module.nf if hasattr(module, "nf") else module.out_features)


def _fused_columns(kind: str, width: int, order: str, n_heads: int) -> Tensor:
    which = ("attn_q", "attn_k", "attn_v").index(kind)
    columns = torch.arange(width)
    if order == "thirds":
        return columns.chunk(3)[which]
    return columns.view(n_heads, 3, -1)[:, which].reshape(-1)


_SELECTOR = re.compile(r"(?:layer(?P<layer>\d+)(?:$|\.(?=.)))?(?P<kind>[a-z_]+)?")


def select_sites(sites: Sequence[NeuronSite], selectors: Sequence[str], argument: str = "modules") -> list[NeuronSite]:
    """Restrict sites to those named: ``"mlp_up"`` (all layers), ``"layer3"`` (all kinds) or ``"layer3.mlp_up"``.

    Raises:
        UserError: If a selector names no site.

    Example:
        >>> sites = [NeuronSite("attn_q", 0, "q", 2), NeuronSite("mlp_up", 0, "u", 4), NeuronSite("mlp_up", 1, "u", 4)]
        >>> [site.key for site in select_sites(sites, ["mlp_up"])]
        [(0, 'mlp_up'), (1, 'mlp_up')]
    """
    chosen: set[tuple[int, str]] = set()
    for selector in selectors:
        match = _SELECTOR.fullmatch(selector)
        found = set()
        if match and selector:
            layer, kind = match["layer"], match["kind"]
            found = {s.key for s in sites if (not layer or s.layer == int(layer)) and (not kind or s.kind == kind)}
        if not found:
            kinds, layers = sorted({s.kind for s in sites}), max((s.layer for s in sites), default=-1)
            raise UserError(argument, selector, f"a kind of {kinds}, 'layerN' with N ≤ {layers}, or 'layerN.kind'")
        chosen |= found
    return [site for site in sites if site.key in chosen]


def transformer_blocks(hf: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks of a model, in order.

    Args:
        hf: A model of an architecture in :data:`~lightning_ssiuu.models.architectures.SITE_TABLES`, or one whose class
            names its blocks for transformers (``_no_split_modules``).

    Raises:
        UserError: If neither tells.

    Example:
        >>> from lightning_ssiuu.models.loading import load_model
        >>> [type(block).__name__ for block in transformer_blocks(load_model("tiny"))][:1]
        ['LlamaDecoderLayer']
    """
    model_type = hf.config.model_type
    if (table := SITE_TABLES.get(model_type)) is not None:
        return list(hf.get_submodule(table.blocks).children())
    names = set(hf._no_split_modules or ())
    if not (blocks := [module for module in hf.modules() if type(module).__name__ in names]):
        raise UserError("checkpoint", model_type, "an architecture whose blocks are known, or strategy ddp")
    return blocks


#: Names of the final norm in the module that holds the blocks.
_NORMS = ("norm", "final_layer_norm", "ln_f")


def final_norm(hf: Any) -> nn.Module:
    """The norm between the last block and the unembedding of a transformers model.

    Raises:
        UserError: If the architecture is not in :data:`~lightning_ssiuu.models.architectures.SITE_TABLES`.

    Example:
        >>> from lightning_ssiuu.models.loading import load_model
        >>> type(final_norm(load_model("tiny"))).__name__
        'LlamaRMSNorm'
    """
    model_type = hf.config.model_type
    if model_type not in SITE_TABLES:
        raise UserError("model", model_type, f"an architecture with a known final norm: {sorted(SITE_TABLES)}")
    base = hf.get_submodule(SITE_TABLES[model_type].blocks.rpartition(".")[0])
    return next(module for name, module in base.named_children() if name in _NORMS)


def neuron_rows(hf: Any, sites: Sequence[NeuronSite], chosen: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """The incoming weights and biases of some neurons.

    Args:
        hf: The transformers model.
        sites: From :func:`lightning_ssiuu.models.architectures.neuron_sites`.
        chosen: ``[n_neurons]`` bool, in the order of the sites.

    Returns:
        Parameters of the sites' modules, each with a mask that broadcasts to it.

    Example:
        >>> from lightning_ssiuu.models.loading import load_model
        >>> from lightning_ssiuu.models.architectures import neuron_sites
        >>> model = load_model("tiny")
        >>> sites = neuron_sites(model)
        >>> chosen = torch.arange(sum(site.width for site in sites)) < 3
        >>> parameter, mask = neuron_rows(model, sites, chosen)[0]
        >>> parameter is model.model.layers[0].self_attn.q_proj.weight, mask.shape[1], int(mask.sum())
        (True, 1, 3)
    """
    by_module: dict[str, Tensor] = {}
    for site, part in zip(sites, chosen.split([site.width for site in sites]), strict=True):
        module = hf.get_submodule(site.module_name)
        n_outputs = module.nf if hasattr(module, "nf") else module.out_features
        rows = by_module.setdefault(site.module_name, torch.zeros(n_outputs, dtype=torch.bool))
        rows[slice(None) if site.columns is None else site.columns] = part
    found = []
    for name, rows in by_module.items():
        module = hf.get_submodule(name)
        # GPT-2's Conv1D has its outputs in columns.
        found.append((module.weight, rows.unsqueeze(0 if hasattr(module, "nf") else 1)))
        if getattr(module, "bias", None) is not None:
            found.append((module.bias, rows))
    return found
