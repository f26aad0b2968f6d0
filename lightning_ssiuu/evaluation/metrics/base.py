"""What the metrics of this package share: wide sums whatever the model's precision, and lists that ranks can lack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_ssiuu.models.answers import sequence_sums


class WideMetric(Metric):
    """A metric whose states stay in float64 (float32 on MPS) when the module that holds it is cast."""

    is_differentiable = False
    higher_is_better: bool | None = None  # depends on the set: forget or retain
    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        # A module that is cast to bf16 casts its metrics too, and a bf16 sum stops growing at 256
        def keep_dtype(tensor: Tensor) -> Tensor:
            try:
                moved = fn(tensor)
            except TypeError:  # to MPS, which has no float64
                moved = fn(tensor.float())
            if not moved.is_floating_point():
                return moved
            return tensor.to(moved.device, widest_float(moved.device)) if moved.dtype != tensor.dtype else moved

        return super()._apply(keep_dtype, exclude_state)


class Percentage(WideMetric):
    """Mean of per-example values, times 100: a sum and a count, so uneven batches and ranks weigh every example once.

    Without any example it is NaN (torchmetrics also warns): 0 would read as "all forgotten".
    """

    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 100.0

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def values(self, *args: Any, **kwargs: Any) -> Tensor:
        """Fractions by example, ``[B]``, of the arguments of ``update``: what is averaged."""
        raise NotImplementedError(f"{type(self).__name__} has no values by example")

    def update(self, *args: Any, **kwargs: Any) -> None:
        self._add(self.values(*args, **kwargs))

    def _add(self, values: Tensor) -> None:
        # Not in place: a state made in inference mode could then not be updated outside it
        self.total = self.total + values.detach().to(self.total).sum()
        self.count = self.count + values.numel()

    def compute(self) -> Tensor:
        return 100 * self.total / self.count


class KeptValues(WideMetric):
    """A metric of all values at once, which have to be kept in lists of these names (8 bytes each)."""

    def __init__(self, *names: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._names = names
        for name in names:
            self.add_state(name, [], dist_reduce_fx="cat")

    def _keep(self, name: str, values: Tensor) -> None:
        getattr(self, name).append(values.to(self.device, widest_float(self.device), copy=True))

    def _kept(self, name: str) -> Tensor:
        values = getattr(self, name)  # a list, or after the ranks' lists were joined a tensor
        if isinstance(values, list) and not values:
            return torch.zeros(0, device=self.device, dtype=widest_float(self.device))
        return dim_zero_cat(values)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # torchmetrics sends float32 for a rank without values, which does not fit the others' float64
        for name in self._names:
            setattr(self, name, [self._kept(name)])
        super()._sync_dist(*args, **kwargs)


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype sums are kept in: float64, or float32 on Apple's MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def first_of_each(rows: Tensor) -> Tensor:
    """Which entries are the first of their row: ``[N]`` bool, of ``[N]`` row numbers; equal ones are neighbours."""
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = rows[1:] != rows[:-1]
    return first


def sequence_means(values: Tensor, sequence_index: Tensor, n_sequences: int) -> Tensor:
    """Mean of ``[N]`` per-token values within each sequence: ``[B]`` float64, NaN for a row without tokens."""
    wide = values.to(widest_float(values.device))
    counts = sequence_sums(torch.ones_like(wide), sequence_index, n_sequences)
    return sequence_sums(wide, sequence_index, n_sequences) / counts
