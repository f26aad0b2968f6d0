"""Which of torch's implementations of an optimiser takes the step, where nobody has chosen one."""

from __future__ import annotations

from typing import Any

from torch import is_floating_point
from torch.optim import Adam, AdamW

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
