"""Go back towards the original model, after unlearning further than was asked, as far as the run's rule allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_ssiuu.training.shards import cut_like, local, reshard, snapshot, trained_parameters
from lightning_ssiuu.training.weight_average import WeightAverage
from lightning_ssiuu.training.weight_update import WeightUpdate
from lightning_ssiuu.utils.errors import UserError, check_at_least

#: Scales to try, one after the other, where the trimmed or averaged update alone is too little.
_FURTHER = (1.0, 1.25, 1.6, 2.0)


class Walked(NamedTuple):
    """What was left of an update: ``scale`` times it, on the share ``keep`` of weights; whether of the average."""

    scale: float
    keep: float
    averaged: bool = False


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
            before them (with ``ema_decay`` twelve); with ``stopping.elicited`` also the adversary's steps.
        ema_decay: Walk back from an exponential moving average of the weights (:class:`~.weight_average.WeightAverage`)
            with this decay, in [0, 1), where it can meet the rule: what steps do back and forth is not in it. 0 walks
            back from the last step's weights.

    Raises:
        UserError: If an option is outside its range.

    Example:
        >>> WalkBack(overshoot=0.5).keep
        0.3
    """

    overshoot: float = 0.75
    keep: float = 0.3
    looks: int = 10
    ema_decay: float = 0.0

    section: ClassVar[str] = "stopping.walk_back"

    def __post_init__(self) -> None:
        for name in ("overshoot", "keep"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{self.section}.{name}", getattr(self, name), "a share in (0, 1]")
        check_at_least(f"{self.section}.looks", self.looks, 1)
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"{self.section}.ema_decay", self.ema_decay, "a decay in [0, 1)")

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
        average: That run's, as :attr:`state` was.
    """

    def __init__(
        self, options: WalkBack, module: Any, resumed: bool, average: Mapping[str, Tensor] | None = None
    ) -> None:
        self.keep = 1.0 if module.lora is not None else options.keep
        self.looks = options.looks
        self._before: dict[str, Tensor] = {}
        parameters = trained_parameters(module.model)
        self._average = WeightAverage(options.ema_decay, parameters, average) if options.ema_decay > 0 else None
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

    @property
    def state(self) -> dict[str, Tensor] | None:
        """The average, to be saved; None without one."""
        return None if self._average is None else self._average.values

    def after_step(self, module: Any) -> None:
        """Take the weights after a step into the average."""
        if self._average is not None:
            self._average.update(trained_parameters(module.model))

    def updates(self, module: Any) -> list[WeightUpdate]:
        """What training has done to the weights since: to their average, where there is one, and to the last ones."""
        parameters = trained_parameters(module.model)
        ends = [snapshot(parameters.values())]
        if self._average is not None:
            ends.insert(0, self._average.parts)

        def update(after: list[Tensor]) -> WeightUpdate:
            # What is not scaled, the factors A of adapters, is as after training.
            before = [self._before.get(name, end) for name, end in zip(parameters, after, strict=True)]
            return WeightUpdate(list(parameters.values()), before, after)

        return [update(after) for after in ends]

    def walk(self, module: Any, passes: Callable[[], bool]) -> Walked:
        """Put the weights to the smallest update that passes; what it is.

        Each rank must call it, with the weights at the end of training, which pass.
        """
        *averaged, last = self.updates(module)
        shares = sorted({self.keep, 1.0})
        tried = [(update, keep) for update in averaged for keep in shares] + [(last, keep) for keep in shares[:-1]]

        def put(update: WeightUpdate, scale: float, keep: float) -> None:
            reshard(module.model)
            update.put(scale, keep)

        def passing(update: WeightUpdate, scale: float, keep: float) -> bool:
            put(update, scale, keep)
            return passes()

        for update, keep in tried:
            high = next((scale for scale in _FURTHER if passing(update, scale, keep)), None)
            if high is not None:
                break
        else:  # nothing can be left out
            update, keep, high = last, 1.0, 1.0
        low = 0.0
        for _ in range(self.looks):
            scale = (low + high) / 2
            low, high = (low, scale) if passing(update, scale, keep) else (scale, high)
        put(update, high, keep)
        return Walked(high, keep, update is not last)
