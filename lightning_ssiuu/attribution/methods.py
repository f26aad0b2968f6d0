"""The attribution methods by name, for the callback and the audit."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from lightning_ssiuu.attribution.ablation import ablation_attribution
from lightning_ssiuu.attribution.activation_gradient import AttributionMethod, neuron_attribution
from lightning_ssiuu.attribution.integrated_gradients import integrated_gradients
from lightning_ssiuu.attribution.micro_batches import parse_bytes
from lightning_ssiuu.models.answers import Target
from lightning_ssiuu.utils.errors import UserError, check_choice
from lightning_ssiuu.utils.registry import resolve

#: Every method takes model, parts, sites, target and memory_budget, but for what is settled here.
METHODS: dict[str, Any] = {
    "gradient_x_activation": neuron_attribution,
    "log_probability": partial(neuron_attribution, target="log_probability"),
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
    """
    if method is not None and not isinstance(method, str):
        return _checked(method, method, argument)
    prefix = argument.rpartition(".")[0]
    check_choice(f"{prefix}.target".lstrip("."), target, Target)
    if memory_budget is not None:
        memory_budget = parse_bytes(memory_budget, f"{prefix}.memory_budget".lstrip("."))
    function = resolve(method or "gradient_x_activation", METHODS, argument)
    if not callable(function):
        raise UserError(argument, method, f"the import path of a callable, not of a {type(function).__name__}")
    settled = function.keywords if isinstance(function, partial) else {}  # by its author
    options = {"target": target, "memory_budget": memory_budget}
    options = {name: value for name, value in options.items() if name in _parameters(function) - set(settled)}
    return _checked(partial(function, **options), method, argument)


def _parameters(function: Any) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of functions in C
        return set()


def _checked(method: Any, given: object, argument: str) -> AttributionMethod:
    # Called with a model, its parts and its sites; whatever cannot be would fail after the first pass.
    try:
        if inspect.isclass(getattr(method, "func", method)):
            raise TypeError("a class")
        inspect.signature(method).bind("model", "parts", "sites")
    except (TypeError, ValueError) as error:
        name = given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)
        raise UserError(argument, name, f"a callable that takes model, parts and sites ({error})") from error
    return method
