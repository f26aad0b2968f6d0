"""Vectors of an attacker's own where a model embeds tokens, and prompts with other tokens in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.datamodules.pairs import answered, batch_of
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.training.shards import wide
from lightning_ssiuu.utils.errors import UserError

#: From a prompt's token ids and the id of its example to the token ids of another prompt.
Change = Callable[[list[int], int], list[int]]


def first_free(model: AnswerModel) -> int:
    """The first token id that a model has no embedding of."""
    layer: Any = model.hf.get_input_embeddings()
    return int(layer.weight.shape[0])


@torch.no_grad()
def embedded(model: AnswerModel) -> Tensor:
    """``[V, H]`` what a model embeds its tokens as, in float32 or wider."""
    layer: Any = model.hf.get_input_embeddings()
    return wide(layer(torch.arange(first_free(model), device=layer.weight.device)))


@contextmanager
def standing_for(model: AnswerModel, vectors: Tensor) -> Iterator[None]:
    """Inside, the token ids ``first_free(model) + m`` are embedded as rows m of ``vectors [M, H]``, with their graph.

    All passes take them, packed rows and generation too; nothing of it stays.

    Example:
        >>> from lightning_ssiuu.models.loading import load_model
        >>> model = AnswerModel(load_model("tiny"))
        >>> layer, free = model.hf.get_input_embeddings(), first_free(model)
        >>> with standing_for(model, embedded(model)[[7]]):
        ...     torch.equal(layer(torch.tensor([[5, free]])), layer(torch.tensor([[5, 7]])))
        True
    """
    layer: Any = model.hf.get_input_embeddings()
    first = first_free(model)
    waiting: list[Tensor] = []

    def before(_module: object, args: tuple[Any, ...]) -> tuple[Any, ...]:
        waiting.append(args[0])
        return args[0].where(args[0] < first, 0), *args[1:]

    def after(_module: object, _args: object, output: Tensor) -> Tensor:
        numbers = waiting.pop() - first
        own = vectors[numbers.clamp(min=0)].to(output.dtype) if len(vectors) else output
        return torch.where((numbers >= 0).unsqueeze(-1), own, output)

    with layer.register_forward_pre_hook(before), layer.register_forward_hook(after):
        yield


def reprompted(part: Part, change: Change, pad: int) -> dict[str, Any]:
    """A part of a batch whose prompts are changed, those of its options and choices too."""

    def of(one: Any, names: list[int]) -> dict[str, Any]:
        pairs = zip(answered(one), names, strict=True)
        return {**one, **batch_of([(change(prompt, name), answer) for (prompt, answer), name in pairs], pad)}

    ids = part["example_id"].tolist()
    new = of(part, ids)
    for name in ("options", "choices"):
        if name in part:
            inner: Any = part[name]
            new[name] = of(inner, [ids[row] for row in inner["option_of"].tolist()])
    return new


def refuse_cut_weights(sharded: bool) -> None:
    """Refuse strategy fsdp2, under which no device holds the embeddings that gradients are taken of."""
    if sharded:
        raise UserError("strategy", "fsdp2", "auto or ddp: this attack takes gradients of whole embeddings")
