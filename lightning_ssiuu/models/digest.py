"""Which weights are these? A digest of a saved model that does not depend on how its files are cut."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from lightning_ssiuu.models.loading import resolve_checkpoint
from lightning_ssiuu.utils.console import progress
from lightning_ssiuu.utils.errors import UserError


def weights_sha256(checkpoint: str, argument: str = "model") -> str:
    """SHA-256 over all tensors of a saved model, in the order of their names: name, type, shape and bytes.

    The same for one file and for shards, and for any metadata; another if a single bit of a weight is another.

    Raises:
        UserError: If there are no safetensors weights.

    Example:
        >>> len(weights_sha256("tiny"))
        64
    """
    from safetensors import safe_open

    folder = Path(resolve_checkpoint(checkpoint))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(folder), allow_patterns="*.safetensors"))
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)
    if not places:
        raise UserError(argument, checkpoint, "a model with safetensors weights")
    digest = hashlib.sha256()
    for name in progress(sorted(places), "hashing"):
        with safe_open(places[name], framework="pt") as opened:
            values = opened.get_tensor(name)
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
