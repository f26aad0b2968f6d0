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

Floor = float | Literal["mismatched"] | None


class Floored:
    """What objectives with an option ``floor`` have in common; a resumed run goes on with ``measured_floor``."""

    floor: Floor = None
    measured_floor: float | None = None

    @property
    def floor_level(self) -> float | None:
        """The floor in percent; None if there is none, or as long as it is to be measured."""
        return self.measured_floor if isinstance(self.floor, str) else self.floor

    def set_floor(self, floor: Floor) -> None:
        """Take the option; a UserError unless it is a percentage in [0, 100), ``"mismatched"`` or None."""
        if not (floor in (None, "mismatched") or (not isinstance(floor, str) and 0 <= floor < 100)):
            raise UserError("floor", floor, 'a percentage in [0, 100), "mismatched" or null')
        self.floor = floor

    def measure_floor(self, module: UnlearningModule, seed: int) -> None:
        """For ``"mismatched"``: how probable other examples' answers are to the model as it is now, unless known."""
        if self.floor != "mismatched" or self.measured_floor is not None:
            return
        from lightning_ssiuu.evaluation.chance import mismatched_level
        from lightning_ssiuu.evaluation.loaders import batches_of, split_loader
        from lightning_ssiuu.evaluation.scorer import untouched

        with untouched(module.model):
            if (loader := split_loader(module.trainer, "forget")) is None:
                raise UserError("data", None, "an evaluation loader for the forget set, for floor mismatched")
            others = batches_of(module.trainer, "retain")
            level = mismatched_level("probability", module.model, module.tokenizer, loader, seed, others)
        self.measured_floor = level


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
