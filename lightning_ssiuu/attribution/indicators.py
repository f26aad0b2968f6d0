"""Cheap figures of an unlearned model that may tell before any attack how much an attack brings back.

Which of them do, and how well, is in docs/evidence/attribution.md (``benchmarks/indicators.py`` measures them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.attribution.update import (
    Sketch,
    Weights,
    example_gradients,
    mean_cosine,
    norm,
    norms_by_kind,
    principal_share,
    update_between,
    weights_of,
)
from lightning_ssiuu.datamodules import QAExample, RelearnDataModule, UnlearningDataModule
from lightning_ssiuu.evaluation.elicitation import Elicitation, elicited_score
from lightning_ssiuu.evaluation.loaders import first_parts
from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.training.perturbation import displaced, place
from lightning_ssiuu.training.shards import participation
from lightning_ssiuu.utils.distributed import world_size
from lightning_ssiuu.utils.errors import UserError

#: Principal directions of the forget gradients that the update's share is taken in.
DIRECTIONS = (1, 5)
#: Of the adversaries' folds; other than an attack's, whose result they are to predict.
FOLDS = (1000, 1001)


def indicators(
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    original: Weights,
    data: UnlearningDataModule,
    adversary: Elicitation | None = None,
    strangers: Sequence[QAExample] | None = None,
    probe_examples: int = 32,
    score: str = "probability",
) -> dict[str, Any]:
    """All indicators of an unlearned model in memory, which is left as it was.

    Args:
        model: The unlearned one, with its weights whole on this process.
        tokenizer: Its tokenizer.
        original: :func:`~lightning_ssiuu.attribution.update.weights_of` the original.
        data: The data module to judge by.
        adversary: Of the elicited scores; None: :class:`Elicitation` as it is.
        strangers: Facts of the forget set's form that nobody was ever taught, for ``gain_strangers``; those with a
            question of the forget set are left out. None: no such.
        probe_examples: Forget examples for the gradients, and examples per set along the line.
        score: Of the elicited scores.

    Returns:
        ``distance`` (``‖Δ‖``), ``relative_distance`` (``‖Δ‖ / ‖θ‖``), ``distance_by_kind`` and ``participation``
        (percent) of the update; ``principal_share_1`` and ``_5``, its share (percent of ``‖Δ‖²``) in the first
        principal directions of the forget examples' gradients at the original; at the unlearned weights
        ``gradient_cosine`` (mean over pairs of forget examples) and ``gradient_norm`` (mean); ``barrier_forget`` and
        ``barrier_retain`` (:func:`barrier`, nats per token); ``elicited`` and ``elicited_early`` (after the adversary's
        steps, after three; percent, mean over :data:`FOLDS`); ``gain_strangers`` and ``gain_retain``, the score of the
        whole forget set after the adversary's steps on facts of others (percent).

    Raises:
        UserError: If the original's weights are not of this model, or there are several processes.
    """
    if world_size() > 1:
        raise UserError("devices", world_size(), "1: indicators take the weights whole")
    adversary = adversary if adversary is not None else Elicitation()
    changed = weights_of(model)
    update = update_between(original, changed)
    distance = norm(update.values())
    found: dict[str, Any] = {
        "distance": distance,
        "relative_distance": distance / norm(original.values()),
        "distance_by_kind": norms_by_kind(update),
        "participation": participation(list(update.values()), distance),
    }
    parts = {split: first_parts(data.eval_dataloader(split), split, probe_examples) for split in ("forget", "retain")}
    sketch = Sketch()
    with at_weights(model, original):
        before = example_gradients(model, parts["forget"], sketch)
    after = example_gradients(model, parts["forget"], sketch)
    step = sketch(list(update.values()))
    found |= {f"principal_share_{k}": principal_share(step, before, k) for k in DIRECTIONS}
    found |= {"gradient_cosine": mean_cosine(after), "gradient_norm": after.norm(dim=1).mean().item()}
    for split, of_split in parts.items():
        found[f"barrier_{split}"] = barrier(line(model, original, partial(mean_nll, model, of_split)))

    def elicited(steps: int, **options: Any) -> float:
        asked = replace(adversary, steps=steps)
        folds = [RelearnDataModule(data, p=asked.share, batch_size=asked.batch_size, seed=s, **options) for s in FOLDS]
        return mean(elicited_score(model, tokenizer, fold, asked, score) for fold in folds)

    forget, retain = data.splits.forget, data.splits.retain
    found["elicited"] = elicited(adversary.steps)
    found["elicited_early"] = elicited(min(3, adversary.steps))
    questions = {example.folded for example in forget}
    for name, others in (("strangers", strangers), ("retain", retain)):
        if others := [example for example in others or () if example.folded not in questions]:
            chosen = others[: max(1, round(adversary.share * len(forget)))]
            found[f"gain_{name}"] = elicited(adversary.steps, selection=partial(_instead, chosen))
    return found


def line(model: AnswerModel, original: Weights, measure: Callable[[], float], points: int = 5) -> list[float]:
    """What a measure gives on the straight line from the original's weights to the model's, ends included.

    ``points`` ≥ 2, evenly spaced. The model is left as it was.
    """
    changed = weights_of(model)
    values = []
    for t in torch.linspace(0, 1, points).tolist():
        between = {name: torch.lerp(original[name].to(w.dtype), w, t) for name, w in changed.items()}
        with at_weights(model, between):
            values.append(measure())
    return values


def barrier(values: Sequence[float]) -> float:
    """The linear-mode barrier (Frankle et al., arXiv 1912.05671): how far a loss rises above the chord of its ends.

    Example:
        >>> barrier([1.0, 3.0, 2.0]), barrier([1.0, 1.5, 2.0])
        (1.5, 0.0)
    """
    last = len(values) - 1
    return max(v - (values[0] + (values[-1] - values[0]) * number / last) for number, v in enumerate(values))


def _instead(chosen: Sequence[QAExample], forget: Sequence[QAExample], *_: Any) -> tuple[Any, Any]:
    return chosen, forget


@torch.no_grad()
def mean_nll(model: AnswerModel, parts: Iterable[Any]) -> float:
    """Mean over examples of the answer's negative log-likelihood per token, in nats."""
    device = next(model.parameters()).device
    with untouched(model):
        found = [
            -model(*(part[name].to(device) for name in ("input_ids", "attention_mask", "labels"))).mean_logps
            for part in parts
        ]
    return torch.cat(found).double().mean().item()


@contextmanager
def at_weights(model: AnswerModel, weights: Weights) -> Iterator[None]:
    """Inside, the model has these weights; after it its own, bit for bit."""
    own = dict(model.named_parameters())
    trained = {name: own[name].requires_grad for name in weights}
    for name in weights:
        own[name].requires_grad_(True)  # what is displaced is what trains
    try:
        with displaced(model) as parameters:
            by_identity = {id(p): weights[name] for name, p in own.items() if name in weights}
            place(parameters, [by_identity[id(p)].to(p.dtype) for p in parameters])
            yield
    finally:
        for name, was in trained.items():
            own[name].requires_grad_(was)
