"""What each Trainer strategy and precision cannot do here, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Protocol

import lightning as L
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lightning_ssiuu.utils.errors import UserError

_TYPES = "32-true, bf16-mixed or bf16-true; narrower weights are model.quantization"
#: Loss scaling holds for the objective's gradient alone: the regulariser's would underflow, unseen by the scaler.
_NO_HALF = "32-true, bf16-mixed or bf16-true with a regularizer, whose gradient is too small for float16"


class Trained(Protocol):
    """What a module says of itself for :func:`check_strategy`."""

    regularizer: Any
    quantization: Any
    displaces_weights: bool


def check_installed(given: Mapping[str, Any]) -> None:
    """Refuse engines that are not installed; Lightning would say so in the middle of making them.

    Args:
        given: The Trainer's options as the user set them: ``strategy`` a name or a mapping with ``class_path``.

    Raises:
        UserError: Naming the option, and what to install.

    Example:
        >>> check_installed({"strategy": "ddp", "precision": "bf16-mixed"})
        >>> check_installed({"precision": "transformer-engine"})
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: trainer.precision: got 'transformer-engine', allowed: 32-true, bf16-mixed \
or bf16-true; narrower weights are model.quantization
    """
    strategy = given.get("strategy")
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", None)
    if name is not None and "deepspeed" in name.lower() and find_spec("deepspeed") is None:
        raise UserError("trainer.strategy", name, 'ddp or FSDP2, or pip install "lightning-ssiuu[deepspeed]" first')
    if str(given.get("precision")).startswith("transformer-engine"):
        raise UserError("trainer.precision", given["precision"], _TYPES)


def check_strategy(trainer: L.Trainer, module: Trained) -> None:
    """Refuse combinations that would fail late, or train something else than asked.

    Args:
        trainer: Has not started, or is about to set the module up.
        module: What it is to train.

    Raises:
        UserError: Naming the Trainer's option and what to take instead.

    Example:
        >>> from lightning_ssiuu.objectives.gradient_difference import GradientDifference
        >>> from lightning_ssiuu.regularizers import AttributionRegularizer
        >>> trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, strategy=DDPStrategy(static_graph=True))
        >>> check_strategy(trainer, GradientDifference())
        >>> check_strategy(trainer, GradientDifference(regularizer=AttributionRegularizer()))
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: trainer.strategy.static_graph: got True, allowed: false with a regularizer, \
whose second backward pass a static graph does not know: the ranks' weights would drift apart
    """
    strategy, regularized = trainer.strategy, module.regularizer is not None
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        allowed = '"ddp", whose processes run the command again; spawned or forked ones do not give their model back'
        raise UserError("trainer.strategy", strategy.launcher._start_method, allowed)
    if isinstance(strategy, FSDPStrategy):
        allowed = "ModelParallelStrategy (FSDP2, recipes/scale/fsdp2.yaml): FSDP1 melts a layer's weights into one"
        raise UserError("trainer.strategy", type(strategy).__name__, allowed)
    if isinstance(trainer.precision_plugin, BitsandbytesPrecision | TransformerEnginePrecision):
        raise UserError("trainer.plugins", type(trainer.precision_plugin).__name__, _TYPES)
    if isinstance(strategy, DDPStrategy) and regularized and strategy._ddp_kwargs.get("static_graph"):
        allowed = "false with a regularizer, whose second backward pass a static graph does not know: "
        raise UserError("trainer.strategy.static_graph", True, allowed + "the ranks' weights would drift apart")
    if regularized and str(trainer.precision).startswith("16-"):
        raise UserError("trainer.precision", trainer.precision, _NO_HALF)
    if module.displaces_weights:
        _check_displaced(trainer, module)
    if isinstance(strategy, DeepSpeedStrategy):
        _check_deepspeed(strategy, trainer, module)


def refuse_deepspeed(trainer: L.Trainer, module: Trained) -> None:
    """Raise under DeepSpeed, whose engine steps on a copy of the weights that nobody else can read or change.

    Args:
        trainer: The Trainer.
        module: An objective that has to.

    Raises:
        UserError: If the strategy is DeepSpeed's.

    Example:
        >>> from lightning_ssiuu.objectives.gradient_difference import GradientDifference
        >>> refuse_deepspeed(L.Trainer(accelerator="cpu", devices=1, logger=False), GradientDifference())
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        allowed = f"ddp or FSDP2: {type(module).__name__} changes weights beside the optimiser"
        raise UserError("trainer.strategy", "DeepSpeedStrategy", allowed)


def _check_displaced(trainer: L.Trainer, module: Trained) -> None:
    strategy, name = trainer.strategy, type(module).__name__
    if isinstance(strategy, DeepSpeedStrategy):
        allowed = f"ddp or FSDP2: {name} moves the weights within a step, of which ZeRO keeps copies"
        raise UserError("trainer.strategy", type(strategy).__name__, allowed)
    if isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("static_graph"):
        allowed = f"false with {name}, whose backward passes a static graph does not know"
        raise UserError("trainer.strategy.static_graph", True, allowed)
    if str(trainer.precision).startswith("16-"):
        allowed = f"32-true, bf16-mixed or bf16-true: {name}'s gradient is taken without loss scaling"
        raise UserError("trainer.precision", trainer.precision, allowed)


def _check_deepspeed(strategy: DeepSpeedStrategy, trainer: L.Trainer, module: Trained) -> None:
    # A subclass that sets its own devices up may know others than Lightning's.
    own = type(strategy).setup_environment is not DeepSpeedStrategy.setup_environment
    if not own and not isinstance(trainer.accelerator, CUDAAccelerator):
        name = type(trainer.accelerator).__name__
        raise UserError("trainer.accelerator", name, "a CUDA GPU under DeepSpeed; ddp and FSDP2 run on CPUs, too")
    if trainer.accumulate_grad_batches != 1:
        allowed = "1 under DeepSpeed: Lightning and the engine would both divide the loss by it"
        raise UserError("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, allowed)
    config: dict[str, Any] = strategy.config or {}  # the strategy has read a file by now
    zero: dict[str, Any] = config.get("zero_optimization") or {}
    if module.quantization is not None and zero.get("stage") == 3:
        allowed = "null under ZeRO stage 3, which cannot cut quantised weights; stage 2 and ddp hold them whole"
        raise UserError("model.quantization", module.quantization, allowed)
    if module.regularizer is None:
        return
    if not module.regularizer.under_zero:
        allowed = f"ddp or FSDP2 (recipes/scale/fsdp2.yaml) with {type(module.regularizer).__name__}"
        raise UserError("trainer.strategy", type(strategy).__name__, allowed)
    if zero.get("stage") not in (1, 2, 3):
        allowed = "1, 2 or 3 with a regularizer; without ZeRO, take strategy ddp"
        raise UserError("trainer.strategy.stage", zero.get("stage"), allowed)
    if config.get("fp16", {}).get("enabled"):
        raise UserError("trainer.strategy.config.fp16.enabled", True, _NO_HALF)
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device", "none") != "none":
            name = {"offload_param": "offload_parameters"}.get(key, key)
            allowed = "false with a regularizer: its gradient has not been seen to arrive in offloaded memory"
            raise UserError(f"trainer.strategy.{name}", True, allowed)
