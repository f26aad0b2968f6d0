"""Sampled texts that depend on their own random numbers and on nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """How one text is sampled.

    Args:
        key: What its random numbers follow from, whole numbers ≥ 0: seed, example and number of the sample.
        temperature: Divides the logits, ≥ 0; 0 is greedy decoding.
        top_p: Sample from the smallest set of tokens whose probabilities sum to at least this; None: from all.
    """

    key: tuple[int, ...]
    temperature: float = 1.0
    top_p: float | None = None

    def uniforms(self, n: int) -> Tensor:
        """``[n]`` float64 in [0, 1), a number for each token; the first ones are the same for every ``n``."""
        return torch.from_numpy(np.random.default_rng(self.key).random(n))

    def seed(self) -> int:
        """One number in the place of :meth:`uniforms`, for an engine that draws by itself."""
        return int(np.random.SeedSequence(self.key).generate_state(1)[0])


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float | None = None) -> Tensor:
    """The token that a random number falls on, in the cumulative distribution over the vocabulary in its order.

    Logits ``[B, V]`` and numbers ``[B]`` in [0, 1) in, token ids ``[B]`` out; temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    wide = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    # The largest becomes 0 first: a tiny temperature then leaves it alone instead of overflowing.
    probabilities = ((wide - wide.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probabilities = probabilities.scatter(1, order, ordered.masked_fill(before >= top_p, 0.0))
    cumulative = probabilities.cumsum(-1)
    reached = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    return (cumulative <= reached).sum(-1).clamp(max=logits.shape[-1] - 1)
