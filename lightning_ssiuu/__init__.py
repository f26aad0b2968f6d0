"""Faithful LLM unlearning for PyTorch Lightning: unlearn, see whether it was erased or hidden, attack the result."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> where it lives; again for type checkers below. Names are imported on first use: the command line must
# answer before torch is loaded.
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
    "SelectiveUnlearning": "objectives.selective_unlearning",
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
    "WalkBack": "callbacks",
    "WGA": "objectives.wga",
    "WMDP": "datamodules",
    "WMDPDeduped": "datamodules",
    "WorldFacts": "datamodules",
}

__all__ = ["__version__", *_EXPORTS]


if TYPE_CHECKING:  # type checkers see every name and its type, and a name that is not there
    from lightning_ssiuu.attacks import Ablation as Ablation
    from lightning_ssiuu.attacks import Attack as Attack
    from lightning_ssiuu.attacks import Attacker as Attacker
    from lightning_ssiuu.attacks import Benign as Benign
    from lightning_ssiuu.attacks import EmbeddingAttack as EmbeddingAttack
    from lightning_ssiuu.attacks import FewShot as FewShot
    from lightning_ssiuu.attacks import Harmful as Harmful
    from lightning_ssiuu.attacks import HeldOutFacts as HeldOutFacts
    from lightning_ssiuu.attacks import Interpolation as Interpolation
    from lightning_ssiuu.attacks import Jailbreak as Jailbreak
    from lightning_ssiuu.attacks import LayerProbes as LayerProbes
    from lightning_ssiuu.attacks import MultiTurn as MultiTurn
    from lightning_ssiuu.attacks import Paraphrase as Paraphrase
    from lightning_ssiuu.attacks import Prefill as Prefill
    from lightning_ssiuu.attacks import Quantization as Quantization
    from lightning_ssiuu.attacks import Relearning as Relearning
    from lightning_ssiuu.attacks import Sampling as Sampling
    from lightning_ssiuu.attacks import SoftPrompt as SoftPrompt
    from lightning_ssiuu.attacks import SuffixSearch as SuffixSearch
    from lightning_ssiuu.attacks import Translation as Translation
    from lightning_ssiuu.attacks import UnlearningDepth as UnlearningDepth
    from lightning_ssiuu.callbacks import ElicitedLook as ElicitedLook
    from lightning_ssiuu.callbacks import ElicitedStop as ElicitedStop
    from lightning_ssiuu.callbacks import ForgetThresholdStopping as ForgetThresholdStopping
    from lightning_ssiuu.callbacks import KeepCheckpoints as KeepCheckpoints
    from lightning_ssiuu.callbacks import NeuronAttributionCallback as NeuronAttributionCallback
    from lightning_ssiuu.callbacks import RunReport as RunReport
    from lightning_ssiuu.callbacks import SavePretrained as SavePretrained
    from lightning_ssiuu.callbacks import WalkBack as WalkBack
    from lightning_ssiuu.cli.erase import erase as erase
    from lightning_ssiuu.cli.functions import Result as Result
    from lightning_ssiuu.cli.functions import Verdict as Verdict
    from lightning_ssiuu.cli.functions import attack as attack
    from lightning_ssiuu.cli.functions import audit as audit
    from lightning_ssiuu.cli.functions import compare as compare
    from lightning_ssiuu.cli.functions import evaluate as evaluate
    from lightning_ssiuu.cli.functions import leaderboard as leaderboard
    from lightning_ssiuu.cli.functions import meta_evaluate as meta_evaluate
    from lightning_ssiuu.cli.functions import privacy as privacy
    from lightning_ssiuu.cli.functions import utility as utility
    from lightning_ssiuu.cli.publish import publish as publish
    from lightning_ssiuu.datamodules import LUME as LUME
    from lightning_ssiuu.datamodules import MUSE as MUSE
    from lightning_ssiuu.datamodules import RWKU as RWKU
    from lightning_ssiuu.datamodules import TOFU as TOFU
    from lightning_ssiuu.datamodules import WMDP as WMDP
    from lightning_ssiuu.datamodules import CustomData as CustomData
    from lightning_ssiuu.datamodules import Documents as Documents
    from lightning_ssiuu.datamodules import Facts as Facts
    from lightning_ssiuu.datamodules import FaithUn as FaithUn
    from lightning_ssiuu.datamodules import KnowUnDo as KnowUnDo
    from lightning_ssiuu.datamodules import RelearnDataModule as RelearnDataModule
    from lightning_ssiuu.datamodules import UnlearningDataModule as UnlearningDataModule
    from lightning_ssiuu.datamodules import WMDPDeduped as WMDPDeduped
    from lightning_ssiuu.datamodules import WorldFacts as WorldFacts
    from lightning_ssiuu.models.architectures import ARCHITECTURES as ARCHITECTURES
    from lightning_ssiuu.models.architectures import Architecture as Architecture
    from lightning_ssiuu.objectives import UnlearningModule as UnlearningModule
    from lightning_ssiuu.objectives.adversarial_unlearning import AdversarialUnlearning as AdversarialUnlearning
    from lightning_ssiuu.objectives.altpo import AltPO as AltPO
    from lightning_ssiuu.objectives.ceu import CEU as CEU
    from lightning_ssiuu.objectives.cir import CIR as CIR
    from lightning_ssiuu.objectives.dpo import DPO as DPO
    from lightning_ssiuu.objectives.elicited_unlearning import ElicitedUnlearning as ElicitedUnlearning
    from lightning_ssiuu.objectives.fdcu import FDCU as FDCU
    from lightning_ssiuu.objectives.fine_tuning import FineTuning as FineTuning
    from lightning_ssiuu.objectives.flat import FLAT as FLAT
    from lightning_ssiuu.objectives.gradient_ascent import GradientAscent as GradientAscent
    from lightning_ssiuu.objectives.gradient_difference import GradientDifference as GradientDifference
    from lightning_ssiuu.objectives.gru import GRU as GRU
    from lightning_ssiuu.objectives.idk import IDK as IDK
    from lightning_ssiuu.objectives.klue import KLUE as KLUE
    from lightning_ssiuu.objectives.lat import LAT as LAT
    from lightning_ssiuu.objectives.mcu import MCU as MCU
    from lightning_ssiuu.objectives.mudman import MUDMAN as MUDMAN
    from lightning_ssiuu.objectives.npo import NPO as NPO
    from lightning_ssiuu.objectives.pdu import PDU as PDU
    from lightning_ssiuu.objectives.repselect import RepSelect as RepSelect
    from lightning_ssiuu.objectives.rmu import RMU as RMU
    from lightning_ssiuu.objectives.sam import SAM as SAM
    from lightning_ssiuu.objectives.satimp import SatImp as SatImp
    from lightning_ssiuu.objectives.selective_unlearning import SelectiveUnlearning as SelectiveUnlearning
    from lightning_ssiuu.objectives.simnpo import SimNPO as SimNPO
    from lightning_ssiuu.objectives.ssiuu import SSIUU as SSIUU
    from lightning_ssiuu.objectives.task_vector import TaskVector as TaskVector
    from lightning_ssiuu.objectives.undial import UNDIAL as UNDIAL
    from lightning_ssiuu.objectives.undo import UNDO as UNDO
    from lightning_ssiuu.objectives.wga import WGA as WGA
    from lightning_ssiuu.regularizers import AttributionRegularizer as AttributionRegularizer
    from lightning_ssiuu.regularizers import Combined as Combined
    from lightning_ssiuu.regularizers import DualMask as DualMask
    from lightning_ssiuu.regularizers import L2ToStart as L2ToStart
    from lightning_ssiuu.regularizers import MatchedUpdateNorm as MatchedUpdateNorm
    from lightning_ssiuu.regularizers import NeuronAttributionRegularizer as NeuronAttributionRegularizer
    from lightning_ssiuu.regularizers import Regularizer as Regularizer
    from lightning_ssiuu.training.checkpoints import AtomicCheckpointIO as AtomicCheckpointIO
    from lightning_ssiuu.training.optimizers import Muon as Muon
    from lightning_ssiuu.utils.errors import UserError as UserError
else:

    def __getattr__(name: str) -> Any:
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
