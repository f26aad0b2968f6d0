"""Hidden states of blocks where answers are predicted: taken from the pass that runs anyway, or put in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
    hidden = at(_state(outputs[0]), model.packing, *_places(part))
    return HiddenAnswers(answers.scores, answers.targets, answers.sequence_index, answers.n_sequences, hidden)


def answers_with_all_hidden(model: AnswerModel, part: Part) -> tuple[Answers, list[Tensor]]:
    """One forward pass: its answers, and the output ``[N, H]`` of every block behind their logits."""
    states: list[Tensor] = []
    with ExitStack() as hooks:
        for block in transformer_blocks(model.hf):
            hook = block.register_forward_hook(
                lambda _block, _args, output: states.append(at(_state(output), model.packing, *_places(part)))
            )
            hooks.enter_context(hook)
        answers = model(part["input_ids"], part["attention_mask"], part["labels"])
    return answers, states


@contextmanager
def with_hidden(model: AnswerModel, part: Part, layer: int, hidden: Tensor) -> Iterator[None]:
    """Inside, block ``layer`` gives ``hidden [N, H]`` in passes over ``part`` where its N labels are predicted from.

    At all other positions it gives what it gives.
    """

    def replace(_block: Any, _args: Any, output: Any) -> Any:
        state, (rows, positions) = _state(output).clone(), _places(part)
        if model.packing is None:
            state[rows, positions] = hidden.to(state)
        else:
            state[0, model.packing.places[rows, positions]] = hidden.to(state)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    with transformer_blocks(model.hf)[layer].register_forward_hook(replace):
        yield


def _places(part: Part) -> tuple[Tensor, Tensor]:
    # The token at position k is predicted from position k − 1.
    rows, positions = (part["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    return rows, positions


def _state(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


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
