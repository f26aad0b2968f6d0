"""An exponential moving average of the weights that are trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_ssiuu.training.shards import blocks, local, local_state, wide


class WeightAverage:
    """``ā ← d ā + (1 − d) θ`` after every step, in at least float32; at first θ itself.

    What steps do back and forth is not in it (arXiv 1803.05407). It is held where the weights are, under FSDP2 as
    shards.

    Args:
        decay: d, in [0, 1).
        parameters: The trained weights by name.
        values: The average of an interrupted run, as :attr:`values` was; None begins with the weights.
    """

    def __init__(
        self, decay: float, parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor] | None = None
    ) -> None:
        self.decay = decay
        if values is None:
            values = {name: wide(p).clone() for name, p in parameters.items()}
        self.values, self.parts = local_state(values, parameters)

    def update(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the weights as they are now into the average; the names are those it began with."""
        weights = [local(parameters[name].detach()) for name in self.values]
        for average, now in blocks(self.parts, weights):
            torch._foreach_lerp_(average, [wide(value) for value in now], 1 - self.decay)
