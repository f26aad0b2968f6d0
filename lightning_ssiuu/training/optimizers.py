"""Optimisers: which of torch's implementations takes the step, where nobody has chosen one; Muon for whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, is_floating_point, nn
from torch.optim import Adam, AdamW, Optimizer

from lightning_ssiuu.utils.errors import Given, UserError

#: Where the fused kernel saves most of a step; a subclass may do in its step what the kernel does not.
_FUSED = (Adam, AdamW)
_DEVICES = ("cpu", "cuda", "mps", "xpu")


def fused_where_possible(optimizer: Any) -> Any:
    """The same optimiser; torch's Adam and AdamW step in one fused kernel where all parameters' devices have it.

    Left to itself, torch takes a loop over the tensors on a CPU and lists of tensors on a GPU. The kernel is the same
    arithmetic in one pass over the memory and without temporary copies: results agree but for rounding, each time to
    the parameter's type. An optimiser that was made with ``fused`` or ``foreach`` keeps what it was told, and so does
    the optimiser of a run that began with another implementation and is gone on with from its checkpoint.

    Example:
        >>> from torch import nn, ones
        >>> weight = nn.Parameter(ones(2))
        >>> fused_where_possible(AdamW([weight])).param_groups[0]["fused"]
        True
        >>> fused_where_possible(AdamW([weight], foreach=True)).param_groups[0]["fused"] is None
        True
    """
    groups = optimizer.param_groups
    if type(optimizer) not in _FUSED or any(group["differentiable"] for group in groups):
        return optimizer
    left_open = all(group["fused"] is None and group["foreach"] is None for group in groups)
    tensors = [tensor for group in groups for tensor in group["params"]]
    if left_open and all(tensor.device.type in _DEVICES and is_floating_point(tensor) for tensor in tensors):
        # Not when it is made: torch's would then undo the scaling of losses by themselves, after the regulariser has
        # looked at the gradients, and Lightning would not clip them.
        for group in (optimizer.defaults, *groups):
            group["fused"] = True
    return optimizer


def refusal(argument: str, error: Exception) -> UserError:
    """The error for options that an optimiser refuses: torch's raise ValueError for a rate below 0, and the like.

    Example:
        >>> print(refusal("model.optimizer", ValueError("Invalid learning rate: -1.0")))
        model.optimizer: got options it refuses (Invalid learning rate: -1.0), allowed: those it takes
    """
    return UserError(argument, Given(f"options it refuses ({' '.join(str(error).split())})"), "those it takes")


def optimizer_of(module: nn.Module, make: Callable[..., Any]) -> Any:
    """The optimiser that ``make`` gives for the trained parameters of a module, fused where possible.

    ``make`` gets a list of parameters, as torch's optimisers do, which have no names. Embeddings and unembeddings carry
    a mark for :class:`Muon`.
    """
    tables: list[Any] = [layer for layer in module.modules() if isinstance(layer, nn.Embedding)]
    whole: list[Any] = [m for m in module.modules() if callable(getattr(m, "get_output_embeddings", None))]
    for layer in (*tables, *(model.get_output_embeddings() for model in whole)):
        if layer is not None:
            layer.weight.is_token_table = True
    return fused_where_possible(make([p for p in module.parameters() if p.requires_grad]))


class Muon(Optimizer):
    """torch's :class:`torch.optim.Muon` for weight matrices and :class:`torch.optim.AdamW` for all else, as one.

    A matrix (of two dimensions, adapters included) moves by ``lr · 0.2 √max(rows, columns) · O``, O its momentum with
    all singular values made about 1; the factor gives the step the size of AdamW's (Liu et al., arXiv 2502.16982), so
    that one learning rate serves both parts. Embeddings, learned positions, the head, norms and biases are AdamW's. In
    an objective: ``optimizer: {class_path: lightning_ssiuu.Muon, init_args: {lr: 1.0e-4}}``. O is computed in bfloat16,
    which is slow on CPUs without it. Weights that are cut over ranks (FSDP2) are refused.

    Args:
        params: Parameters, or groups of them with options of their own.
        lr: Learning rate of both parts, ≥ 0.
        weight_decay: Decoupled, of both parts, ≥ 0.
        momentum: Muon's, ≥ 0.
        betas: AdamW's.

    Raises:
        UserError: If weights are cut over ranks.

    Example:
        >>> matrix, bias = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))
        >>> matrix.grad, bias.grad = torch.eye(4), torch.ones(4)
        >>> Muon([matrix, bias], lr=0.1).step()
        >>> [round(value, 3) for value in (matrix[0, 0].item(), bias[0].item())]
        [-0.033, -0.1]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self._betas, self._momentum = betas, momentum
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as two groups: those that are Muon's and those that are AdamW's."""
        given = param_group["params"]
        tensors = [given] if isinstance(given, Tensor) else list(given)
        if any(hasattr(tensor, "to_local") for tensor in tensors):
            raise UserError("optimizer", "Muon", "AdamW or SGD where weights are cut over ranks (FSDP2)")
        is_matrix = [tensor.ndim == 2 and not getattr(tensor, "is_token_table", False) for tensor in tensors]
        own: dict[bool, dict[str, Any]] = {
            True: {"momentum": self._momentum, "adjust_lr_fn": "match_rms_adamw"},
            False: {"betas": self._betas},
        }
        for matrices, options in own.items():
            chosen = [tensor for tensor, kind in zip(tensors, is_matrix, strict=True) if kind == matrices]
            super().add_param_group({**options, **param_group, "params": chosen, "matrices": matrices})

    def step(self, closure: Any = None) -> Any:
        """One step of both parts; the closure's value, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Made anew, of the group itself and with this optimiser's state: nothing is kept twice or has to be linked
            # again once a checkpoint is loaded.
            part = cast(Optimizer, (torch.optim.Muon if group["matrices"] else AdamW)([group]))
            part.state = self.state
            part.step()
        return loss
