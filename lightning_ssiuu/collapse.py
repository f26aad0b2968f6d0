"""Directions of activations and gradients that a whole set has in common, and layers that leave them out (for CIR)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_ssiuu.functional.representation import CollapsedLinear, common_directions
from lightning_ssiuu.models.answers import AnswerModel, input_positions
from lightning_ssiuu.models.architectures import neuron_sites
from lightning_ssiuu.training.shards import wide

Part = Mapping[str, Tensor]
#: By name of a linear layer an orthonormal basis ``[K, in]`` for its inputs and one ``[K', out]`` for its gradients.
Bases = dict[str, tuple[Tensor, Tensor]]


def linear_layers(hf: PreTrainedModel, attention: bool = False) -> list[str]:
    """Names of the feed-forward projections whose weights train, on request also attention's.

    Args:
        hf: A model whose architecture is in :data:`~lightning_ssiuu.models.architectures.SITE_TABLES`.
        attention: Whether to name attention's as well.

    Raises:
        UserError: If it is not.

    Example:
        >>> from lightning_ssiuu.models.loading import load_model
        >>> linear_layers(load_model("tiny"))[:2]
        ['model.layers.0.mlp.gate_proj', 'model.layers.0.mlp.up_proj']
    """
    sites = [site for site in neuron_sites(hf) if attention or site.kind.startswith("mlp")]
    names = dict.fromkeys(site.module_name for site in sites)  # a fused projection has several kinds
    return [name for name in names if cast(Tensor, hf.get_submodule(name).weight).requires_grad]


@contextmanager
def collapsed(hf: PreTrainedModel, bases: Bases) -> Iterator[None]:
    """Inside, forward passes build a graph whose weight gradients leave the bases' directions out.

    Nothing else about the layers changes, and nothing of it stays, also after an exception.

    Args:
        hf: The model.
        bases: By layer.
    """
    layers: list[Any] = [hf.get_submodule(name) for name in bases]
    try:
        for layer, (of_inputs, of_gradients) in zip(layers, bases.values(), strict=True):
            layer.forward = partial(_collapsed_forward, layer, of_inputs, of_gradients)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def find_common_directions(
    model: AnswerModel,
    loss: Callable[[Part], Tensor],
    parts: Iterable[Part],
    names: Iterable[str],
    n_of_inputs: int,
    n_of_gradients: int,
) -> Bases:
    """Means and principal components of what goes into linear layers, and of the gradients of what comes out.

    Tokens that are no input to a prediction do not count; each sequence weighs the same, however the batches are cut.
    The model's ``.grad`` fields and hooks are as before on return, also after an exception.

    Args:
        model: The model.
        loss: Of a part, a mean over its sequences.
        parts: All examples, in batches of ``input_ids, attention_mask, labels``.
        names: The layers.
        n_of_inputs: Principal components of inputs; 0 gives an empty basis.
        n_of_gradients: Of gradients.

    Returns:
        Bases on the model's device. For the time of the call the host's memory holds all inputs and gradients.
    """
    names = list(names)
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    pushed: dict[str, list[Tensor]] = {name: [] for name in names}
    for part in parts:
        where = input_positions(part["attention_mask"], part["labels"])
        with torch.enable_grad(), _watched(model, names, where, seen, pushed) as start:
            total = loss(part) * len(where)
            torch.autograd.grad(total, start)  # of the embeddings' output alone: no parameter's .grad is touched
    device = next(model.parameters()).device

    def basis(rows: list[Tensor], components: int) -> Tensor:
        return common_directions(torch.cat(rows), components).to(device)

    return {name: (basis(seen.pop(name), n_of_inputs), basis(pushed.pop(name), n_of_gradients)) for name in names}


@contextmanager
def _watched(
    model: AnswerModel,
    names: list[str],
    where: Tensor,
    seen: dict[str, list[Tensor]],
    pushed: dict[str, list[Tensor]],
) -> Iterator[list[Tensor]]:
    start: list[Tensor] = []

    def begin(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        start.append(output.detach().requires_grad_(True))
        return start[-1]

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name].append(wide(args[0])[where].cpu())
            output.register_hook(lambda gradient: pushed[name].append(wide(gradient)[where].cpu()))

        return hook

    handles = []
    try:
        handles.append(model.hf.get_input_embeddings().register_forward_hook(begin))
        handles += [model.hf.get_submodule(name).register_forward_hook(watch(name)) for name in names]
        yield start
    finally:
        for handle in handles:
            handle.remove()


def _collapsed_forward(layer: Any, of_inputs: Tensor, of_gradients: Tensor, inputs: Tensor) -> Tensor:
    transposed = isinstance(layer, Conv1D)
    return CollapsedLinear.apply(inputs, layer.weight, layer.bias, of_inputs, of_gradients, transposed)
