"""``torch.compile`` for the forward passes that are trained through; all others stay as they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.registry import shortened

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def compile_backend(given: bool | str) -> str | None:
    """The backend that an option ``torch_compile`` means: True is inductor; None for no compilation.

    Raises:
        UserError: If there is no such backend, or inductor has no compiler to call.
    """
    if given is False:
        return None
    backend = "inductor" if given is True else given
    if backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise UserError("torch_compile", given, f"true, false or a backend of torch.compile: {sorted(known)}")
    compilers = (os.environ.get("CXX", ""), os.environ.get("CC", ""), "g++", "gcc", "clang++", "cl")
    if backend == "inductor" and not any(name and shutil.which(name) for name in compilers):
        raise UserError("torch_compile", given, "false on a machine without a C++ compiler (g++ is not installed)")
    return backend


class CompiledPasses:
    """A module's forward passes, compiled where they are trained through and nobody watches the layers.

    Scoring, attributions and generated text come from the module itself. So do passes whose layers have hooks, which a
    compiled pass might not call: a warning says so once. State dicts and module names are the module's own.
    """

    def __init__(self, module: nn.Module, backend: str) -> None:
        self._module, self._told = module, False
        self._compiled: Callable[..., Any] = torch.compile(module, backend=backend)

    def __call__(self, **inputs: Any) -> Any:
        if not (self._module.training and torch.is_grad_enabled()):
            return self._module(**inputs)
        if any(getattr(layer, hooks) for layer in self._module.modules() for hooks in _HOOKS):
            if not self._told:
                rank_zero_warn("torch_compile: this objective watches the model's layers; such passes are not compiled")
            self._told = True
            return self._module(**inputs)
        try:
            return self._compiled(**inputs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            allowed = f"false: the compiler fails for this model ({shortened(str(error))})"
            raise UserError("torch_compile", True, allowed) from error
