"""Whether a model's numbers are numbers (its weights, and what it predicts), and whether its tokenizer is its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.utils.errors import Given, NotFinite, UserError

_RATE = "a smaller learning rate, clipped gradients (trainer.gradient_clip_val), or trainer.precision 32-true"
#: Text on which tokenizers of one vocabulary differ if their normalisers, splits or merges do.
_PROBE = "Question: Who wrote \u201c\u00c9mile\u201d in 1762?\nAnswer: J.-J. Rousseau,  naturally \u4e2d\u6587 \ud55c"


def check_weights(model: nn.Module, checkpoint: str) -> None:
    """Raise :class:`NotFinite` about ``checkpoint`` where a weight of its model is NaN or infinite, or has no norm."""
    if broken := not_finite(weights(model)):
        allowed = f"a model whose weights are finite numbers (not so: {len(broken)} tensors, first {broken[0]})"
        raise NotFinite("checkpoint", checkpoint, allowed)


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by name, and the scales that quantised ones are kept with."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            yield name, parameter
            continue
        quantised: Any = parameter
        state = getattr(quantised, "quant_state", None)  # 4 bits; the scales' own where they are quantised again
        for scale in (getattr(quantised, "SCB", None), getattr(getattr(state, "state2", state), "absmax", None)):
            if isinstance(scale, Tensor) and scale.is_floating_point():
                yield name, scale


@torch.no_grad()
def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors (of sharded ones this rank's part counts) that hold NaN or infinity, or overflow.

    Overflow: the Euclidean norm is infinite in float32, as a model's own norms of such weights would be. That is far
    from any weight or gradient that training can go on from.
    """
    names, norms = [], []
    for name, tensor in tensors:
        own: Tensor = getattr(tensor, "_local_tensor", tensor)
        if own.numel() and has_values(own):
            names.append(name)
            # bfloat16 reaches as far as float32, and on a CPU the norm in its own type takes a twentieth of the time.
            wide = None if own.dtype == torch.bfloat16 else torch.promote_types(own.dtype, torch.float32)
            norms.append(torch.linalg.vector_norm(own, dtype=wide))
    if not norms:
        return []
    # One transfer from the device for all.
    total = torch.stack([norm.double() if norm.device.type != "mps" else norm for norm in norms])
    if math.isfinite(total.sum().item()):
        return []
    return [name for name, finite in zip(names, total.isfinite().tolist(), strict=True) if not finite]


def check_logits(logits: Tensor) -> None:
    """Raise :class:`NotFinite` about the ``checkpoint`` where a row of logits ``[N, V]`` has NaN, or no finite maximum.

    Scores are comparisons, and none is true of NaN: a broken model would count as one that has forgotten.
    """
    check_peaks(logits.detach().amax(-1))


def check_peaks(peaks: Tensor) -> None:
    """:func:`check_logits` where the largest logits ``[N]`` are known."""
    if has_values(peaks) and not peaks.isfinite().all().item():
        allowed = "one that gives finite numbers; weights in float32 (precision 32-true) if these are too narrow"
        raise NotFinite("checkpoint", Given("a model whose predictions are NaN or infinite"), allowed)


def diverged(what: str) -> NotFinite:
    """The error that ends a training run; ``what`` says which numbers are none, and when."""
    return NotFinite("model.optimizer", Given(f"a run that diverged: {what}"), _RATE)


@contextmanager
def diverging(step: int) -> Iterator[None]:
    """Inside, a model that gives no numbers is told as a run that diverged by ``step``; before any as it is."""
    try:
        yield
    except NotFinite as error:
        if step == 0 or error.argument != "checkpoint":
            raise
        raise diverged(f"after step {step} {error.value}") from error


def has_values(tensor: Tensor) -> bool:
    """Whether there are numbers to look at: a meta tensor, or a simulation's, has none."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int | None, checkpoint: str) -> None:
    """Check that a tokenizer belongs to a model with so many embeddings (None: not known).

    A padding token without an embedding, which is masked wherever it stands, gives way to the end-of-sequence token.
    Other added tokens may lie beyond the embeddings, as an image's place in a model that reads text alone does; who
    writes such tokens finds the number of embeddings as the tokenizer's ``embedding_rows``.

    Raises:
        UserError: Where text, or the end of an answer, becomes tokens that the model has no embedding of.
    """
    tokenizer.embedding_rows = rows
    if rows is None:
        return
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = {tokenizer.bos_token, tokenizer.eos_token}
    beyond = [i for token, i in tokenizer.get_vocab().items() if i >= rows and (token in ends or token not in special)]
    if beyond:
        allowed = f"a model and its own tokenizer ({rows} embeddings, but {len(beyond)} tokens up to id {max(beyond)})"
        raise UserError("checkpoint", checkpoint, allowed)


def tokenizers_differ(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """In what two tokenizers differ, so that their models could not be compared token by token; None: in nothing.

    Padding does not count.
    """
    if one.get_vocab() != other.get_vocab():
        return "another vocabulary"
    if (one.bos_token_id, one.eos_token_id) != (other.bos_token_id, other.eos_token_id):
        return "other tokens that begin or end a text"
    added: list[dict[int, tuple[str, bool]]] = [
        {i: (token.content, token.special) for i, token in t.added_tokens_decoder.items() if i != t.pad_token_id}
        for t in (one, other)
    ]
    if any(added[0][i] != added[1][i] for i in added[0].keys() & added[1].keys()):
        return "other special tokens"
    if list(one(_PROBE)["input_ids"]) != list(other(_PROBE)["input_ids"]):
        return "another way to split text"
    return None
