"""torchmetrics classes over :mod:`lightning_ssiuu.functional.metrics`; all of them return percent."""

from lightning_ssiuu.metrics.answers import AnswerAccuracy, AnswerProbability, RougeLRecall

__all__ = ["AnswerAccuracy", "AnswerProbability", "RougeLRecall"]
