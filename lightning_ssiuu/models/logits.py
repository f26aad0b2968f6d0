"""Log-probabilities of answer tokens without all their logits at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: Bytes of logits, in float32, up to which they are computed at once: 5,461 answer tokens of a vocabulary of 49,152.
LOGIT_BYTES = 1 << 30
#: A piece is this much smaller; it exists up to three times while its log-probabilities are computed.
_PIECES = 8


@dataclass(eq=False)  # in which FSDP2 finds the tensors before whose backward pass it has to gather the weights
class ChunkedLogits:
    """The logits ``[N, V]`` that a head makes of hidden states ``[N, H]``, never all at once unless asked for.

    The backward pass makes each piece again, which costs one more product with the head's weight.

    Args:
        hidden: ``[N, H]``.
        head: The unembedding (:meth:`fits`).
        targets: ``[N]`` the tokens whose log-probabilities are asked for.
        logit_bytes: What all logits exceed.

    Attributes:
        token_logps: ``[N]`` nats, in float32 or wider.
        best: ``[N]`` the most probable tokens.
        peaks: ``[N]`` their logits.

    Example:
        >>> hidden, head, targets = torch.eye(3), nn.Linear(3, 5), torch.tensor([0, 1, 4])
        >>> pieces, whole = ChunkedLogits(hidden, head, targets, logit_bytes=40), head(hidden)
        >>> torch.allclose(pieces.token_logps, whole.log_softmax(-1)[torch.arange(3), targets], atol=1e-6)
        True
        >>> torch.equal(pieces.best, whole.argmax(-1))
        True
    """

    hidden: Tensor
    head: nn.Linear
    targets: Tensor
    logit_bytes: int = LOGIT_BYTES
    token_logps: Tensor = field(init=False)
    best: Tensor = field(init=False)
    peaks: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows = max(1, _rows(self.head, self.logit_bytes) // _PIECES)
        found = _TokenLogps.apply(self.hidden, self.head.weight, self.head.bias, self.targets, rows)
        self.token_logps, self.best, self.peaks = found

    @staticmethod
    def fits(head: Any, n: int, logit_bytes: int) -> bool:
        """Whether ``n`` rows of logits exceed the bytes, and a head is one matrix product and nothing else."""
        return type(head) is nn.Linear and head.weight.is_floating_point() and n > _rows(head, logit_bytes)

    def whole(self) -> Tensor:
        """All of them, for what is no function of the log-probabilities of the targets."""
        logits: Tensor = self.head(self.hidden)
        return logits

    def show_to(self, watch: Callable[[Tensor, Tensor, slice], None]) -> None:
        """Have ``watch(hidden, δ, rows)`` called in the backward pass for each piece, δ the gradient of its logits."""
        node: Any = self.token_logps.grad_fn
        node.watch = watch


def _rows(head: nn.Linear, logit_bytes: int) -> int:
    return logit_bytes // (4 * head.weight.shape[0])


def _pieces(n: int, rows: int) -> Iterator[slice]:
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = hidden.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.rows, ctx.watch = rows, None
        found = []
        for piece in _pieces(len(hidden), rows):
            logits = F.linear(hidden[piece], weight, bias)
            wide = logits if logits.dtype == torch.float64 else logits.float()
            norm = wide.logsumexp(-1)
            own = wide.gather(-1, targets[piece, None]).squeeze(-1)
            found.append((own - norm, norm, logits.argmax(-1), logits.amax(-1)))
        logps, norms, best, peaks = (torch.cat(values) for values in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, norms)
        ctx.mark_non_differentiable(best, peaks)
        return logps, best, peaks

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # a second derivative would lack what the norms depend on
    def backward(ctx: Any, *gradients: Any) -> Any:
        gradient = gradients[0]
        hidden, weight, bias, targets, norms = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight) if needs_weight else None
        of_bias = torch.zeros_like(bias) if needs_bias else None
        kind, dtype, enabled = ctx.autocast
        for piece in _pieces(len(hidden), ctx.rows):
            with torch.autocast(kind, dtype, enabled):
                logits = F.linear(hidden[piece], weight, bias)
            wide = logits if logits.dtype == torch.float64 else logits.float()
            # ∂ log p_t / ∂ logits = 1_t − p, times what comes from above.
            delta = (wide - norms[piece, None]).exp_().mul_(-gradient[piece, None])
            delta.scatter_add_(-1, targets[piece, None], gradient[piece, None])
            delta = delta.to(logits.dtype)
            if of_hidden is not None:
                of_hidden[piece] = delta @ weight.to(delta.dtype)
            if of_weight is not None:
                of_weight += delta.t() @ hidden[piece].to(delta.dtype)
            if of_bias is not None:
                of_bias += delta.sum(0)
            if ctx.watch is not None:
                with torch.autocast(kind, dtype, enabled, cache_enabled=False):
                    ctx.watch(hidden[piece], delta, piece)
        return of_hidden, of_weight, of_bias, None, None
