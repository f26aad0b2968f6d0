"""Neuron attribution: activation × gradient of the answer's probability, for all sites from one backward pass.

Source: arXiv 2509.22263, Eq. 1 and Sec. 3. ``A[i, k] = h[i, k] · ∂P(y|x)/∂h[i, k]`` for neuron i at input token k. Per
example the positive influence of a neuron is its maximum over tokens, the negative influence its minimum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lightning_ssiuu.attribution.aggregation import NeuronAttribution
from lightning_ssiuu.attribution.micro_batches import micro_batches
from lightning_ssiuu.models.answers import AnswerModel, Target, input_positions, target_logps
from lightning_ssiuu.models.architectures import WRITERS, NeuronSite
from lightning_ssiuu.models.loading import evaluation_mode
from lightning_ssiuu.models.packing import apart

#: Signature of an attribution method: model, batches (parts of a batch) and sites in, aggregated attributions out.
AttributionMethod = Callable[[AnswerModel, Iterable[Mapping[str, Tensor]], Sequence[NeuronSite]], NeuronAttribution]


def neuron_attribution(
    model: AnswerModel,
    parts: Iterable[Mapping[str, Tensor]],
    sites: Sequence[NeuronSite],
    target: Target = "sequence",
    memory_budget: int | str | None = None,
) -> NeuronAttribution:
    """Attribute the answers' probability to every neuron (arXiv 2509.22263, Eq. 1): one forward, one backward a batch.

    ∂P/∂h is taken as P · ∂log P/∂h, with P applied last, per example, so that a tiny P scales and never underflows
    inside the backward pass. Tokens that are no input to a prediction (the last answer token, padding) do not count.
    The model's ``.grad`` fields, mode and hooks are as before on return, also after an exception.

    Args:
        model: The model; its parameters need not require gradients.
        parts: Batches of ``input_ids, attention_mask, labels``, each ``[B, L]``.
        sites: From :func:`lightning_ssiuu.models.architectures.neuron_sites`.
        target: See :func:`target_logps`.
        memory_budget: Bytes a pass may take beside the weights, as a number or as ``"2GB"``: the examples are batched
            anew to fit (:func:`~lightning_ssiuu.attribution.micro_batches.micro_batches`); None: the parts as they are.

    Returns:
        Aggregates in units of probability (P is in [0, 1]), or of nats per token for ``"log_probability"``; positive
        values push the answer up.

    Raises:
        UserError: If the target is unknown, or the budget is no size or too small for one example.

    Example:
        >>> from lightning_ssiuu.models.loading import load_model
        >>> from lightning_ssiuu.models.architectures import neuron_sites
        >>> model = AnswerModel(load_model("tiny"))
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> part = {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": torch.tensor([[-100, -100, 7, 8]])}
        >>> attribution = neuron_attribution(model, [part], neuron_sites(model.hf))
        >>> attribution.n_examples, bool((attribution.maximum >= attribution.minimum).all())
        (1, True)
    """

    def attribute(part: Mapping[str, Tensor], result: NeuronAttribution) -> None:
        outside = ~input_positions(part["attention_mask"], part["labels"])
        factors = torch.empty(0)

        def reduce_tokens(site: NeuronSite, product: Tensor) -> None:
            result.add_site(site, *extremes(product, outside), factors)

        with torch.enable_grad(), captured(model, sites, reduce_tokens) as start:
            logps = target_logps(model(**part), target)
            factors = result.factors(log_factors(logps, target))
            # Examples do not interact, so the gradient of the sum holds each example's own gradient. Asking for the
            # embeddings' gradient alone leaves the parameters out of the graph walk: no .grad is touched.
            torch.autograd.grad(logps.sum(), start)
        result.count(logps)

    return streamed(model, parts, sites, attribute, memory_budget)


def streamed(
    model: AnswerModel,
    parts: Iterable[Mapping[str, Tensor]],
    sites: Sequence[NeuronSite],
    attribute: Callable[[Mapping[str, Tensor], NeuronAttribution], None],
    memory_budget: int | str | None = None,
    extra: int = 0,
) -> NeuronAttribution:
    """What attribution methods share: evaluation mode, micro-batches on the model's device, aggregates on the CPU.

    ``attribute`` adds one batch to the aggregates; ``extra`` are float32 numbers per token that it keeps beside a
    pass's own. The rest as for :func:`neuron_attribution`.
    """
    device = next(model.parameters()).device
    result = NeuronAttribution.empty(sites, device)
    with evaluation_mode(model):
        for part, is_real in micro_batches(model.hf, parts, sites, memory_budget, extra):
            tensors = {name: part[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
            attribute(tensors, result if is_real else NeuronAttribution.empty(sites, device))
    return result.on_cpu()


def log_factors(logps: Tensor, target: Target) -> Tensor:
    """``[B]`` log of what a gradient of :func:`target_logps` is multiplied with: log P for P, 0 for log P itself."""
    wide = logps.detach().double()
    return torch.zeros_like(wide) if target == "log_probability" else wide


def extremes(values: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima and minima ``[B, width]`` of ``[B, L, width]`` over tokens, without those ``outside``, ``[B, L]`` bool."""
    hidden = outside.unsqueeze(-1)
    return values.masked_fill(hidden, -torch.inf).amax(1), values.masked_fill(hidden, torch.inf).amin(1)


@contextmanager
def captured(
    model: AnswerModel,
    sites: Sequence[NeuronSite],
    receive: Callable[[NeuronSite, Tensor], None],
    scale: float = 1.0,
) -> Iterator[list[Tensor]]:
    """Hooks on embeddings and sites for one pass; gives a list that will hold the tensor to take the gradient for.

    ``receive`` is given a site and its ``[B, L, width]`` activation × gradient, in float32 at least, inside the
    backward pass, so that a gradient lives no longer than its own step. The sites' activations are multiplied with
    ``scale`` on their way on: the activation handed over is the one before, its gradient the one after.
    """
    start: list[Tensor] = []
    by_module: dict[str, list[NeuronSite]] = {}
    for site in sites:
        by_module.setdefault(site.module_name, []).append(site)

    def begin(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_(True)
        start.append(leaf)
        return leaf

    def watch(module_sites: list[NeuronSite], _module: nn.Module, _args: object, output: Tensor) -> Tensor | None:
        # Detached: a hook that held its own tensor would keep it, and the graph behind it, alive for ever.
        kept = output.detach()
        # A block may add to what is written to the residual stream in place.
        activations = [kept.clone() if module_sites[0].kind in WRITERS else kept]
        scaled = output if scale == 1.0 else output * _factors_of(module_sites, output, scale)
        packing = model.packing

        def on_gradient(gradient: Tensor) -> None:
            activation = activations.pop()  # and not kept until the whole graph goes
            wide = torch.promote_types(activation.dtype, torch.float32)
            for site in module_sites:
                receive(site, apart(site.select(activation).to(wide) * site.select(gradient).to(wide), packing))

        scaled.register_hook(on_gradient)
        return None if scaled is output else scaled

    with ExitStack() as hooks:
        hooks.enter_context(model.hf.get_input_embeddings().register_forward_hook(begin))
        for name, module_sites in by_module.items():
            hooks.enter_context(model.hf.get_submodule(name).register_forward_hook(partial(watch, module_sites)))
        yield start


def _factors_of(sites: Sequence[NeuronSite], output: Tensor, scale: float) -> Tensor:
    factors = torch.ones_like(output[0, 0])
    for site in sites:
        factors[slice(None) if site.columns is None else site.columns.to(output.device)] = scale
    return factors
