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
    """Answers with the hidden states they were predicted from."""

    #: ``[N, H]`` output of a block at the positions whose logits these are.
    hidden: Tensor


@contextmanager
def output_of(block: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, a list that gets the block's output ``[B, L, H]`` at each of its forward passes."""
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
    """One forward pass: logits at the labelled positions, and the output of block ``layer`` (from 0) behind them."""
    with output_of(transformer_blocks(model.hf)[layer]) as seen:
        answers = model(part["input_ids"], part["attention_mask"], part["labels"])
    # The token at position k is predicted from position k − 1.
    rows, positions = (part["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    hidden = seen[0][rows, positions]
    return HiddenAnswers(answers.logits, answers.targets, answers.sequence_index, answers.n_sequences, hidden)


def block_number(model: AnswerModel, layer: int | None, default: int) -> int:
    """The block, from 0, of an option ``layer``; None: ``default``, or the middle of a model that has no such block.

    Raises:
        UserError: If there is no such block.
    """
    n_blocks = len(transformer_blocks(model.hf))
    if layer is None:
        return default if default < n_blocks else n_blocks // 2
    if not 0 <= layer < n_blocks:
        raise UserError("layer", layer, f"a block of this model: 0 to {n_blocks - 1}, or null")
    return layer
