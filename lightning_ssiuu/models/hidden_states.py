"""Hidden states of one block, taken from the forward pass that runs anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_ssiuu.models.answers import AnswerModel, Answers, Part
from lightning_ssiuu.models.architectures import transformer_blocks
from lightning_ssiuu.utils.errors import UserError


@dataclass(frozen=True)
class HiddenAnswers(Answers):
    """Answers with the hidden states they were predicted from.

    Args:
        hidden: ``[N, H]`` output of a block at the positions whose logits these are.
    """

    hidden: Tensor


@contextmanager
def output_of(block: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, a list that gets the block's output ``[B, L, H]`` at each of its forward passes; the hook never stays.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> with output_of(layer) as seen:
        ...     output = layer(torch.ones(1, 2))
        >>> seen[0] is output, len(layer._forward_hooks)
        (True, 0)
    """
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Any) -> None:
        # Nothing is computed here: gradient checkpointing repeats the block, by then without this hook.
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def answers_with_hidden(model: AnswerModel, part: Part, layer: int) -> HiddenAnswers:
    """One forward pass: logits at the labelled positions, and a block's output where those are predicted from.

    Args:
        model: The model.
        part: ``input_ids, attention_mask, labels``, each ``[B, L]``.
        layer: Block number, from 0.

    Example:
        >>> import torch
        >>> from lightning_ssiuu.models.loading import load_model
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> part = {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": torch.tensor([[-100, -100, 7, 8]])}
        >>> answers_with_hidden(AnswerModel(load_model("tiny")), part, 1).hidden.shape
        torch.Size([2, 128])
    """
    with output_of(transformer_blocks(model.hf)[layer]) as seen:
        answers = model(part["input_ids"], part["attention_mask"], part["labels"])
    # The token at position k is predicted from position k − 1.
    rows, positions = (part["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    hidden = seen[0][rows, positions]
    return HiddenAnswers(answers.logits, answers.targets, answers.sequence_index, answers.n_sequences, hidden)


def block_number(model: AnswerModel, layer: int | None, default: int) -> int:
    """Which block an option means.

    Args:
        model: The model.
        layer: As the user wrote it; None takes ``default``, or the middle of a model that has no such block.
        default: Block number, from 0.

    Raises:
        UserError: If there is no such block.

    Example:
        >>> from lightning_ssiuu.models.loading import load_model
        >>> block_number(AnswerModel(load_model("tiny")), None, 7)  # of four blocks
        2
    """
    n_blocks = len(transformer_blocks(model.hf))
    if layer is None:
        return default if default < n_blocks else n_blocks // 2
    if not 0 <= layer < n_blocks:
        raise UserError("layer", layer, f"a block of this model: 0 to {n_blocks - 1}, or null")
    return layer
