"""DeepSpeed ZeRO: load into its shards, and read and change the gradients that its engine keeps to itself.

DeepSpeed takes a parameter's gradient away as soon as it is complete, sums it over the ranks and keeps a share of it; a
second backward pass through the same weights it counts as an error. So the extra gradient of a regulariser is taken
past the engine, and the engine's own gradients are put together, shown, and handed back.

Everything here is done through DeepSpeed's public functions (``deepspeed.utils.safe_get_full_grad``, ...), which know
whole weights only. For the moment of an optimiser step each device therefore holds all trained weights and gradients:
FSDP2 is the strategy that keeps a regulariser's state cut over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_zero(model: nn.Module) -> bool:
    """Whether DeepSpeed's engine (stage 1, 2 or 3) has taken over this model's gradients.

    Example:
        >>> is_zero(nn.Linear(2, 2))
        False
    """
    return any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model.parameters())


def is_partitioned(model: nn.Module) -> bool:
    """Whether the weights themselves are cut over the ranks (stage 3).

    Example:
        >>> is_partitioned(nn.Linear(2, 2))
        False
    """
    return any(hasattr(p, "ds_id") for p in model.parameters())


def own_gradients(total: Tensor, parameters: Sequence[nn.Parameter], model: nn.Module) -> list[Tensor]:
    """This rank's ``∂total/∂φ``, whole, past the engine's hooks; the graph can be differentiated again.

    Args:
        total: A scalar.
        parameters: With respect to what; zero where ``total`` does not depend on one.
        model: The model they belong to.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> own_gradients(layer(torch.ones(1, 2)).sum(), [layer.weight], layer), layer.weight.grad
        ([tensor([[1., 1.]])], None)
    """
    # Of all, whoever asks: a backward pass that leaves layers out would leave them without their weights in the next.
    trained = [p for p in model.parameters() if p.requires_grad]
    with _passes_uncounted(model):
        gradients = torch.autograd.grad(total, trained, retain_graph=True, allow_unused=True)
    by_parameter = dict(zip(trained, gradients, strict=True))
    return [
        # A partitioned parameter is empty outside its layer; ds_shape is what it is when whole.
        torch.zeros(getattr(p, "ds_shape", p.shape), dtype=p.dtype, device=p.device) if g is None else g
        for p, g in ((p, by_parameter[p]) for p in parameters)
    ]


@contextmanager
def _passes_uncounted(model: nn.Module) -> Iterator[None]:
    """Inside, a backward pass is none of those that stage 3 expects: one per forward pass through a layer.

    It would not fetch a layer's weights for more, nor give them back.
    """
    names = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
    counts = [(vars(m), name, vars(m)[name]) for m in model.modules() for name in names if name in vars(m)]
    try:
        yield
    finally:
        for attributes, name, count in counts:
            attributes[name] = count


@contextmanager
def whole_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, every trained parameter is whole and has its reduced gradient in ``.grad``, on every rank.

    What was done to ``.grad`` is handed back to the engine, in the parameter's type; changes to the weights are lost.
    Does nothing for a model that is not DeepSpeed's. Every rank must enter.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> with whole_gradients(layer):
        ...     layer.weight.grad is None
        True
    """
    if not is_zero(model):
        yield
        return
    import deepspeed
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in trained if p.grad is None]  # stage 1 may leave some in sight
    gradients = [safe_get_full_grad(p) for p in hidden]
    with deepspeed.zero.GatheredParameters(trained, enabled=is_partitioned(model)):
        for parameter, gradient in zip(hidden, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        try:
            yield
        finally:
            changed = [p.grad for p in hidden]
            for parameter in hidden:
                parameter.grad = None
    for parameter, gradient in zip(hidden, changed, strict=True):
        safe_set_full_grad(parameter, gradient)


@contextmanager
def loading(strategy: Any) -> Iterator[None]:
    """Inside, ``from_pretrained`` gives each rank its share of the weights, where ``strategy`` is ZeRO stage 3.

    Lightning has every module partitioned the moment it is made, before transformers, unless told, can fill it.

    Args:
        strategy: The Trainer's; any but stage 3 changes nothing. None for no Trainer.

    Example:
        >>> with loading(None):
        ...     pass
    """
    if not getattr(strategy, "zero_stage_3", False):
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    announced = HfDeepSpeedConfig(strategy.config)  # transformers looks for it as long as it is alive
    yield
    del announced


@contextmanager
def small_layers(strategy: Any) -> Iterator[None]:
    """Inside, new modules stay whole, to be initialised by whoever makes them; the engine partitions them later.

    Args:
        strategy: As for :func:`loading`.

    Example:
        >>> with small_layers(None):
        ...     pass
    """
    if not getattr(strategy, "zero_stage_3", False):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()
