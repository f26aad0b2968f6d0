"""Confirm flags of own change: put each unit's weights back as they were, and see whether the answer returns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssiuu.attribution.weight_change import HIDDEN, MINIMUM_COST, OwnFlag
from lightning_ssiuu.models.answers import AnswerModel, Target, target_logps
from lightning_ssiuu.models.architectures import WRITERS, NeuronSite, head_size
from lightning_ssiuu.models.loading import evaluation_mode


@contextmanager
def put_back(
    model: AnswerModel, weights: Mapping[str, Tensor], flag: OwnFlag, sites: Sequence[NeuronSite]
) -> Iterator[None]:
    """Inside, one unit of ``model`` has the weights of another model; after it, also after an exception, its own.

    Args:
        model: The model.
        weights: :func:`~lightning_ssiuu.attribution.weight_change.site_weights` of the other.
        flag: Names the unit.
        sites: Of the model.
    """
    by_key = {site.key: site for site in sites}
    heads = head_size(model.hf.config)
    places: list[tuple[Tensor, Any, Tensor]] = []
    for kind in flag.kinds:
        site = by_key[flag.layer, kind]
        row = flag.index if site.columns is None else int(site.columns[flag.index])
        places += _places(model, weights, site, row)
    writer = by_key.get((flag.layer, "mlp_down" if flag.kinds[0] in HIDDEN else "attn_o"))
    if writer is not None and flag.kinds[0] in (*HIDDEN, "attn_v"):
        width = by_key[flag.layer, flag.kinds[0]].width
        (weight, _, other), *_ = _places(model, weights, writer, 0)
        places.append((weight, _crossing(flag.kinds[0], flag.index, weight, width, heads), other))
    kept = [(tensor, where, tensor[where].clone()) for tensor, where, _ in places]
    with torch.no_grad():
        try:
            for tensor, where, other in places:
                tensor[where] = other[where].to(tensor)
            yield
        finally:
            for tensor, where, values in reversed(kept):
                tensor[where] = values


def _places(
    model: AnswerModel, weights: Mapping[str, Tensor], site: NeuronSite, row: int
) -> list[tuple[Tensor, Any, Tensor]]:
    module = model.hf.get_submodule(site.module_name)
    straight = isinstance(module, nn.Linear)  # Conv1D: [in, out]
    found = []
    for name, parameter in module.named_parameters(recurse=False):
        other = weights[f"{site.module_name}.{name}"]
        turn = parameter.ndim == 2 and not straight
        found.append((parameter.data.T if turn else parameter.data, row, other.T if turn else other))
    return found


def confirmed(
    model: AnswerModel,
    original: Mapping[str, Tensor],
    flags: Sequence[OwnFlag],
    parts: Sequence[Mapping[str, Tensor]],
    sites: Sequence[NeuronSite],
    target: Target = "length_normalised",
    minimum_cost: float = MINIMUM_COST,
) -> list[OwnFlag]:
    """Those flags whose unit, put back as it was in the original, brings the answers' probability back by a share.

    One forward pass per flag and batch.

    Args:
        model: The changed model; its weights are as before on return.
        original: :func:`~lightning_ssiuu.attribution.weight_change.site_weights` of the original.
        flags: From :func:`~lightning_ssiuu.attribution.weight_change.own_flags`.
        parts: The forget batches.
        sites: Of the model.
        target: See :func:`~lightning_ssiuu.models.answers.target_logps`.
        minimum_cost: Keep a flag if ``1 − P / P(unit put back)``, P the mean over examples, is at least this.

    Returns:
        The flags that hold, with the cost that was measured, ``log(P(unit put back) / P)``; largest first.
    """
    now = _log_mean(model, parts, target)
    kept = []
    for flag in flags:
        with put_back(model, original, flag, sites):
            cost = _log_mean(model, parts, target) - now
        if cost >= -math.log1p(-minimum_cost):
            kept.append(replace(flag, cost=cost))
    return sorted(kept, key=lambda flag: -flag.cost)


def _log_mean(model: AnswerModel, parts: Sequence[Mapping[str, Tensor]], target: Target) -> float:
    device = next(model.parameters()).device
    logps = []
    with torch.inference_mode(), evaluation_mode(model):
        for part in parts:
            inputs = {name: part[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
            logps.append(target_logps(model(**inputs), target).double())
    values = torch.cat(logps)
    return (values.logsumexp(0) - math.log(len(values))).item()


def _crossing(kind: str, index: int, writes: Tensor, width: int, head_size: int) -> Any:
    """Where a unit's entries are in the matrix ``[out, in]`` that it writes through: a row or columns."""
    if kind in WRITERS:
        return index
    if kind in HIDDEN:
        return slice(None), index
    readers = writes.shape[1] // width
    first = index // head_size * readers
    return slice(None), [(first + head) * head_size + index % head_size for head in range(readers)]
