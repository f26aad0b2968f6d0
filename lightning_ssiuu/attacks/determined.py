"""What determines the curves of a relearning attack, and curves of an oracle that are kept for the next model.

An oracle is attacked alike beside every model that was unlearned on its data: its curves lie in the user's cache
(``LIGHTNING_SSIUU_CACHE``, or ``~/.cache/lightning_ssiuu``) under a digest of the weights, the data and the attack.
There are numbers in them, and no text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch
import transformers

import lightning_ssiuu
from lightning_ssiuu.attacks.base import Target
from lightning_ssiuu.attacks.records import FinishedAttacks, checkpoint_fingerprint, fingerprint
from lightning_ssiuu.attacks.relearning import Relearning
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.files import cache_directory


def determined(
    attack: Relearning,
    targets: Sequence[Target],
    models: Mapping[str, str],
    data: UnlearningDataModule,
    score: str,
    devices: Devices,
) -> dict[str, Any]:
    """JSON values that determine the curves: ``models`` are checkpoints by name, ``targets`` what is attacked."""
    encoder = data.encoder
    return {
        "attack": [f"{type(attack).__module__}.{type(attack).__qualname__}", attack.name, attack.options()],
        "score": score,
        "data": data.content_sha256(),
        "selected": [cell.splits.sha256() for target in targets for cell in attack.cells(target.data or data)],
        "encoding": [encoder.rendering, encoder.max_length, data.multiple_choice],
        "eval_batch_size": data.eval_batch_size,
        "models": {name: checkpoint_fingerprint(checkpoint) for name, checkpoint in models.items()},
        "devices": [devices.device.type, devices.n_ranks, devices.sharded, devices.precision],
        "versions": [package.__version__ for package in (lightning_ssiuu, torch, lightning, transformers)],
    }


def kept_curves(
    attack: Relearning, target: Target, data: UnlearningDataModule, score: str, devices: Devices
) -> FinishedAttacks:
    """The log of an oracle's attacks that are kept, with what is finished of them; on launched devices."""
    key = fingerprint(determined(attack, [target], {target.name: target.checkpoint}, data, score, devices))
    log = FinishedAttacks(cache_directory() / "oracles" / f"{key}.jsonl", key)
    finished = gathered(log.read())[0]
    log.anew, log.finished = finished is None, finished or {}
    return log
