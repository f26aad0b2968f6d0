"""Losses on hidden states, and the linear layer whose weight gradient leaves common directions out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.models.answers import Answers, mean_over_answers

#: Directions whose singular value is below this share of the largest are noise of the arithmetic.
_RANK_TOLERANCE = 1e-5


def hidden_mse(hidden: Tensor, target: Tensor, answers: Answers) -> Tensor:
    """Squared distance of hidden states to a target: mean over sequences of token means of means over dimensions.

    Args:
        hidden: ``[N, H]`` at the labelled positions.
        target: ``[H]`` for all of them, or ``[N, H]`` one each.
        answers: Whose positions they are.

    Source: both losses of RMU (Li et al., arXiv 2403.03218, Sec. 4), whose published
    code takes the mean over dimensions, not the sum.

    Example:
        >>> answers = Answers(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2)
        >>> hidden = torch.tensor([[1.0, 1.0], [3.0, 3.0], [2.0, 0.0]])
        >>> hidden_mse(hidden, torch.zeros(2), answers)  # ((1 + 9) / 2 + 2) / 2
        tensor(3.5000)
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    squared = (hidden.to(wide) - target.to(device=hidden.device, dtype=wide)).square().mean(-1)
    return mean_over_answers(squared, answers)


def random_direction(width: int, seed: int) -> Tensor:
    """``u/‖u‖`` with ``u ~ U[0, 1)`` from a generator of its own: the same on every rank and in every run.

    Args:
        width: H.
        seed: Of the generator.

    Returns:
        ``[H]`` float64 on the CPU.

    Example:
        >>> u = random_direction(4, seed=0)
        >>> round(u.norm().item(), 6), bool((u >= 0).all())
        (1.0, True)
    """
    u = torch.rand(width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return u / u.norm()


def common_directions(rows: Tensor, components: int) -> Tensor:
    """The mean of some vectors and their leading principal components, as an orthonormal basis.

    Args:
        rows: ``[T, D]``.
        components: How many principal components; at most a quarter of D is taken, and no more than there are. 0 gives
            an empty basis, without the mean.

    Returns:
        ``[K, D]`` orthonormal rows, in float64; ``K ≤ components + 1``.

    Source: Sondej & Yang, arXiv 2509.11816 (and its code), which projects the mean out and then one component after the
    other; here out of the space they span together, which is the same where they are orthogonal.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0, 0.0, 0.0], [1.0, -2.0, 0.0, 0.0]])
        >>> common_directions(rows, 1).abs()  # the mean, and the one direction in which they differ
        tensor([[1., 0., 0., 0.],
                [0., 1., 0., 0.]], dtype=torch.float64)
    """
    rows = rows.double()
    if components == 0 or not rows.any():
        return rows.new_zeros(0, rows.shape[1])
    mean = rows.mean(0)
    _, size, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    counted = int((size > _RANK_TOLERANCE * rows.norm()).sum())
    directions = directions[: min(components, counted, rows.shape[1] // 4)]
    mean = mean - directions.T @ (directions @ mean)
    if mean.norm() > _RANK_TOLERANCE * rows.norm() / len(rows) ** 0.5:
        directions = torch.cat([(mean / mean.norm()).unsqueeze(0), directions])
    return directions


def without(rows: Tensor, basis: Tensor) -> Tensor:
    """Vectors less their part in the space of an orthonormal basis.

    Args:
        rows: ``[T, D]``.
        basis: ``[K, D]``.

    Example:
        >>> without(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([[0., 4.]])
    """
    basis = basis.to(rows)
    return rows - rows @ basis.T @ basis if len(basis) else rows


class CollapsedLinear(torch.autograd.Function):
    """``y = x Wᵀ + b`` whose weight gradient is ``Σ_t g̃_t ã_tᵀ``, without common directions; all else as usual.

    As a part of autograd's own graph the changed gradient is averaged over ranks, sharded and accumulated by whoever
    does that with the usual one.

    Source: Sondej & Yang, arXiv 2509.11816: ``a`` the layer's input, ``g`` the gradient of its output, the tilde what
    :func:`without` leaves of them.

    Example:
        >>> weight = torch.ones(1, 2, requires_grad=True)
        >>> x, basis = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
        >>> CollapsedLinear.apply(x, weight, None, basis, torch.zeros(0, 1), False).sum().backward()
        >>> weight.grad
        tensor([[0., 4.]])
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_basis: Tensor,
        gradient_basis: Tensor,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, input_basis, gradient_basis)
        ctx.transposed = transposed
        return torch.nn.functional.linear(inputs, weight.T if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, input_basis, gradient_basis = ctx.saved_tensors
        (gradient,) = gradients
        of_inputs = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            matrix = weight.T if ctx.transposed else weight
            of_inputs = (gradient @ matrix.to(gradient.dtype)).to(inputs.dtype)
        rows = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(weight.dtype, torch.float32)
            seen = without(inputs.reshape(-1, inputs.shape[-1]).to(wide), input_basis)
            pushed = without(rows.to(wide), gradient_basis)
            of_weight = (seen.T @ pushed if ctx.transposed else pushed.T @ seen).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_inputs, of_weight, of_bias, None, None, None
