"""Faithful LLM unlearning for PyTorch Lightning: unlearn, see whether it was erased or hidden, attack the result."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> where it lives. Names are imported on first use: the command line must answer before torch is loaded.
_EXPORTS = {
    "Ablation": "attacks",
    "AdversarialUnlearning": "objectives.adversarial_unlearning",
    "AltPO": "objectives.altpo",
    "Architecture": "models.architectures",
    "ARCHITECTURES": "models.architectures",
    "AtomicCheckpointIO": "training.checkpoints",
    "attack": "cli.functions",
    "Attack": "attacks",
    "Attacker": "attacks",
    "AttributionRegularizer": "regularizers",
    "audit": "cli.functions",
    "Benign": "attacks",
    "CEU": "objectives.ceu",
    "CIR": "objectives.cir",
    "Combined": "regularizers",
    "compare": "cli.functions",
    "CustomData": "datamodules",
    "Documents": "datamodules",
    "DPO": "objectives.dpo",
    "DualMask": "regularizers",
    "ElicitedLook": "callbacks",
    "ElicitedStop": "callbacks",
    "ElicitedUnlearning": "objectives.elicited_unlearning",
    "EmbeddingAttack": "attacks",
    "erase": "cli.erase",
    "evaluate": "cli.functions",
    "Facts": "datamodules",
    "FaithUn": "datamodules",
    "FDCU": "objectives.fdcu",
    "FewShot": "attacks",
    "FineTuning": "objectives.fine_tuning",
    "FLAT": "objectives.flat",
    "ForgetThresholdStopping": "callbacks",
    "GradientAscent": "objectives.gradient_ascent",
    "GradientDifference": "objectives.gradient_difference",
    "GRU": "objectives.gru",
    "Harmful": "attacks",
    "HeldOutFacts": "attacks",
    "IDK": "objectives.idk",
    "Interpolation": "attacks",
    "Jailbreak": "attacks",
    "KeepCheckpoints": "callbacks",
    "KLUE": "objectives.klue",
    "KnowUnDo": "datamodules",
    "L2ToStart": "regularizers",
    "LAT": "objectives.lat",
    "LayerProbes": "attacks",
    "leaderboard": "cli.functions",
    "LUME": "datamodules",
    "MatchedUpdateNorm": "regularizers",
    "MCU": "objectives.mcu",
    "meta_evaluate": "cli.functions",
    "MUDMAN": "objectives.mudman",
    "MultiTurn": "attacks",
    "Muon": "training.optimizers",
    "MUSE": "datamodules",
    "NeuronAttributionCallback": "callbacks",
    "NeuronAttributionRegularizer": "regularizers",
    "NPO": "objectives.npo",
    "Paraphrase": "attacks",
    "PDU": "objectives.pdu",
    "Prefill": "attacks",
    "privacy": "cli.functions",
    "publish": "cli.publish",
    "Quantization": "attacks",
    "Regularizer": "regularizers",
    "RelearnDataModule": "datamodules",
    "Relearning": "attacks",
    "RepSelect": "objectives.repselect",
    "Result": "cli.functions",
    "RMU": "objectives.rmu",
    "RunReport": "callbacks",
    "RWKU": "datamodules",
    "SAM": "objectives.sam",
    "Sampling": "attacks",
    "SatImp": "objectives.satimp",
    "SavePretrained": "callbacks",
    "SimNPO": "objectives.simnpo",
    "SoftPrompt": "attacks",
    "SSIUU": "objectives.ssiuu",
    "SuffixSearch": "attacks",
    "TaskVector": "objectives.task_vector",
    "TOFU": "datamodules",
    "Translation": "attacks",
    "UNDIAL": "objectives.undial",
    "UNDO": "objectives.undo",
    "UnlearningDataModule": "datamodules",
    "UnlearningDepth": "attacks",
    "UnlearningModule": "objectives",
    "UserError": "utils.errors",
    "utility": "cli.functions",
    "Verdict": "cli.functions",
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
