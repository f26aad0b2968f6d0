"""Sequences of a batch in one row without padding, each of which attends to itself alone.

The row goes through transformers' own interfaces: position ids, and an attention function by name
(:data:`NAME`) that lays queries, keys and values out sequence by sequence and calls transformers' SDPA attention.
FlashAttention and flex attention find the sequences by their positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssiuu.models.loading import evaluation_mode

#: What ``config._attn_implementation`` is while a model's rows may be packed; as "sdpa" where they are not.
NAME = "sdpa_packed"
#: Kernels that find the sequences by their positions, by how their names begin.
BY_POSITION = ("flash_attention_", "flex_attention")
#: Largest difference of logits in parts of the largest one; other types round more.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_packed: ContextVar[bool] = ContextVar("packed", default=False)


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of ``[B, L]`` sequences stand in a row of T.

    Args:
        flat: ``[T]`` place of each token of the row among the B · L.
        places: ``[B, L]`` place in the row of each token; 0 for those left out.
        shares: Whether tokens stand in the row once for several sequences.
    """

    flat: Tensor
    places: Tensor
    shares: bool = False

    @classmethod
    def of(cls, needed: Tensor, input_ids: Tensor | None = None) -> Packing:
        """Pack the tokens ``needed`` (``[B, L]`` bool, of each sequence the first ones).

        Given ``input_ids``, a sequence shares what it and the one before it begin with: the prompt of a question's
        options, the system turn of all questions.
        """
        own = needed.clone()
        if input_ids is not None:
            alike = (input_ids[1:] == input_ids[:-1]) & needed[1:] & needed[:-1]
            own[1:] &= ~alike.cumprod(1).bool()
        flat = own.flatten().nonzero().squeeze(1)
        places = (own.flatten().cumsum(0) - 1).view_as(own)
        if shares := bool((own != needed).any()):
            # Where each token stands: in the last of the sequences up to its own that has one of its own there.
            rows = torch.arange(len(own), device=own.device).unsqueeze(1)
            places = places.gather(0, rows.where(own, 0).cummax(0).values)
        return cls(flat, places.where(needed, 0), shares)

    @cached_property
    def sequences(self) -> Tensor:
        """``[T]`` the sequence of each token of the row (the first of those that share it)."""
        return self.flat // self.places.shape[1]

    def row(self, values: Tensor) -> Tensor:
        """``[1, T, ...]`` out of ``[B, L, ...]``."""
        return values.flatten(0, 1).index_select(0, self.flat).unsqueeze(0)

    def apart(self, row: Tensor) -> Tensor:
        """``[B, L, ...]`` out of ``[1, T, ...]``; zero, or what stands first in the row, where a token is left out."""
        if self.shares:
            return row[0][self.places]
        apart = row.new_zeros((self.places.numel(), *row.shape[2:])).index_copy(0, self.flat, row[0])
        return apart.view(*self.places.shape, *row.shape[2:])


def apart(values: Tensor, packing: Packing | None) -> Tensor:
    """What a layer gave in a pass, as ``[B, L, ...]``; ``packing`` is that of the pass, None where it was padded."""
    return values if packing is None else packing.apart(values)


