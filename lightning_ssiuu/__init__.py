"""Faithful LLM unlearning for PyTorch Lightning: unlearn, see whether it was erased or hidden, attack the result."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> where it lives. Names are imported on first use: the command line must answer before torch is loaded.
_EXPORTS = {
    "Ablation": "attacks",
    "Attacker": "attacks",
    "AdversarialUnlearning": "objectives.adversarial_unlearning",
    "AltPO": "objectives.altpo",
    "Architecture": "models.architectures",
    "ARCHITECTURES": "models.architectures",
    "attack": "cli.functions",
    "audit": "cli.functions",
    "compare": "cli.functions",
    "erase": "cli.erase",
    "evaluate": "cli.functions",
    "HeldOutFacts": "attacks",
    "KnowUnDo": "datamodules",
    "LUME": "datamodules",
    "privacy": "cli.functions",
    "Result": "cli.functions",
    "RWKU": "datamodules",
    "utility": "cli.functions",
    "Verdict": "cli.functions",
    "AtomicCheckpointIO": "training.checkpoints",
    "Attack": "attacks",
    "AttributionRegularizer": "regularizers",
    "Benign": "attacks",
    "CEU": "objectives.ceu",
    "CIR": "objectives.cir",
    "Combined": "regularizers",
    "CustomData": "datamodules",
    "Documents": "datamodules",
    "DPO": "objectives.dpo",
    "DualMask": "regularizers",
    "ElicitedLook": "callbacks",
    "ElicitedStop": "callbacks",
    "Facts": "datamodules",
    "ElicitedUnlearning": "objectives.elicited_unlearning",
    "FaithUn": "datamodules",
    "FDCU": "objectives.fdcu",
    "FineTuning": "objectives.fine_tuning",
    "FLAT": "objectives.flat",
    "ForgetThresholdStopping": "callbacks",
    "GradientAscent": "objectives.gradient_ascent",
    "GradientDifference": "objectives.gradient_difference",
    "GRU": "objectives.gru",
    "Harmful": "attacks",
    "IDK": "objectives.idk",
    "Interpolation": "attacks",
    "KeepCheckpoints": "callbacks",
    "KLUE": "objectives.klue",
    "L2ToStart": "regularizers",
    "LAT": "objectives.lat",
    "MatchedUpdateNorm": "regularizers",
    "MCU": "objectives.mcu",
    "MUDMAN": "objectives.mudman",
    "Muon": "training.optimizers",
    "MUSE": "datamodules",
    "NeuronAttributionCallback": "callbacks",
    "NeuronAttributionRegularizer": "regularizers",
    "NPO": "objectives.npo",
    "Paraphrase": "attacks",
    "PDU": "objectives.pdu",
    "Quantization": "attacks",
    "Regularizer": "regularizers",
    "RelearnDataModule": "datamodules",
    "Relearning": "attacks",
    "RepSelect": "objectives.repselect",
    "RMU": "objectives.rmu",
    "RunReport": "callbacks",
    "SAM": "objectives.sam",
    "Sampling": "attacks",
    "SatImp": "objectives.satimp",
    "SavePretrained": "callbacks",
    "SimNPO": "objectives.simnpo",
    "SSIUU": "objectives.ssiuu",
    "TaskVector": "objectives.task_vector",
    "TOFU": "datamodules",
    "UNDIAL": "objectives.undial",
    "UNDO": "objectives.undo",
    "UnlearningDataModule": "datamodules",
    "UnlearningModule": "objectives",
    "UserError": "utils.errors",
    "WGA": "objectives.wga",
    "WMDP": "datamodules",
    "WMDPDeduped": "datamodules",
    "WorldFacts": "datamodules",
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
