"""Save the trained model as a transformers directory that anybody can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lightning_ssiuu.evaluation.loaders import run_directory
from lightning_ssiuu.evaluation.results import check_folder
from lightning_ssiuu.models.export import plain_bytes, save_adapter, save_pretrained
from lightning_ssiuu.publishing.publication import Subject, check_hub, check_repository, publication, push
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import check_space

#: What follows the folder's name in that of the adapters alone.
ADAPTER_END = "_adapter"


class SavePretrained(L.Callback):
    """Writes ``<trainer.default_root_dir>/<folder>``: safetensors weights, configuration and tokenizer.

    The directory is either complete or absent, and plain whatever the run was: shards are gathered, adapters merged,
    quantised weights unpacked. Room on the disk for that is checked before training starts. What is written can be the
    ``checkpoint`` of another run and the model of an attack or an audit, the adapters alone, too: they are put on the
    model they were trained on, which their configuration names.

    Args:
        folder: Name below ``trainer.default_root_dir``; None saves nothing.
        adapter: With ``lora``, also write the adapters alone as ``<folder>_adapter``, in peft's format, with the
            tokenizer.
        merged: False: the adapters alone, not the merged model.
        push_to_hub: A repository ``owner/name`` of the Hugging Face hub to push the directory to when the run has
            ended, with a model card of what ``fit`` measured. It has to be empty or new. ``lightning-ssiuu publish``
            does the same later, when there are attacks and a verdict to tell of.
        private: Whether the repository on the hub is private.

    Raises:
        UserError: If ``folder`` is no plain name or that of a result, the disk has too little room or cannot be
            written, or there are no adapters to write. Before anything is trained, if nothing can be pushed: no such
            name, no token, no hub that answers, a repository that holds files.

    Example:
        >>> SavePretrained().folder
        'model'
    """

    def __init__(
        self,
        folder: str | None = "model",
        adapter: bool = False,
        merged: bool = True,
        push_to_hub: str | None = None,
        private: bool = True,
    ) -> None:
        if folder is not None:
            check_folder("saving.folder", folder)
        if push_to_hub is not None:
            if folder is None:
                raise UserError("saving.push_to_hub", push_to_hub, "null without saving.folder: nothing is saved")
            check_repository("saving.push_to_hub", push_to_hub)
        self.folder, self.adapter, self.merged = folder, adapter or not merged, merged
        self.push_to_hub, self.private = push_to_hub, private

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self.adapter and getattr(pl_module, "lora", None) is None:
            name, without = ("adapter", "false") if self.merged else ("merged", "true")
            raise UserError(f"saving.{name}", self.merged, f"{without} without lora: there are no adapters")
        if stage == "fit" and self.push_to_hub is not None and trainer.is_global_zero:
            check_hub("saving.push_to_hub", self.push_to_hub, self.private)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.folder is not None:
            needed = plain_bytes(pl_module.model.hf, self.adapter, self.merged)
            check_space("trainer.default_root_dir", run_directory(trainer), needed)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        root, hf = Path(run_directory(trainer)), pl_module.model.hf
        if self.folder is not None:
            if self.merged:
                save_pretrained(hf, pl_module.tokenizer, root / self.folder)
            if self.adapter:
                target = root / f"{self.folder}{ADAPTER_END}"
                save_adapter(hf, target, pl_module.checkpoint, pl_module.tokenizer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        # After metrics.json, which other callbacks write at the end of training.
        if self.push_to_hub is None or self.folder is None or not trainer.is_global_zero:
            return
        root = Path(run_directory(trainer))
        model = root / (self.folder if self.merged else f"{self.folder}{ADAPTER_END}")
        try:
            content = publication(root, model, Subject(self.push_to_hub), checkpoint=pl_module.checkpoint)
            push("saving.push_to_hub", self.push_to_hub, content, self.private)
        except UserError as error:
            later = f"the run is complete: lightning-ssiuu publish {root} --to {self.push_to_hub}"
            raise UserError("saving.push_to_hub", self.push_to_hub, f"{error.allowed}; {later}") from error
        print(f"Pushed to {self.push_to_hub}: {', '.join(content.files)}")
