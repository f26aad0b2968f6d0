"""Attributions summed over examples as they stream by, in a scale that tiny probabilities do not underflow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from lightning_ssiuu.models.architectures import NeuronSite
from lightning_ssiuu.utils.distributed import gathered, world_size

# The smallest log-probability whose product with a gradient is no denormal float64; e^-745 is 0.
_SMALLEST_LOG = -600.0


@dataclass
class NeuronAttribution:
    """Attributions of all neurons, aggregated over examples as they stream by.

    The influence variation needs three means per neuron, nothing per example, so memory does not grow with the data.
    Vectors are float64, concatenated over sites in the order of ``sites``.

    An attribution of P carries the factor P, and the P of a long answer may be smaller than any float64. The sums are
    therefore in units of ``e^log_scale``, which is 1 unless all answers seen have log P < −600. What is free of scale
    (an order, a correlation) is to be taken from the sums; the means are in units of P and may underflow to 0.

    Args:
        sites: Where the neurons are.
        maximum: ``[n_neurons]`` sum over examples of max_k A, over ``e^log_scale``.
        positive: ``[n_neurons]`` sum over examples of max(max_k A, 0), over ``e^log_scale``.
        minimum: ``[n_neurons]`` sum over examples of min_k A, over ``e^log_scale``.
        n_examples: Number of examples seen.
        log_probabilities: The target's log-probability of each example (nats).
        highest_log: The largest logarithm of a factor of an example so far (nats).
    """

    sites: Sequence[NeuronSite]
    maximum: Tensor
    positive: Tensor
    minimum: Tensor
    n_examples: int = 0
    log_probabilities: list[float] = field(default_factory=list)
    highest_log: float = -math.inf
    _starts: dict[tuple[int, str], int] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def empty(cls, sites: Sequence[NeuronSite], device: torch.device | str = "cpu") -> NeuronAttribution:
        zeros = torch.zeros(sum(site.width for site in sites), dtype=torch.float64, device=device)
        return cls(sites, zeros.clone(), zeros.clone(), zeros.clone())

    def factors(self, logs: Tensor) -> Tensor:
        """``[B]`` factors ``e^(logs − log_scale)``, after the scale has been made to fit them; see :meth:`add_site`."""
        logs = logs.detach().to(self.maximum)
        before, empty = self.log_scale, self.highest_log == -math.inf
        self.highest_log = max(self.highest_log, logs.max().item())
        if before != self.log_scale and not empty:
            for total in (self.maximum, self.positive, self.minimum):
                total *= math.exp(before - self.log_scale)
        return (logs - self.log_scale).exp()

    def add_site(self, site: NeuronSite, high: Tensor, low: Tensor, factors: Tensor) -> None:
        """Add one site's ``[B, width]`` maxima and minima over tokens, times the examples' ``[B]`` factors."""
        high = high.to(self.maximum) * factors.unsqueeze(-1)
        self._part(self.maximum, site).add_(high.sum(0))
        self._part(self.positive, site).add_(high.clamp_(min=0).sum(0))
        self._part(self.minimum, site).add_(factors @ low.to(self.minimum))

    def count(self, logps: Tensor) -> None:
        """Count a batch whose sites have been added one by one, with its ``[B]`` log-probabilities."""
        self.n_examples += len(logps)
        self.log_probabilities += logps.detach().double().tolist()

    @property
    def log_scale(self) -> float:
        """Logarithm of the unit of the sums: 0 unless the largest factor of all examples is below e^−600."""
        return self.highest_log if -math.inf < self.highest_log < _SMALLEST_LOG else 0.0

    @property
    def mean_maximum(self) -> Tensor:
        return self._mean(self.maximum)

    @property
    def mean_positive(self) -> Tensor:
        return self._mean(self.positive)

    @property
    def mean_minimum(self) -> Tensor:
        return self._mean(self.minimum)

    def over_ranks(self) -> NeuronAttribution:
        """The same with the examples of all ranks, when there are several (each rank must call it)."""
        if world_size() == 1:
            return self
        total = NeuronAttribution.empty(self.sites)
        total.highest_log = max(gathered(self.highest_log))
        own = math.exp(self.log_scale - total.log_scale)
        shares = gathered((self.maximum * own, self.positive * own, self.minimum * own, self.n_examples))
        sums = (sum(values) for values in zip(*shares, strict=True))
        total.maximum, total.positive, total.minimum, total.n_examples = sums
        total.log_probabilities = [value for share in gathered(self.log_probabilities) for value in share]
        return total

    def by_site(self, values: Tensor) -> dict[tuple[int, str], Tensor]:
        """Cut a ``[n_neurons]`` vector into the sites' parts."""
        return dict(zip([s.key for s in self.sites], values.split([s.width for s in self.sites]), strict=True))

    def on_cpu(self) -> NeuronAttribution:
        self.maximum, self.positive, self.minimum = self.maximum.cpu(), self.positive.cpu(), self.minimum.cpu()
        return self

    def _mean(self, total: Tensor) -> Tensor:
        return total * (math.exp(self.log_scale) / max(self.n_examples, 1))

    def _part(self, values: Tensor, site: NeuronSite) -> Tensor:
        if len(self._starts) != len(self.sites):
            starts = accumulate((s.width for s in self.sites), initial=0)
            self._starts = dict(zip([s.key for s in self.sites], starts, strict=False))
        start = self._starts[site.key]
        return values[start : start + site.width]
