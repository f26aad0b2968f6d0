"""Membership inference and forget quality of a model, beside an oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_ssiuu.datamodules import QAExample, UnlearningDataModule
from lightning_ssiuu.evaluation.metrics.membership import (
    gradient_norm_score,
    loss_score,
    membership_auc,
    min_k,
    min_k_plus_plus,
    privleak,
    reference_score,
    zlib_score,
)
from lightning_ssiuu.evaluation.metrics.truth_ratio import forget_quality, truth_ratio
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.utils.console import progress

_SETS = ("forget", "test")


@dataclass
class Measured:
    """What one model says about the members (the forget set) and the others.

    Args:
        scores: ``{attack: {"forget" | "test": [B]}}``, higher for what looks like a member.
        logps: Of each set, batch by batch: token log-probabilities, their rows, and the number of rows.
        ratios: ``[B]`` truth ratios of the forget set; empty where it has no wrong options.
    """

    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    logps: dict[str, list[tuple[Tensor, Tensor, int]]] = field(default_factory=dict)
    ratios: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def auc(self) -> dict[str, float]:
        return {name: 100 * membership_auc(sets["forget"], sets["test"]) for name, sets in self.scores.items()}


def measure(
    model: AnswerModel, data: UnlearningDataModule, others: Sequence[QAExample], k: float, gradient_norm: bool
) -> Measured:
    """Run every attack that needs one model.

    Args:
        model: The model.
        data: Its forget set are the members; encodes and batches.
        others: What no model was trained on.
        k: For min-k and min-k++.
        gradient_norm: Whether to take gradient norms.
    """
    found = Measured()
    device = next(model.parameters()).device
    ratios = []
    for name, loader in zip(_SETS, (data.eval_dataloader("forget"), data.eval_dataloader("test", others)), strict=True):
        kept: dict[str, list[Tensor]] = {}
        with untouched(model):
            for batch in progress(loader, "membership"):
                one = Predictions(model, data.tokenizer, move_data_to_device(batch[name], device))
                with torch.set_grad_enabled(gradient_norm):
                    answers = one.answers
                if gradient_norm:
                    gradients = gradient_norm_score(-answers.mean_logps, model.parameters())
                    kept.setdefault("gradient_norm", []).append(gradients)
                with torch.no_grad():
                    logps = answers.token_logps.detach()
                    rows = logps, answers.sequence_index, answers.n_sequences
                    kept.setdefault("loss", []).append(loss_score(*rows))
                    kept.setdefault("min_k", []).append(min_k(*rows, k))
                    spread = min_k_plus_plus(answers.logits.detach(), answers.targets, *rows[1:], k)
                    kept.setdefault("min_k_plus_plus", []).append(spread)
                    kept.setdefault("zlib", []).append(zlib_score(*rows, one.references))
                    found.logps.setdefault(name, []).append((logps.cpu(), rows[1].cpu(), rows[2]))
                    if name == "forget" and "options" in one.part:
                        ratios.append(truth_ratio(one.option_scores, one.option_of, answers.n_sequences).cpu())
        for attack, scores in kept.items():
            found.scores.setdefault(attack, {})[name] = torch.cat(scores).cpu()
    found.ratios = torch.cat(ratios) if ratios else found.ratios
    return found


def compare_with_oracle(unlearned: Measured, oracle: Measured) -> dict[str, Any]:
    """What is said of an unlearned model against one retrained without the forget set.

    Args:
        unlearned: Of :func:`measure`.
        oracle: Of :func:`measure`, on the same examples.

    Returns:
        ``reference_auc`` in percent, ``privleak`` by attack in percent (NaN where the oracle's AUC is 100) and
        ``forget_quality``.

    Example:
        >>> one = {"loss": {"forget": torch.tensor([3.0, 2.0]), "test": torch.tensor([1.0, 2.0])}}
        >>> other = {"loss": {"forget": torch.tensor([1.0]), "test": torch.tensor([1.0])}}
        >>> logps = {name: [(torch.tensor([-1.0]), torch.tensor([0]), 1)] for name in ("forget", "test")}
        >>> compare_with_oracle(Measured(one, logps), Measured(other, logps))
        {'reference_auc': 50.0, 'privleak': {'loss': -75.0}, 'forget_quality': None}
    """
    relative = {
        name: torch.cat([
            reference_score(logps, theirs, rows, n)
            for (logps, rows, n), (theirs, _, _) in zip(unlearned.logps[name], oracle.logps[name], strict=True)
        ])
        for name in _SETS
    }  # fmt: skip
    ours, theirs = unlearned.auc(), oracle.auc()
    return {
        "reference_auc": 100 * membership_auc(relative["forget"], relative["test"]),
        "privleak": {
            name: privleak(ours[name] / 100, theirs[name] / 100) if theirs[name] < 100 else math.nan for name in ours
        },
        "forget_quality": forget_quality(unlearned.ratios, oracle.ratios) if len(unlearned.ratios) else None,
    }
