"""Callbacks: watch attribution, stop at the threshold, keep checkpoints, save, report."""

from lightning_ssiuu.callbacks.checkpoints import KeepCheckpoints
from lightning_ssiuu.callbacks.elicited import ElicitedLook, ElicitedStop
from lightning_ssiuu.callbacks.forget_threshold import ForgetThresholdStopping
from lightning_ssiuu.callbacks.neuron_attribution import NeuronAttributionCallback
from lightning_ssiuu.callbacks.run_report import RunReport
from lightning_ssiuu.callbacks.save_pretrained import SavePretrained
from lightning_ssiuu.callbacks.update_signs import UpdateSigns
from lightning_ssiuu.callbacks.walk_back import WalkBack

__all__ = [
    "ElicitedLook",
    "ElicitedStop",
    "ForgetThresholdStopping",
    "KeepCheckpoints",
    "NeuronAttributionCallback",
    "RunReport",
    "SavePretrained",
    "UpdateSigns",
    "WalkBack",
]
