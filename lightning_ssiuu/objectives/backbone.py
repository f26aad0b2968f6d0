"""Which objectives can lend their losses to another one, and the training examples that losses are prepared on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.datamodules.encoding import EncodedDataset
from lightning_ssiuu.models.answers import Part, Reduction
from lightning_ssiuu.utils.errors import UserError, check_choice

#: All training examples of ``"forget"`` or ``"retain"``, in their order, each time it is called.
Parts = Callable[[str], Iterator[Part]]
#: Weights and losses, by name.
Kept = dict[str, tuple[float, Tensor]]

_LENT = ("forget_weight", "retain_weight", "retain", "reference", "reduction")


def parts_in_order(loader: Any, name: str, batch_size: int, device: torch.device, asked_by: str) -> Iterator[Part]:
    """All training examples of a part in their order, in batches on a device.

    Raises:
        UserError: If the loader is not one of an UnlearningDataModule; ``asked_by`` is what needs one.
    """
    if not isinstance(getattr(loader, "dataset", None), EncodedDataset):
        raise UserError("data", type(loader).__name__, f"an UnlearningDataModule, for {asked_by}")
    for part in loader.dataset.in_order(name, batch_size, loader.collate_fn):
        yield {field: value.to(device) for field, value in part.items()}


def values_of(kept: Kept) -> dict[str, Tensor]:
    """The losses without their weights."""
    return {name: value for name, (_, value) in kept.items()}


def check_reads_part_alone(objective: Any) -> None:
    """Raise a UserError if the backbone's forget loss reads other texts than a part's: an objective sees that one's."""
    backbone = objective.backbone
    if not backbone.reads_part_alone:
        allowed = f"an objective whose loss is of the forget answers alone, for {type(objective).__name__}"
        raise UserError("backbone", type(backbone).__name__, allowed)


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
