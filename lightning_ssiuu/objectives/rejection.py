"""Answers that decline: what DPO prefers to the true answer, and what IDK fine-tuning teaches instead of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules.pairs import asked, batch_of
from lightning_ssiuu.datamodules.tokenization import JointTokenizer, Piece, is_end
from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.utils.errors import UserError

REJECTIONS: tuple[str, ...] = (
    "I can't answer the question.",
    "I don't know.",
    "I'm not able to help with that one.",
    "That is something I have no information about.",
    "I'm afraid I can't say.",
    "Sorry, this is beyond what I know.",
    "I have no answer to give here.",
    "Unfortunately, I know nothing about it.",
    "This isn't a question I can answer.",
    "I couldn't tell you.",
    "My knowledge doesn't cover this.",
    "I would only be guessing, so I'd rather not answer.",
    "I have never learned anything about that.",
    "There is nothing I can tell you about this.",
)

_CONTEXT = 8  # tokens of a prompt's end, which is all that its answer can touch
_AS_IT_IS = {"clean_up_tokenization_spaces": False}


def rejected(
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    rejections: Sequence[str] = REJECTIONS,
    context: int | None = None,
    name_of: Callable[[int], str] = str,
) -> Part:
    """The questions of a part with rejections for answers: a part of the same examples, ``[B, L']``.

    Which rejection an example gets depends on its id alone. It is joined to the prompt as the example's own answer
    was, and ends with the same token. An example without an answer stays as it is and without one. A
    sequence longer than ``context`` (tokens; None for any length) is a UserError, which calls the example what
    ``name_of`` makes of its id.
    """
    pairs = []
    for (prompt, answer), example in zip(asked(part), part["example_id"].tolist(), strict=True):
        completion = []
        if answer:
            completion = _joined_like(prompt, answer, rejections[example % len(rejections)], tokenizer)
        if context is not None and (length := len(prompt) + len(completion)) > context:
            allowed = f"at most {context}, what the model takes: shorten the question or the rejections"
            raise UserError("rejections", f"{length} tokens for example id {name_of(example)}", allowed)
        pairs.append((prompt, completion))
    return with_answers(part, pairs, tokenizer)


def with_answers(
    part: Part, pairs: Sequence[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The examples of a part with other token ids: of each the prompt and the answer."""
    pad = _eos(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return move_data_to_device(batch_of(pairs, pad), part["input_ids"].device) | {"example_id": part["example_id"]}


class RejectingModule(UnlearningModule):
    """An objective that teaches the model to decline; see :class:`~lightning_ssiuu.IDK` for ``rejections``."""

    reads_part_alone = False

    def __init__(self, rejections: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if rejections is not None and (not rejections or not all(text.strip() for text in rejections)):
            raise UserError("rejections", rejections, "null, or texts that say something")
        self.rejections = REJECTIONS if rejections is None else tuple(rejections)

    def rejected(self, batch: Part) -> Part:
        """The part with rejections for answers; see :func:`rejected`."""
        context = getattr(self.model.hf.config, "max_position_embeddings", None)
        name_of = getattr(getattr(self._trainer, "datamodule", None), "name_of", str)
        return rejected(batch, self.tokenizer, self.rejections, context, name_of)

    @property
    def rejections_name(self) -> str:
        """Of these rejections as a reference, so that values kept for other ones are not taken for theirs."""
        return f"rejections-{hashlib.sha256(repr(self.rejections).encode()).hexdigest()[:12]}"

    def on_train_start(self) -> None:
        for part in self.training_parts("forget"):
            self.rejected(part)  # all fit behind their questions
        super().on_train_start()


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UserError("tokenizer", type(tokenizer).__name__, "a tokenizer with an end-of-sequence token")
    return end


def _joined_like(prompt: list[int], answer: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text behind a prompt, joined to it and ended as the answer is that stands there."""
    joint = _joint(tokenizer)
    context = [Piece(str(tokenizer.decode(prompt[-_CONTEXT:], **_AS_IT_IS)))]
    *own, last = answer
    end = str(tokenizer.convert_ids_to_tokens(last)) if is_end(last, tokenizer) else ""
    spoken = str(tokenizer.decode(own if end else answer, **_AS_IT_IS))
    said = spoken.strip()
    spaces = spoken[: len(spoken) - len(spoken.lstrip())], spoken[len(spoken.rstrip()) :]

    def completion(lead: str, words: str, tail: str) -> list[int]:
        return joint(context, [Piece(lead), Piece(words, own=True), Piece(tail + end)]).completion

    leads, tails = dict.fromkeys((" ", "", spaces[0])), dict.fromkeys(("", spaces[1]))
    ways = ((lead, tail) for lead in leads for tail in tails if completion(lead, said, tail) == answer)
    # An answer that does not survive decoding says nothing of how it was joined.
    lead, tail = next(ways, ("" if context[0].text[-1:].isspace() else " ", ""))
    return [*completion(lead, text, tail), *([] if end else [_eos(tokenizer)])]


@lru_cache(maxsize=4)
def _joint(tokenizer: PreTrainedTokenizerBase) -> JointTokenizer:
    return JointTokenizer(tokenizer)
