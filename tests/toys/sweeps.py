"""Small sweeps of relearning attacks, whole and interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from toys.cli import read_json
from toys.data import Toy, byte_tokenizer, examples
from toys.models import random_model

from lightning_ssiuu.attacks import Benign, Harmful, sweep
from lightning_ssiuu.attacks.base import Attack
from lightning_ssiuu.cli.attack import attack
from lightning_ssiuu.datamodules import Splits
from lightning_ssiuu.training.devices import Devices

PARTIAL = "attack.harmful.partial.jsonl"


def save_models(folder: Path) -> Path:
    """A model to attack and an oracle, in directories of their names."""
    for seed, name in enumerate(("unlearned", "oracle")):
        model = random_model(dtype=torch.float32, seed=seed, vocab_size=260, tie_word_embeddings=True)
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


def harmful(kind: type[Attack] = Harmful, **options: Any) -> Any:
    few = {"learning_rates": [1e-2, 3e-2], "seeds": [0, 1], "epochs": 1} | ({} if kind is Benign else {"p": [0.3]})
    return kind(**(few | options))


def run(models: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Two models, two learning rates, two seeds, one epoch: eight attacks; what was found, times aside.

    Without an oracle there is no control either, unless it is asked for.
    """
    given: dict[str, Any] = {"data": Toy(Splits(examples(0, 7, 2), examples(20, 4), benign=examples(40, 3)))}
    given |= {"attack": harmful(), "score": "probability", "output": str(output), "devices": Devices("cpu")}
    given["control"] = "none"
    models_of = {"model": str(models / "unlearned"), "oracle": str(models / "oracle")}
    attack(**(models_of | given | options))
    content = read_json(output / "attack.json")
    for settings in content["settings"].values():
        del settings["provenance"]["wall_s"]
    return content


@contextmanager
def counted(module: Any, name: str) -> Iterator[list[Any]]:
    """Collects the arguments of every call."""
    calls: list[Any] = []
    original = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    with patch.object(module, name, call):
        yield calls


class FaultError(Exception):
    """Stands for whatever ends a sweep."""


def interrupted(models: Path, output: Path, after: int, **options: Any) -> None:
    """Ends after so many attacks."""
    relearn = iter([sweep.relearn] * after)

    def once(*args: Any, **kwargs: Any) -> Any:
        if (real := next(relearn, None)) is None:
            raise FaultError
        return real(*args, **kwargs)

    with patch.object(sweep, "relearn", once), pytest.raises(FaultError):
        run(models, output, **options)
