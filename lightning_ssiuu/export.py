"""Write a trained model as a plain transformers directory, wherever its weights lie and whatever was put around them."""

from __future__ import annotations

import os

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def plain_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under their original names, on the CPU: shards gathered, adapters merged, quantised ones unpacked."""
    raise NotImplementedError


def save_pretrained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | os.PathLike[str]
) -> None:
    """Save model and tokenizer as one transformers directory, whole or not at all; every rank must call it."""
    raise NotImplementedError
