"""Directories of adapters in peft's format: which model they belong on, and that model with them merged in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.extras import check_extra
from lightning_ssiuu.utils.reading import read_json, reading

if TYPE_CHECKING:  # with it comes torch's compiler
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter_directory(folder: str | os.PathLike[str]) -> bool:
    """Whether a directory holds adapters and no model of its own."""
    return (Path(folder) / CONFIG).is_file() and not (Path(folder) / "config.json").is_file()


def base_of(folder: str | os.PathLike[str]) -> str:
    """The checkpoint that a directory's adapters were trained on, as ``adapter_config.json`` names it.

    A path that leads nowhere from the working directory is tried from the adapters' own; a revision goes with a hub id.

    Raises:
        UserError: If the file cannot be read or names none, or there are no safetensors weights beside it.
    """
    content = read_json(Path(folder) / CONFIG, "checkpoint")
    base, revision = content.get("base_model_name_or_path"), content.get("revision")
    if not isinstance(base, str) or not base:
        raise UserError("checkpoint", os.fspath(folder), f"adapters whose {CONFIG} names their base_model_name_or_path")
    if not (Path(folder) / WEIGHTS).is_file():
        raise UserError("checkpoint", os.fspath(folder), f"adapters with their weights in {WEIGHTS}")
    beside = Path(folder) / base
    if not Path(base).exists() and beside.exists():
        return str(beside)
    return f"{base}@{revision}" if isinstance(revision, str) and not Path(base).exists() else base


def with_adapters(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """A model with a directory's adapters merged into its weights, in place.

    Raises:
        UserError: If peft is missing, the adapters do not fit the model, or are of a kind that cannot be merged.
    """
    given = os.fspath(folder)
    check_extra("peft", "checkpoint", f"{given}, a directory of adapters", "a whole model")
    import peft
    from safetensors import safe_open

    with reading("checkpoint", given, "adapters that fit the model they name"):
        adapted = peft.PeftModel.from_pretrained(model, given)
        own = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            saved = set(file.keys())
    if differing := sorted(own ^ saved):
        # peft would leave out what has no place, and go on with what is missing as it was drawn.
        allowed = f"adapters that fit the model they name ({len(differing)} tensors do not, first {differing[0]})"
        raise UserError("checkpoint", given, allowed)
    return merged(adapted, "checkpoint", given)


def merged(adapted: Any, argument: str, given: object) -> PreTrainedModel:
    """The plain model of one with adapters of peft's, which are merged into its weights in place.

    Raises:
        UserError: About ``argument``, if they are of a kind that cannot be merged.
    """
    with reading(argument, given, "adapters that can be merged into the weights"):
        model = adapted.merge_and_unload(safe_merge=True)
    without_notes(model)
    return model.requires_grad_(True)


def without_notes(model: nn.Module) -> None:
    """Take peft's notes that there are adapters off a model that has none any more."""
    for module in model.modules():
        if hasattr(module, "peft_config"):
            del module.peft_config


def has_adapters(model: nn.Module) -> bool:
    """Whether a model is one of peft's, with adapters around it."""
    return hasattr(model, "merge_and_unload") and hasattr(model, "peft_config")
