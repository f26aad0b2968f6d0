"""Go back towards the original model, after unlearning further than was asked, as far as the run's rule allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_ssiuu.training.shards import cut_like, local, reshard, trained_parameters
from lightning_ssiuu.training.weight_update import WeightUpdate
from lightning_ssiuu.utils.errors import UserError, check_at_least

#: Scales to try, one after the other, where the trimmed update alone is too little.
_FURTHER = (1.0, 1.25, 1.6, 2.0)


@dataclass
class WalkBack:
    """Options of unlearning further than the threshold and walking back to it.

    Training goes on to ``overshoot`` times the threshold. Then the update is trimmed to its largest coordinates and
    scaled to the smallest size with which the run still meets its rule: the threshold, and with ``stopping.elicited``
    what comes back to the adversary, too. At the same forget score this keeps more of what the model knew. Too much of
    it hides: the further the run goes and the more is trimmed, the more an attack brings back.

    Args:
        overshoot: Share of the threshold at which training ends, in (0, 1].
        keep: Share of the trained weights whose change is kept, the largest ones, in (0, 1]. With adapters all are: the
            numbers of a factor are no weights; so they are where the largest ones are too little.
        looks: Halvings in the search for the size, ≥ 1. Each takes one scoring of the forget set, and up to four come
            before them; with ``stopping.elicited`` also the adversary's steps.

    Raises:
        UserError: If an option is outside its range.

    Example:
        >>> WalkBack(overshoot=0.5).keep
        0.3
    """

    overshoot: float = 0.75
    keep: float = 0.3
    looks: int = 10

    section: ClassVar[str] = "stopping.walk_back"

    def __post_init__(self) -> None:
        for name in ("overshoot", "keep"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{self.section}.{name}", getattr(self, name), "a share in (0, 1]")
        check_at_least(f"{self.section}.looks", self.looks, 1)

    def check(self, module: Any) -> None:
        """Refuse a module whose adapters cannot be walked back."""
        if module.lora is not None and module.lora.is_dora:
            raise UserError("lora.options.use_dora", True, f"false with {self.section}: B alone is no update then")


class WayBack:
    """The weights that one run began with, and the way to them.

    With adapters those are the same ones with B at zero: the update is scaled with B. A resumed run's are built again,
    which a model that is trained ``in_place`` cannot be.

    Args:
        options: How far.
        module: The objective that is trained.
        resumed: Whether its weights are an interrupted run's.
    """

    def __init__(self, options: WalkBack, module: Any, resumed: bool) -> None:
        self.keep = 1.0 if module.lora is not None else options.keep
        self.looks = options.looks
        self._before: dict[str, Tensor] = {}
        parameters = trained_parameters(module.model)
        if module.lora is not None:
            factors = {name: p for name, p in parameters.items() if ".lora_B." in name}
            self._before = {name: torch.zeros_like(local(p.detach())) for name, p in factors.items()}
            return
        if not resumed:
            self._before = {name: local(p.detach()).to("cpu", copy=True) for name, p in parameters.items()}
            return
        original = dict(module.build(torch.device("cpu")).named_parameters())
        for name, p in parameters.items():
            self._before[name] = cut_like(original[name].detach().to(p.dtype), p).cpu()

    def update(self, module: Any) -> WeightUpdate:
        """What training has done to the weights since."""
        parameters = trained_parameters(module.model)
        return WeightUpdate([parameters[name] for name in self._before], list(self._before.values()))

    def walk(self, module: Any, passes: Callable[[], bool]) -> tuple[float, float]:
        """Put the weights to the smallest update that passes; its scale and the share of weights that it changes.

        Each rank must call it, with the weights at the end of training, which pass.
        """
        update = self.update(module)

        def put(scale: float, keep: float) -> None:
            reshard(module.model)
            update.put(scale, keep)

        def passing(scale: float, keep: float) -> bool:
            put(scale, keep)
            return passes()

        keep, high = self.keep, None
        if keep < 1:
            high = next((scale for scale in _FURTHER if passing(scale, keep)), None)
        if high is None:  # nothing can be left out
            keep, high = 1.0, 1.0
        low = 0.0
        for _ in range(self.looks):
            scale = (low + high) / 2
            low, high = (low, scale) if passing(scale, keep) else (scale, high)
        put(high, keep)
        return high, keep
