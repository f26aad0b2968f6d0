"""The attribution methods by name, for the callback and the audit."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_ssiuu.attribution.ablation import ablation_attribution
from lightning_ssiuu.attribution.activation_gradient import AttributionMethod, neuron_attribution
from lightning_ssiuu.attribution.aggregation import NeuronAttribution
from lightning_ssiuu.attribution.integrated_gradients import integrated_gradients
from lightning_ssiuu.attribution.micro_batches import parse_bytes
from lightning_ssiuu.models.answers import AnswerModel, Target
from lightning_ssiuu.models.architectures import NeuronSite
from lightning_ssiuu.utils.errors import UserError, check_choice
from lightning_ssiuu.utils.registry import resolve


def log_probability_attribution(
    model: AnswerModel,
    parts: Iterable[Mapping[str, Tensor]],
    sites: Sequence[NeuronSite],
    target: Target = "log_probability",
    memory_budget: int | str | None = None,
) -> NeuronAttribution:
    """Activation × gradient of log P(y|x) / T, in nats per token: not weighed with P, whatever ``target`` is given."""
    return neuron_attribution(model, parts, sites, "log_probability", memory_budget)


#: Every method takes model, parts, sites, target and memory_budget.
METHODS: dict[str, Any] = {
    "gradient_x_activation": neuron_attribution,
    "log_probability": log_probability_attribution,
    "integrated_gradients": integrated_gradients,
    "joint_integrated_gradients": partial(integrated_gradients, path="joint"),
    "ablation": ablation_attribution,
}


def attribution_method(
    method: str | AttributionMethod | None = None,
    target: Target = "sequence",
    memory_budget: int | str | None = None,
    argument: str = "method",
) -> AttributionMethod:
    """The method of a name, for a target and within a memory budget; a callable is passed on as it is.

    Args:
        method: A key of :data:`METHODS`, or the import path of a callable with the signature of
            :data:`~lightning_ssiuu.attribution.activation_gradient.AttributionMethod`, which is given ``target`` and
            ``memory_budget`` where it has such parameters; or a callable, which has its own; None: activation ×
            gradient.
        target: See :func:`~lightning_ssiuu.models.answers.target_logps`.
        memory_budget: Bytes a pass may take beside the weights, or ``"2GB"``.
        argument: What the user calls ``method``.

    Raises:
        UserError: If there is no such method or target, or the budget is no size.

    Example:
        >>> attribution_method("ablation", "length_normalised").func.__name__
        'ablation_attribution'
        >>> attribution_method("ablaton")
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: method: got 'ablaton', allowed: one of ['gradient_x_activation', \
'log_probability', 'integrated_gradients', 'joint_integrated_gradients', 'ablation'], or an import path \
(did you mean 'ablation'?)
    """
    if method is not None and not isinstance(method, str):
        return method
    prefix = argument.rpartition(".")[0]
    check_choice(f"{prefix}.target".lstrip("."), target, Target)
    if memory_budget is not None:
        memory_budget = parse_bytes(memory_budget, f"{prefix}.memory_budget".lstrip("."))
    found = resolve(method or "gradient_x_activation", METHODS, argument)
    if not callable(found):
        raise UserError(argument, method, f"the import path of a callable, not of a {type(found).__name__}")
    own = found.keywords if isinstance(found, partial) else {}  # what its author has settled
    options = {"target": target, "memory_budget": memory_budget}
    parameters = inspect.signature(found).parameters
    return partial(found, **{name: value for name, value in options.items() if name in parameters and name not in own})