def at(values: Tensor, packing: Packing | None, sequences: Tensor, positions: Tensor) -> Tensor:
    """What a layer gave in a pass, ``[N, ...]``, at N positions of sequences."""
    if packing is None:
        return values[sequences, positions]
    return values[0].index_select(0, packing.places[sequences, positions])


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    if packing is None:
        return sdpa(module, query, key, value, attention_mask, **options)
    # [1, heads, T, D] to [B, heads, L, D]. Nothing stands before a sequence's own tokens: causality is mask enough.
    query, key, value = (packing.apart(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
    output, _ = sdpa(module, query, key, value, None, **options | {"is_causal": True})
    return packing.row(output), None


def _mask(*args: Any, **options: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    return None if _packed.get() else sdpa_mask(*args, **options)


@cache
def register() -> None:
    """Make the attention function known to transformers under its name."""
    # Not before there is a model: with these modules of transformers comes torch's compiler.
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


def run_packed(module: nn.Module, hf: Any, packing: Packing, input_ids: Tensor) -> Any:
    """The output of a transformers model (or its base model ``module``) for a packed row (:func:`takes_rows`)."""
    length = packing.places.shape[1]
    inputs: dict[str, Any] = {"input_ids": packing.row(input_ids), "position_ids": (packing.flat % length).unsqueeze(0)}
    if hf.config._attn_implementation == NAME:
        inputs["packing"] = packing
    token = _packed.set(True)
    try:
        return module(**inputs, use_cache=False)
    finally:
        _packed.reset(token)


def takes_rows(hf: Any, shared: bool = False) -> bool:
    """Whether a model's attention, as it is set now, is one for packed rows; ``shared``: of shared tokens, too.

    Those that go by position take a token that does not follow the one before it for the beginning of a sequence.
    """
    name = getattr(hf.config, "_attn_implementation", None)
    return name == NAME or (not shared and str(name).startswith(BY_POSITION))


def allow_packing(hf: Any) -> str | None:
    """Have a model take packed rows; returns why it cannot, None if it can.

    Whether it gives what it gives for padded rows is tried out where there are weights to try with, for models of one
    configuration once in a process: a sweep of attacks loads one after the other.
    """
    register()
    before = getattr(hf.config, "_attn_implementation", None)
    if before == NAME:
        return None
    if before != "sdpa" and not takes_rows(hf):
        return f"attention is {before}"
    if not hf._can_set_attn_implementation():
        return "its attention is not one of transformers' functions"
    weight = hf.get_input_embeddings().weight
    has_values = type(weight) is nn.Parameter and not weight.is_meta
    hf.config._attn_implementation = NAME
    # A model that was made, or is used, in inference mode has no gradients: its values alone are tried.
    graphs = has_values and not (torch.is_inference_mode_enabled() or weight.is_inference())
    kind = _kind(hf, before) if graphs else None
    keeps_apart = not graphs or kind in _allowed or _keeps_apart(hf)
    if before != "sdpa":
        hf.config._attn_implementation = before
    if keeps_apart and (not has_values or kind in _allowed or _gives_the_same(hf)):
        if kind is not None and kind not in _allowed and all(map(_says_something, hf.parameters())):
            _allowed.add(kind)  # not what a layer without weights gave, which says nothing of the next model's
        return None
    hf.config._attn_implementation = before
    return "packed rows give other values"


#: Kinds of models that take packed rows, as was tried out.
_allowed: set[tuple[Any, ...]] = set()


def _kind(hf: Any, attention: str | None) -> tuple[Any, ...] | None:
    """What tells how a model treats a row, whatever its weights; None where that is not all, as it has hooks."""
    modules = list(hf.modules())
    if any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in modules):
        return None
    config = {name: value for name, value in hf.config.to_dict().items() if name != "_name_or_path"}
    return repr(config), attention, hf.dtype, hf.device.type, *(type(m).forward for m in modules)


def _says_something(weight: Tensor) -> bool:
    # Whether it is no matrix of zeros, told at the first other value.
    return weight.dim() < 2 or not torch.equal(weight, weight.new_zeros(()).expand_as(weight))


# Two sequences of unequal length, and two with one beginning.
_IDS = [[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [4, 5, 6, 9, 0]]
_LENGTHS = [3, 5, 4]


def _trial(hf: Any) -> tuple[Tensor, Tensor]:
    ids = torch.tensor(_IDS, device=hf.device) % hf.get_input_embeddings().num_embeddings
    return ids, torch.arange(ids.shape[1], device=hf.device) < ids.new_tensor(_LENGTHS).unsqueeze(1)


@torch.enable_grad()
def _keeps_apart(hf: Any) -> bool:
    """Whether no token is seen by those of later sequences: convolutions and recurrent layers go along the row.

    It shows in a gradient that is not zero, also where values differ by less than a narrow type rounds.
    """
    inputs: list[Tensor] = []

    def begin(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[0].clone()  # models may change it in place

    ids, needed = _trial(hf)
    handle = hf.get_input_embeddings().register_forward_hook(begin)
    try:
        with evaluation_mode(hf):
            later = run_packed(hf, hf, Packing.of(needed), ids).logits[:, _LENGTHS[0] :]
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(later.float().square().sum(), inputs)
    return not gradient[:, : _LENGTHS[0]].any()


@torch.no_grad()
def _gives_the_same(hf: Any) -> bool:
    ids, needed = _trial(hf)
    packing = Packing.of(needed, ids if takes_rows(hf, shared=True) else None)
    with evaluation_mode(hf):
        own = hf(input_ids=ids, attention_mask=needed.long(), use_cache=False).logits
        row = run_packed(hf, hf, packing, ids).logits
    difference = (packing.apart(row) - own)[needed].abs().max()
    return bool(difference <= _TOLERANCE.get(hf.dtype, 0.05) * own[needed].abs().max())


def longest_packed(config: Any) -> int | None:
    """Longest sequence that every layer sees whole; None where there is no limit."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((limit for limit in limits if limit), default=None)


@contextmanager
def padded(model: Any) -> Iterator[None]:
    """Inside, an :class:`~lightning_ssiuu.models.answers.AnswerModel` runs batches as they are, padding and all."""
    before, model.packs = model.packs, False
    try:
        yield
    finally:
        model.packs = before
