"""Save the trained model as a transformers directory that anybody can load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ssiuu.callbacks.loaders import run_directory
from lightning_ssiuu.files import check_space, written_atomically


class SavePretrained(L.Callback):
    """Writes ``<trainer.default_root_dir>/<folder>``: safetensors weights, configuration and tokenizer.

    The directory is either complete or absent. Room on the disk is checked before training starts.

    Args:
        folder: Name below ``trainer.default_root_dir``; None saves nothing.

    Raises:
        UserError: If the disk has too little room or cannot be written.

    Example:
        >>> SavePretrained().folder
        'model'
    """

    def __init__(self, folder: str | None = "model") -> None:
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse to train what could not be saved."""
        if self.folder is not None:
            needed = sum(p.numel() * p.element_size() for p in pl_module.model.parameters())
            check_space("trainer.default_root_dir", run_directory(trainer), needed)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save, on the first rank."""
        if self.folder is not None and trainer.is_global_zero:
            save_pretrained(pl_module.model.hf, pl_module.tokenizer, Path(run_directory(trainer)) / self.folder)


def save_pretrained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | os.PathLike[str]
) -> None:
    """Save model and tokenizer as one transformers directory, whole or not at all."""
    with written_atomically(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
