"""A floor under forgetting: items that are forgotten already are left out, so that none is pushed further."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.training.perturbation import rows_of, share_of_mean
from lightning_ssiuu.utils.errors import UserError

Floor = float | Literal["threshold"] | None


class Floored:
    """What objectives with an option ``floor`` have in common."""

    floor: Floor = None
    #: Forget probability in percent at which the run ends, from the callback that ends it; None: by no such level.
    stopping_level: float | None = None

    @property
    def floor_level(self) -> float | None:
        """The floor in percent; None if there is none."""
        return self.stopping_level if isinstance(self.floor, str) else self.floor

    def set_floor(self, floor: Floor) -> None:
        """Take the option; a UserError unless it is a percentage in [0, 100), ``"threshold"`` or None."""
        if not (floor in (None, "threshold") or (not isinstance(floor, str) and 0 <= floor < 100)):
            raise UserError("floor", floor, 'a percentage in [0, 100), "threshold" or null')
        self.floor = floor


def above_floor(module: UnlearningModule, batch: Part, rows: Tensor, level: float | None) -> tuple[Part, float]:
    """Those of this rank's ``rows`` whose answer is at least as probable as ``level``, and their weight in the mean.

    ``level`` is in percent of ``exp`` of the mean log-probability per token. Call it within the objective's step
    memory: a loss of the part finds the answers there, without a second forward pass. Each rank must call it.
    """
    chosen, weight = share_of_mean(rows)
    part = rows_of(batch, chosen)
    if not level:
        return part, weight
    answers = module.answers(part)
    above = answers.mean_logps.detach() >= math.log(level / 100)
    chosen, weight = share_of_mean(above[: len(rows)].nonzero().squeeze(1))
    kept = rows_of(part, chosen)
    inside = torch.zeros_like(above).index_fill(0, chosen, True)
    module._step_memory.recall(kept, lambda _: answers.only(inside))
    return kept, weight
