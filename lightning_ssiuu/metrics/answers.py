"""Percentages over examples, right whatever the batches, the ranks and the model's precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ssiuu.errors import UserError
from lightning_ssiuu.functional.metrics import rouge_l_recall, widest_float

AccuracyKind = Literal["first_token", "all_tokens", "multiple_choice"]


class _Percentage(Metric):
    """Mean of per-example values, times 100: a sum and a count, so uneven batches and ranks weigh every example once.

    Without any example it is NaN (torchmetrics also warns): 0 would read as "all forgotten".
    """

    is_differentiable = False
    higher_is_better = None  # depends on the set: forget or retain
    full_state_update = False
    plot_lower_bound, plot_upper_bound = 0.0, 100.0

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        # Not in place: a state made in inference mode could then not be updated outside it
        self.total = self.total + values.detach().to(self.total).sum()
        self.count = self.count + values.numel()

    def compute(self) -> Tensor:
        """Percent, a scalar; NaN when nothing was added."""
        return 100 * self.total / self.count

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        # A module that is cast to bf16 casts its metrics too, and a bf16 sum stops growing at 256
        def keep_dtype(tensor: Tensor) -> Tensor:
            try:
                moved = fn(tensor)
            except TypeError:  # to MPS, which has no float64
                moved = fn(tensor.float())
            if not moved.is_floating_point():
                return moved
            return tensor.to(moved.device, widest_float(moved.device)) if moved.dtype != tensor.dtype else moved

        return super()._apply(keep_dtype, exclude_state)


class AnswerAccuracy(_Percentage):
    """Share of correct answers, in percent.

    Args:
        kind: What "correct" means; :mod:`lightning_ssiuu.functional.metrics` computes it per example
            (``answer_accuracy`` for ``"first_token"`` and ``"all_tokens"``, ``multiple_choice_accuracy``).
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


class AnswerProbability(_Percentage):
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


class RougeLRecall(_Percentage):
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
