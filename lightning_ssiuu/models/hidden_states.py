"""Hidden states of one block, taken from the forward pass that runs anyway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import AnswerModel, Answers, Part
from lightning_ssiuu.models.architectures import transformer_blocks
from lightning_ssiuu.models.packing import at
from lightning_ssiuu.utils.errors import UserError


@dataclass(frozen=True)
class HiddenAnswers(Answers):
    """Answers with the hidden states they were predicted from."""

    #: ``[N, H]`` output of a block at the positions whose logits these are.
    hidden: Tensor


def answers_with_hidden(model: AnswerModel, part: Part, layer: int) -> HiddenAnswers:
    """One forward pass: logits at the labelled positions, and the output of block ``layer`` (from 0) behind them."""
    outputs: list[Any] = []
    # Nothing is computed in the hook: gradient checkpointing repeats the block, by then without it.
    handle = transformer_blocks(model.hf)[layer].register_forward_hook(lambda *call: outputs.append(call[-1]))
    try:
        answers = model(part["input_ids"], part["attention_mask"], part["labels"])
    finally:
        handle.remove()
    # The token at position k is predicted from position k − 1.
    rows, positions = (part["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    hidden = at(output, model.packing, rows, positions)
    return HiddenAnswers(answers.scores, answers.targets, answers.sequence_index, answers.n_sequences, hidden)


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
