"""What each Trainer strategy and precision cannot do here, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.registry import lookup, nearest, why_not_found

_SUPPORTED = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
_NAMES = "auto, ddp, ModelParallelStrategy (FSDP2, recipes/scale/fsdp2.yaml) or a single device"
_TYPES = "32-true, bf16-mixed or bf16-true; narrower weights are model.quantization"


SLOW_BF16 = "this CPU has no arithmetic in bfloat16, which takes several times as long as float32 on it"


class Trained(Protocol):
    """What a module says of itself for :func:`check_strategy`."""

    @property
    def second_gradient(self) -> str | None:
        """Who takes a gradient beside the one of the loss that Lightning differentiates; None if nobody does."""


def check_engine(given: Mapping[str, Any]) -> None:
    """Refuse engines by name, before Lightning makes them: it would first look for their packages and devices.

    ``given`` are the Trainer's options as the user set them: ``strategy`` a name or a mapping with ``class_path``.

    Raises:
        UserError: Naming the option, and what is supported.
    """
    strategy = given.get("strategy")
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", None)
    if name is not None and name.lower() != "auto":
        kind = _strategy_class(name)
        if kind is None:
            why = why_not_found(name) or nearest(name, ["auto", *StrategyRegistry.keys()])
            raise UserError("trainer.strategy", name, _NAMES + (f" ({why})" if why else ""))
        if not _is_supported(kind):
            raise UserError("trainer.strategy", name, _NAMES)
        if isinstance(strategy, str) and strategy.lower() not in StrategyRegistry:  # Lightning takes no class's name
            raise UserError("trainer.strategy", name, f"a class as a mapping, {{class_path: {name}}}, or {_NAMES}")
    if str(given.get("precision")).startswith("transformer-engine"):
        raise UserError("trainer.precision", given["precision"], _TYPES)


def _strategy_class(name: str) -> type | None:
    if name.lower() in StrategyRegistry:
        return StrategyRegistry[name.lower()]["strategy"]
    kind = lookup(name if "." in name else f"lightning.pytorch.strategies.{name}")
    return kind if isinstance(kind, type) else None


def _is_supported(kind: type) -> bool:
    # Not by issubclass: DeepSpeed's and XLA's strategies are DDPStrategies, too, and change what one does.
    return next((base for base in kind.__mro__ if base.__module__.startswith("lightning.")), None) in _SUPPORTED


def check_strategy(trainer: L.Trainer, module: Trained) -> None:
    """Refuse combinations that would fail late, or train something else than asked, before or as a Trainer sets up.

    Raises:
        UserError: Naming the Trainer's option and what to take instead.
    """
    strategy, who = trainer.strategy, module.second_gradient
    if not _is_supported(type(strategy)):
        raise UserError("trainer.strategy", type(strategy).__name__, _NAMES)
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        allowed = '"ddp", whose processes run the command again; spawned or forked ones do not give their model back'
        raise UserError("trainer.strategy", strategy.launcher._start_method, allowed)
    if isinstance(trainer.precision_plugin, BitsandbytesPrecision | TransformerEnginePrecision):
        raise UserError("trainer.plugins", type(trainer.precision_plugin).__name__, _TYPES)
    if getattr(module, "torch_compile", None) is not None:
        sharded = "ModelParallelStrategy" if isinstance(strategy, ModelParallelStrategy) else None
        options = (name for name in ("quantization", "gradient_checkpointing") if getattr(module, name, None))
        if (other := who or sharded or next(options, None)) is not None:
            backend: Any = getattr(module, "torch_compile", None)
            raise UserError("torch_compile", backend, f"false with {other}, which hooks into the layers")
    if (
        isinstance(strategy, ModelParallelStrategy)
        and (regularizer := getattr(module, "regularizer", None)) is not None
    ):
        regularizer.check_sharded()
    if who is not None and isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("static_graph"):
        allowed = f"false with {who}, whose second backward pass a static graph does not know: "
        raise UserError("trainer.strategy.static_graph", True, allowed + "the ranks' weights would drift apart")
    on_cpu = isinstance(trainer.accelerator, CPUAccelerator)
    # x86 without AVX-512 (elsewhere torch names its instructions otherwise): one number at a time.
    if on_cpu and str(trainer.precision).startswith("bf16") and torch.backends.cpu.get_cpu_capability() == "AVX2":
        rank_zero_info(f"trainer.precision {trainer.precision}: {SLOW_BF16}.")
    if who is not None and str(trainer.precision).startswith("16-"):
        # Loss scaling holds for the loss's gradient alone: the other would underflow, unseen by the scaler.
        allowed = f"32-true, bf16-mixed or bf16-true with {who}, whose gradient is too small for float16"
        raise UserError("trainer.precision", trainer.precision, allowed)
