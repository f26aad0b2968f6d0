"""Where a result comes from: versions, seed, hashes of configuration and data, device, time."""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from importlib import metadata
from typing import Any

import torch

_PACKAGES = ("lightning-ssiuu", "torch", "lightning", "transformers", "torchmetrics", "datasets", "safetensors")


def provenance(
    wall_s: float, device: torch.device | str, config: str | None = None, data_sha256: str | None = None
) -> dict[str, Any]:
    """The ``provenance`` block of every JSON file; holds no path, host name or data-set text.

    ``wall_s`` are the seconds the command took; the resolved configuration ``config`` appears as its hash only.
    """
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):  # e.g. run from a source tree that is not installed
            versions[name] = metadata.version(name)
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "versions": versions,
        "seed": int(seed) if seed is not None else None,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest() if config is not None else None,
        "data_sha256": data_sha256,
        "device": str(device),
        "wall_s": round(wall_s, 1),
    }
