"""Batches cut anew so that a forward and a backward pass fits a memory budget, estimated from the model's shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.datamodules.pairs import answered, batch_of
from lightning_ssiuu.models.architectures import NeuronSite
from lightning_ssiuu.utils.distributed import gathered, world_size
from lightning_ssiuu.utils.errors import UserError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", re.IGNORECASE)
_PAD = 0  # masked, never a label: any token does

#: For what kernels allocate for themselves and the allocator keeps; benchmarks/attribution.py measures it.
_MARGIN = 1.15


def parse_bytes(size: int | str, argument: str = "memory_budget") -> int:
    """A size in bytes: a number, or text such as ``"2GB"`` (10⁹) or ``"512MiB"`` (2²⁰)."""
    match = _SIZE.fullmatch(str(size).strip())
    n_bytes = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if n_bytes < 1:
        raise UserError(argument, size, 'a size above 0: bytes, or text such as "2GB" or "512MiB"')
    return n_bytes


def pass_bytes(
    hf: Any,
    sites: Sequence[NeuronSite],
    rows: int,
    length: int,
    n_labels: int,
    gradients: bool = True,
    extra: int = 0,
) -> int:
    """About how many bytes one pass takes beside the weights, an upper bound for the architectures with known sites.

    Counted are, per token and layer, the outputs of all seven projections and what norms, rotations, the attention and
    the activation function keep for the backward pass; the attention's weights where they are made at all; logits,
    their log-softmax and gradients at the labelled positions (``n_labels`` in all rows); temporaries of one site; the
    aggregates; ``extra`` float32 numbers per token that the caller keeps. Without a backward pass, one layer's values
    live at a time.
    """
    config = hf.config
    # Of 16-bit models, norms and the attention's weights are kept in 32 bits, projections in 16.
    item, wide = max(3, hf.dtype.itemsize), max(4, hf.dtype.itemsize)
    width, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    attention = heads * (getattr(config, "head_dim", None) or width // heads)
    kept = layers if gradients else 1
    per_token = kept * (8 * attention + 5 * inner + 5 * width)
    made = getattr(config, "_attn_implementation", "eager") == "eager" or hf.dtype == torch.float64
    weights = kept * (2 * heads if made else 1) * length
    widest = max((site.width for site in sites), default=0)
    per_token_wide = weights + 4 * width + 4 * widest + extra
    n_bytes = rows * length * (item * per_token + wide * per_token_wide)
    n_bytes += 4 * wide * n_labels * config.vocab_size
    return int(_MARGIN * n_bytes) + 3 * 8 * sum(site.width for site in sites)


def micro_batches(
    hf: Any,
    parts: Iterable[Mapping[str, Tensor]],
    sites: Sequence[NeuronSite],
    memory_budget: int | str | None,
    extra: int = 0,
) -> Iterator[tuple[Mapping[str, Tensor], bool]]:
    """The examples of all parts in their order, batched anew so that every pass fits the budget; None: as they are.

    As many examples as fit go into a batch, whatever part they came in; padding beyond a batch's longest example goes.
    Each batch comes with whether it counts: on several ranks all get equally many, since sharded weights are gathered
    batch by batch, and a rank with fewer repeats its last one.
    """
    if memory_budget is None:
        yield from ((part, True) for part in parts)
        return
    batches: Iterable[dict[str, Tensor]] = _cut(hf, parts, sites, parse_bytes(memory_budget), extra)
    missing = 0
    if world_size() > 1:  # counted before the first pass: during them, ranks with more batches wait for this one
        batches = list(batches)
        missing = max(gathered(len(batches))) - len(batches)
    for batch in batches:
        yield batch, True
    for _ in range(missing):
        yield batch, False


def _cut(
    hf: Any, parts: Iterable[Mapping[str, Tensor]], sites: Sequence[NeuronSite], budget: int, extra: int
) -> Iterator[dict[str, Tensor]]:
    rows: list[tuple[list[int], list[int]]] = []
    longest = labels = 0
    for prompt, answer in (pair for part in parts for pair in answered(part)):
        length, own = len(prompt) + len(answer), len(answer)
        after = max(longest, length), labels + own
        if rows and pass_bytes(hf, sites, len(rows) + 1, *after, extra=extra) > budget:
            yield batch_of(rows, _PAD)
            rows, after = [], (length, own)
        if not rows and (least := pass_bytes(hf, sites, 1, length, own, extra=extra)) > budget:
            allowed = f"at least {least:,} bytes, what an example of {length} tokens needs"
            raise UserError("memory_budget", budget, allowed)
        rows.append((prompt, answer))
        longest, labels = after
    if rows:
        yield batch_of(rows, _PAD)
