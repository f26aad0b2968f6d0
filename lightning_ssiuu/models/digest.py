"""Which weights are these? A digest of a saved model that does not depend on how its files are cut."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lightning_ssiuu.models.adapter_directory import CONFIG, WEIGHTS
from lightning_ssiuu.models.loading import INDEX, adapter_base, hub_options, plain_configuration
from lightning_ssiuu.utils.console import progress
from lightning_ssiuu.utils.errors import UserError, naming
from lightning_ssiuu.utils.reading import read_json, reading

_WHOLE = "model.safetensors"
#: Of adapter_config.json: where things lie and who wrote it, which the merged weights do not depend on.
_PLACES = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type")


def weights_sha256(checkpoint: str, argument: str = "model") -> str:
    """SHA-256 over all tensors of a saved model, in the order of their names: name, type, shape and bytes.

    The same for one file and for shards, and for any metadata; another if a single bit of a weight is another. Only the
    files that are loaded count. Of a directory of adapters it is over the digest of the model they belong on, their
    options and their own tensors: another if either is another. A hub id is read from its cache, or fetched.

    Raises:
        UserError: If there is no such model, or it has no safetensors weights.

    Example:
        >>> len(weights_sha256("tiny"))
        64
    """
    with naming(argument):
        plain_configuration(checkpoint)  # also refuses adapters on each other in a circle
        base, (source, revision) = adapter_base(checkpoint), hub_options(checkpoint)
        digest = hashlib.sha256()
        if base is not None:
            digest.update(f"{weights_sha256(base, 'checkpoint')} {_options(Path(source))}\n".encode())
            files = [Path(source) / WEIGHTS]
        else:
            files = _files(_folder(source, revision.get("revision"), checkpoint), checkpoint)
        _add(digest, files, checkpoint)
    return digest.hexdigest()


def _options(folder: Path) -> str:
    # peft writes sets as lists, in any order.
    options = read_json(folder / CONFIG, "checkpoint")
    kept = {name: value for name, value in options.items() if name not in _PLACES}
    return json.dumps(
        {name: sorted(map(str, value)) if isinstance(value, list) else value for name, value in kept.items()},
        sort_keys=True,
    )


def _folder(source: str, revision: str | None, given: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = ["config.json", INDEX, "model*.safetensors"]
    with reading("checkpoint", given, "a hub id with safetensors weights, in the cache where there is no network"):
        return Path(str(snapshot_download(source, allow_patterns=patterns, revision=revision)))


def _files(folder: Path, given: str) -> list[Path]:
    # Those that transformers loads: what else lies there is another model's, or somebody wants it to be taken for this.
    name = read_json(folder / "config.json", "checkpoint").get("transformers_weights")
    if name is None:
        name = _WHOLE if (folder / _WHOLE).is_file() else INDEX
    if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
        raise UserError("checkpoint", given, "a model with safetensors weights")
    if not name.endswith(".json"):
        return [folder / name]
    return [folder / part for part in sorted(set(read_json(folder / name, "checkpoint")["weight_map"].values()))]


def _add(digest: Any, files: Iterable[Path], given: str) -> None:
    from safetensors import safe_open

    places: list[tuple[str, Path]] = []
    with reading("checkpoint", given, "safetensors files that can be read"):
        for file in files:
            with safe_open(file, framework="pt") as opened:
                places += [(name, file) for name in opened.keys()]  # noqa: SIM118 (it is no dict)
        for name, file in progress(sorted(places), "hashing"):
            with safe_open(file, framework="pt") as opened:
                values = opened.get_tensor(name)
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.contiguous().flatten().view(torch.uint8).numpy().tobytes())
