"""Attribution methods of one's own that need activations alone: a function of a few lines, and a decorator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from lightning_ssiuu.attribution.activation_gradient import extremes, streamed
from lightning_ssiuu.attribution.aggregation import NeuronAttribution
from lightning_ssiuu.models.answers import AnswerModel, Target, input_positions, target_logps
from lightning_ssiuu.models.architectures import NeuronSite
from lightning_ssiuu.models.packing import apart

#: From a site's activations ``[B, L, width]`` and the tokens that count ``[B, L, 1]`` to ``[B, width]`` or per token.
Value = Callable[[Tensor, Tensor], Tensor]


def from_activations(value: Value) -> partial[NeuronAttribution]:
    """Make an attribution method of a function of activations; it takes forward passes and no gradients.

    Args:
        value: Is given the activations of one site, ``[B, L, width]`` in float32 at least, and which tokens are inputs
            to the prediction of an answer, ``[B, L, 1]`` bool. Returns one value per example, ``[B, width]``, which is
            its maximum and its minimum, or one per token, ``[B, L, width]``, of which both are taken.

    Returns:
        A method with the parameters of :func:`~lightning_ssiuu.attribution.activation_gradient.neuron_attribution`;
        ``memory_budget`` cuts the batches, ``target`` says what probability is reported beside the values.

    Example:
        >>> from lightning_ssiuu.models.architectures import neuron_sites
        >>> from lightning_ssiuu.models.loading import load_model
        >>> model, ids = AnswerModel(load_model("tiny")), torch.tensor([[5, 6, 7, 8]])
        >>> part = {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": torch.tensor([[-100, -100, 7, 8]])}
        >>> @from_activations
        ... def activation(values, counted):
        ...     return (values.abs() * counted).sum(1) / counted.sum(1)
        >>> bool((activation(model, [part], neuron_sites(model.hf)).mean_minimum >= 0).all())
        True
    """
    return partial(_forward, value)


def _forward(
    value: Value,
    model: AnswerModel,
    parts: Iterable[Mapping[str, Tensor]],
    sites: Sequence[NeuronSite],
    target: Target = "sequence",
    memory_budget: int | str | None = None,
) -> NeuronAttribution:
    @torch.no_grad()
    def attribute(part: Mapping[str, Tensor], result: NeuronAttribution) -> None:
        counted = input_positions(part["attention_mask"], part["labels"])
        factors = result.factors(torch.zeros(len(counted)))

        def hook(site: NeuronSite, _module: nn.Module, _args: object, output: Tensor) -> None:
            wide = torch.promote_types(output.dtype, torch.float32)
            values = value(apart(site.select(output).to(wide), model.packing), counted.unsqueeze(-1))
            high, low = extremes(values, ~counted) if values.ndim == 3 else (values, values)
            result.add_site(site, high, low, factors)

        with ExitStack() as hooks:
            for site in sites:
                module = model.hf.get_submodule(site.module_name)
                hooks.enter_context(module.register_forward_hook(partial(hook, site)))
            result.count(target_logps(model(**part), target))

    return streamed(model, parts, sites, attribute, memory_budget)
