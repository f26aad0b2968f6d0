"""What may act on an objective's gradients or steps, the same for every objective."""

from lightning_ssiuu.regularizers.attribution import AttributionRegularizer
from lightning_ssiuu.regularizers.base import Regularizer
from lightning_ssiuu.regularizers.controls import Combined, L2ToStart, MatchedUpdateNorm
from lightning_ssiuu.regularizers.dual_mask import DualMask
from lightning_ssiuu.regularizers.neuron import NeuronAttributionRegularizer

__all__ = [
    "AttributionRegularizer",
    "Combined",
    "DualMask",
    "L2ToStart",
    "MatchedUpdateNorm",
    "NeuronAttributionRegularizer",
    "Regularizer",
]
