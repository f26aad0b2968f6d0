"""Where a result comes from: versions, seed, hashes of configuration and data, device, time."""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from importlib import metadata
from typing import Any

import torch

import lightning_ssiuu
from lightning_ssiuu.utils.version import DISTRIBUTION, commit

_PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """Python's version and those of this package and what its results rest on, by name."""
    found = {"python": platform.python_version(), DISTRIBUTION: lightning_ssiuu.__version__}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):  # as where lightning is installed as pytorch-lightning
            found[name] = metadata.version(name)
    return found


def provenance(
    wall_s: float, device: torch.device | str, config: str | None = None, data_sha256: str | None = None
) -> dict[str, Any]:
    """The ``provenance`` block of every JSON file; holds no path, host name or data-set text.

    ``wall_s`` are the seconds the command took; the resolved configuration ``config`` appears as its hash only.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "versions": versions(),
        "commit": commit(),
        "seed": int(seed) if seed is not None else None,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest() if config is not None else None,
        "data_sha256": data_sha256,
        "device": str(device),
        "wall_s": round(wall_s, 1),
    }
