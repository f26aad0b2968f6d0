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
from lightning_ssiuu.evaluation.metrics.membership import membership_auc, privleak, reference_score
from lightning_ssiuu.evaluation.metrics.truth_ratio import forget_quality, truth_ratio
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.evaluation.signals import signal_of
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.utils.console import progress

_SETS = ("forget", "test")


@dataclass
class Measured:
    """What one model says about the members (the forget set) and the others.

    ``scores`` are ``{attack: {"forget" | "test": [B]}}``, higher for what looks like a member; ``logps`` of each set,
    batch by batch, token log-probabilities, their rows and the number of rows; ``ratios`` ``[B]`` truth ratios of the
    forget set, empty where it has no wrong options.
    """

    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    logps: dict[str, list[tuple[Tensor, Tensor, int]]] = field(default_factory=dict)
    ratios: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def auc(self) -> dict[str, float]:
        return {name: 100 * membership_auc(sets["forget"], sets["test"]) for name, sets in self.scores.items()}


def measure(
    model: AnswerModel, data: UnlearningDataModule, others: Sequence[QAExample], k: float, gradient_norm: bool
) -> Measured:
    """Run every attack that needs one model: ``data``'s forget set against ``others``, never trained on."""
    measured = Measured()
    names = ["gradient_norm"] * gradient_norm + ["loss", f"min_k(k={k})", f"min_k_plus_plus(k={k})", "zlib"]
    signals = {name.partition("(")[0]: signal_of(name) for name in names}
    device = next(model.parameters()).device
    ratios = []
    for name, loader in zip(_SETS, (data.eval_dataloader("forget"), data.eval_dataloader("test", others)), strict=True):
        batches: dict[str, list[Tensor]] = {}
        with untouched(model):
            for batch in progress(loader, "membership"):
                predictions = Predictions(model, data.tokenizer, move_data_to_device(batch[name], device))
                with torch.set_grad_enabled(gradient_norm):
                    answers = predictions.answers
                scores = {attack: signal.values(predictions).detach() for attack, signal in signals.items()}
                with torch.no_grad():
                    logps, rows = answers.token_logps.detach(), (answers.sequence_index, answers.n_sequences)
                    measured.logps.setdefault(name, []).append((logps.cpu(), rows[0].cpu(), rows[1]))
                    if name == "forget" and "options" in predictions.part:
                        ratio = truth_ratio(predictions.truth_scores, predictions.option_of, answers.n_sequences)
                        ratios.append(ratio.cpu())
                for attack, values in scores.items():
                    batches.setdefault(attack, []).append(values)
        for attack, each in batches.items():
            measured.scores.setdefault(attack, {})[name] = torch.cat(each).cpu()
    measured.ratios = torch.cat(ratios) if ratios else measured.ratios
    return measured


def compare_with_oracle(unlearned: Measured, oracle: Measured) -> dict[str, Any]:
    """An unlearned model against one retrained without the forget set, measured on the same examples.

    ``reference_auc`` in percent, ``privleak`` by attack in percent (NaN where the oracle's AUC is 100) and
    ``forget_quality``, a p-value, or None without wrong options.
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
