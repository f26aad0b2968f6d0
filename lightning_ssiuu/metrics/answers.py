"""Percentages over examples, right whatever the batches, the ranks and the model's precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_ssiuu.functional.metrics import rouge_l_recall
from lightning_ssiuu.metrics.base import Percentage
from lightning_ssiuu.utils.errors import UserError

AccuracyKind = Literal["first_token", "all_tokens", "multiple_choice", "choice_likelihood", "choice_generation"]


class AnswerAccuracy(Percentage):
    """Share of correct answers, in percent.

    Args:
        kind: What "correct" means; :mod:`lightning_ssiuu.functional.metrics` computes it per example
            (``answer_accuracy`` for ``"first_token"`` and ``"all_tokens"``, ``multiple_choice_accuracy`` for
            ``"multiple_choice"`` and ``"choice_likelihood"``, ``generated_choice_accuracy``).
        **kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        UserError: Unknown ``kind``.

    Example:
        >>> accuracy = AnswerAccuracy("multiple_choice")
        >>> accuracy.update(torch.tensor([True, False]))
        >>> accuracy.update(torch.tensor([True]))
        >>> accuracy.compute()
        tensor(66.6667, dtype=torch.float64)
    """

    def __init__(self, kind: AccuracyKind = "all_tokens", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if kind not in get_args(AccuracyKind):
            raise UserError("kind", kind, ", ".join(get_args(AccuracyKind)))
        self.kind = kind

    def update(self, correct: Tensor) -> None:
        """Add examples.

        Args:
            correct: ``[B]`` bool.

        Raises:
            TypeError: Anything but booleans, such as scores or token ids.
        """
        if correct.dtype != torch.bool:
            raise TypeError(f"correct: expected a bool tensor [B], received {correct.dtype} {list(correct.shape)}")
        self._add(correct)


class AnswerProbability(Percentage):
    """Mean probability of the answers, in percent.

    Which probability (length-normalised or not) is the choice of
    :func:`lightning_ssiuu.functional.metrics.answer_probability`. A NaN among the values makes the result NaN.

    Example:
        >>> probability = AnswerProbability()
        >>> probability.update(torch.tensor([0.5, 0.25]))
        >>> probability.compute()
        tensor(37.5000, dtype=torch.float64)
    """

    def update(self, probabilities: Tensor) -> None:
        """Add examples.

        Args:
            probabilities: ``[B]`` in [0, 1], any float type.
        """
        self._add(probabilities)


class RougeLRecall(Percentage):
    """Mean ROUGE-L recall of generated answers, in percent (Lin 2004; :mod:`lightning_ssiuu.functional.metrics`).

    Keeps sums only, never text.

    Example:
        >>> rouge = RougeLRecall()
        >>> rouge.update(["the cat", "a dog"], ["the cat", "the dog"])
        >>> rouge.compute()
        tensor(75., dtype=torch.float64)
    """

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        """Add examples.

        Args:
            predictions: B generated texts.
            references: B true answers.

        Raises:
            ValueError: Different numbers of predictions and references.
        """
        if isinstance(predictions, str) or isinstance(references, str) or len(predictions) != len(references):
            given = " and ".join(f"{type(texts).__name__} of {len(texts)}" for texts in (predictions, references))
            raise ValueError(f"predictions, references: expected two lists of the same length, received {given}")
        pairs = zip(predictions, references, strict=True)
        self._add(self.total.new_tensor([rouge_l_recall(prediction, reference) for prediction, reference in pairs]))
