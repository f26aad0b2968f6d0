"""Metrics as torchmetrics classes; all but ``ForgetQuality`` (a p-value) return percent."""

from lightning_ssiuu.evaluation.metrics.answers import AnswerAccuracy, AnswerProbability, HighestProbability
from lightning_ssiuu.evaluation.metrics.fluency import ClassProbability, NgramEntropy
from lightning_ssiuu.evaluation.metrics.membership import MembershipAUC, PrivLeak
from lightning_ssiuu.evaluation.metrics.memorization import ExactMemorization, ExtractionStrength
from lightning_ssiuu.evaluation.metrics.rouge import RougeL
from lightning_ssiuu.evaluation.metrics.truth_ratio import ForgetQuality, ModelUtility, TruthRatio
from lightning_ssiuu.evaluation.metrics.verbatim import LongestCommonRun, MemorizedShare

__all__ = [
    "AnswerAccuracy",
    "AnswerProbability",
    "ClassProbability",
    "ExactMemorization",
    "ExtractionStrength",
    "ForgetQuality",
    "HighestProbability",
    "LongestCommonRun",
    "MembershipAUC",
    "MemorizedShare",
    "ModelUtility",
    "NgramEntropy",
    "PrivLeak",
    "RougeL",
    "TruthRatio",
]
