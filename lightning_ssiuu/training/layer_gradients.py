"""Weight gradients of single layers from their inputs and output gradients, every sequence with a weight of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_ssiuu.training.shards import wide


class Sums:
    """Sums of gradients by parameter, in at least float32; what nothing was added to takes no memory.

    ``tensors`` has one entry per parameter, None where there is no sum yet; it is changed in place.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], tensors: list[Tensor | None]) -> None:
        self._index = {id(p): number for number, p in enumerate(parameters)}
        self.tensors = tensors

    def __contains__(self, parameter: object) -> bool:
        return id(parameter) in self._index

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add a gradient of the parameter's shape, which is not needed elsewhere."""
        number = self._index[id(parameter)]
        if (known := self.tensors[number]) is None:
            self.tensors[number] = wide(gradient)
        else:
            known.add_(gradient)

    def add_product(self, parameter: nn.Parameter, left: Tensor, right: Tensor) -> None:
        """Add ``leftᵀ right`` to a parameter ``[r, c]``: ``[n, r]`` and ``[n, c]`` in the same type."""
        known = self.tensors[self._index[id(parameter)]]
        if known is None or known.dtype != left.dtype:
            self.add(parameter, left.t() @ right)
        else:
            known.addmm_(left.t(), right)

    def add_rows(self, parameter: nn.Parameter, ids: Tensor, rows: Tensor, skipped: int | None) -> None:
        """Add ``rows [n, c]`` to a parameter ``[V, c]`` where ``ids [n]`` say; the row ``skipped`` gets none."""
        known = self.tensors[self._index[id(parameter)]]
        if known is None:
            at = -1 if skipped is None else skipped
            self.add(parameter, torch.ops.aten.embedding_dense_backward(rows, ids, len(parameter), at, False))
            return
        if skipped is not None:
            rows = rows.masked_fill((ids == skipped).unsqueeze(1), 0)
        known.index_put_((ids,), rows.to(known.dtype), accumulate=True)  # deterministic on a GPU too


#: Layer, its input, the gradient δ of its output, weights, sums. The weights are of δ's first dimensions: ``[B, 1]`` of
#: sequences, ``[1, T]`` of the tokens of a row, ``[N]`` of labels.
Rule = Callable[[Any, Tensor, Tensor, Tensor, Sums], None]


def _weighted_pair(x: Tensor, delta: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    # [n, in] and [n, out], the narrower one times the weights, both in δ's type.
    x, delta = x.reshape(-1, x.shape[-1]), delta.reshape(-1, delta.shape[-1])
    if x.shape[1] < delta.shape[1]:
        return (x * weights.unsqueeze(1)).to(delta.dtype), delta
    return x.to(delta.dtype), (delta * weights.unsqueeze(1)).to(delta.dtype)


def _like(weights: Tensor, delta: Tensor) -> Tensor:
    """Weights of the first dimensions as many times as delta has entries."""
    return weights.view(*weights.shape, *[1] * (delta.dim() - weights.dim())).expand_as(delta)


def _linear(layer: Any, x: Tensor, delta: Tensor, weights: Tensor, sums: Sums) -> None:
    weights = _like(weights, delta[..., 0]).reshape(-1)
    if layer.weight in sums:
        x, scaled = _weighted_pair(x, delta, weights)
        sums.add_product(layer.weight, *((x, scaled) if isinstance(layer, Conv1D) else (scaled, x)))
    if layer.bias is not None and layer.bias in sums:
        rows = delta.reshape(-1, delta.shape[-1]).to(torch.promote_types(delta.dtype, torch.float32))
        sums.add(layer.bias, rows.t() @ weights.to(rows.dtype))


def _embedding(layer: Any, ids: Tensor, delta: Tensor, weights: Tensor, sums: Sums) -> None:
    if len(ids) == 1 < len(delta):  # positions, the same for all sequences
        rows = (weights.t().to(delta.dtype) @ delta.flatten(1)).view(delta.shape[1:])
    else:
        rows = (delta * weights.unsqueeze(-1)).to(delta.dtype).flatten(0, 1)
    sums.add_rows(layer.weight, ids.flatten(), rows, layer.padding_idx)


def _scaled_embedding(layer: Any, ids: Tensor, delta: Tensor, weights: Tensor, sums: Sums) -> None:
    _embedding(layer, ids, delta * layer.embed_scale.to(layer.weight.dtype), weights, sums)


def _norm(layer: Any, x: Tensor, delta: Tensor, weights: Tensor, sums: Sums) -> None:
    # Whatever it computes, row by row: its own formula is differentiated, weight · x̂ as (1 + weight) · x̂.
    parameters = [p for p in layer.parameters(recurse=False) if p in sums]
    scaled = (delta * _like(weights, delta)).to(delta.dtype)
    with torch.enable_grad():
        gradients = torch.autograd.grad(layer.forward(x), parameters, scaled)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        sums.add(parameter, gradient)


#: The same for transformers' own layers, of which each architecture has a copy, by the end of their names.
_OF_TRANSFORMERS: dict[str, Rule] = {
    "RMSNorm": _norm,
    "TextScaledWordEmbedding": _scaled_embedding,
    "FalconLinear": _linear,
}
#: Layers whose second gradient is known, by exact type.
LAYERS: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _norm,
    nn.RMSNorm: _norm,
    Conv1D: _linear,
}


def rule_of(layer: nn.Module) -> Rule | None:
    """How a layer's second gradient is formed; None for layers that are not known."""
    kind = type(layer)
    if "forward" in vars(layer):  # somebody has replaced what it computes
        return None
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse):
        return None
    if kind.__module__.startswith("transformers."):
        for ending, rule in _OF_TRANSFORMERS.items():
            if kind.__name__.endswith(ending):
                return rule
    return LAYERS.get(kind)
