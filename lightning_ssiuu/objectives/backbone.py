"""Which objectives can lend their losses to another one."""

from __future__ import annotations

import inspect
from typing import Any

from lightning_ssiuu.models.answers import Reduction
from lightning_ssiuu.utils.errors import UserError, check_choice

_LENT = ("forget_weight", "retain_weight", "retain", "reference", "reduction")


def take_options(objective: Any, backbone: Any, base: type) -> None:
    """Give an objective the options of its backbone's losses, after a check that it can be one.

    ``base`` is the class whose constructor has their defaults.

    Raises:
        UserError: If the backbone has a regulariser, cannot be one, or an option of it was given to the objective.
    """
    if backbone.regularizer is not None:
        given = type(backbone.regularizer).__name__
        raise UserError("backbone.regularizer", given, f"none: give it to {type(objective).__name__}")
    if not backbone.can_be_backbone:
        raise UserError("backbone", type(backbone).__name__, "an objective that is its losses alone, such as NPO")
    defaults = inspect.signature(base).parameters
    for name in _LENT:
        value, own = getattr(objective, name), getattr(backbone, name)
        if value not in (own, defaults[name].default):
            raise UserError(name, value, "unset beside a backbone: give it to the backbone")
        setattr(objective, name, own)
    check_reduction(objective, "backbone.reduction")


def check_reduction(objective: Any, argument: str = "reduction") -> None:
    """Raise a UserError unless the objective's ``reduction`` is known and one that its losses can be."""
    check_choice(argument, objective.reduction, Reduction)
    if objective.reduction == "token" and not objective.takes_token_means:
        raise UserError(argument, "token", f'"sequence", the default: {type(objective).__name__} weighs sequences')
