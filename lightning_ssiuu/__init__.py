"""Faithful LLM unlearning for PyTorch Lightning: unlearn, see whether it was erased or hidden, attack the result."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> where it lives. Names are imported on first use: the command line must answer before torch is loaded.
_EXPORTS = {
    "AtomicCheckpointIO": "checkpoint_io",
    "AttributionRegularizer": "regularizers",
    "CustomData": "datamodules",
    "Facts": "datamodules",
    "FineTuning": "objectives.fine_tuning",
    "ForgetThresholdStopping": "callbacks",
    "GradientAscent": "objectives.gradient_ascent",
    "GradientDifference": "objectives.gradient_difference",
    "KeepCheckpoints": "callbacks",
    "NeuronAttributionCallback": "callbacks",
    "Regularizer": "regularizers",
    "RelearnDataModule": "datamodules",
    "RunReport": "callbacks",
    "SSIUU": "objectives.ssiuu",
    "SavePretrained": "callbacks",
    "TOFU": "datamodules",
    "UnlearningDataModule": "datamodules",
    "UnlearningModule": "objectives",
    "UserError": "errors",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
