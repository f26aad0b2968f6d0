"""``attack`` and ``audit`` on two processes against one, in float64: the same curves, weights, figures and flags."""

from __future__ import annotations

import csv
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import load_file
from toys.cli import files, read_json
from toys.data import Toy, byte_tokenizer, examples
from toys.models import random_model, widened
from toys.ranks import ranks

from lightning_ssiuu.__main__ import main
from lightning_ssiuu.attacks import Harmful
from lightning_ssiuu.cli.attack import attack
from lightning_ssiuu.cli.audit import audit
from lightning_ssiuu.datamodules import Splits
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import TINY, load_model
from lightning_ssiuu.training import devices
from lightning_ssiuu.training.fsdp import is_sharded

STRATEGIES = ("ddp", "fsdp2")


def _odd_data() -> Toy:
    """Sets, and shares of sets, that nothing divides."""
    return Toy(Splits(examples(0, 11, 2), examples(20, 9, 2), examples(40, 5, 2)), eval_batch_size=3)


def _load_model(checkpoint: str, dtype: Any, *args: Any, **kwargs: Any) -> Any:
    """In the type that was saved, float64, which the commands do not offer."""
    return widened(load_model(checkpoint, "auto", *args, **kwargs))


_load = devices.Devices.load


def _checked_load(self: devices.Devices, checkpoint: str, *args: Any, **kwargs: Any) -> AnswerModel:
    model = _load(self, checkpoint, *args, **kwargs)
    assert is_sharded(model) == self.sharded
    return model


@patch.object(devices, "load_model", _load_model)
@patch.object(devices.Devices, "load", _checked_load)
def _work(folder: Path, n_devices: int, *strategies: Any) -> int:
    """Attack two models, then audit two; results in ``<strategy>.<devices>``."""
    for strategy in strategies:
        where: dict[str, Any] = {"devices": devices.Devices("cpu", n_devices, strategy)}
        where["output"] = str(folder / f"{strategy}.{n_devices}")
        method = Harmful(
            p=[0.3, 0.4],  # batches of 3, and of 3 and 1: shares of 2 and 1, and of 1 and none
            learning_rates=[1e-2],
            seeds=[1],
            epochs=2,
            batch_size=3,
        )
        attack(
            str(folder / "unlearned"),
            str(folder / "oracle"),
            method,
            _odd_data(),
            score="probability",
            save_attacked=True,
            **where,
        )
        models = str(folder / "original"), str(folder / "unlearned")
        audit(*models, data=_odd_data(), probe_examples=7, alpha=0.1, **where)
    return 0


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with one and two processes' results, and what the two showed."""
    folder = tmp_path_factory.mktemp("ranks")
    for seed, name in enumerate(("original", "unlearned", "oracle")):
        random_model(seed=seed, vocab_size=260, tie_word_embeddings=True).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    _work(folder, 1, "auto")
    end = ranks(partial(_work, folder, 2, *STRATEGIES), folder / "processes", 150)
    assert end.status == 0, end.err[-3000:]
    assert end.left == []
    return folder, end.err


def _equal(given: Any, expected: Any) -> None:
    """The same structure with the same values, numbers up to what another order of summing makes of them."""
    if isinstance(expected, dict):
        assert given.keys() == expected.keys()
        for key in expected.keys() - {"wall_s", "command"}:
            _equal(given[key], expected[key])
    elif isinstance(expected, list):
        assert len(given) == len(expected)
        for one, other in zip(given, expected, strict=True):
            _equal(one, other)
    elif isinstance(expected, float):
        assert given == pytest.approx(expected, rel=1e-9, abs=1e-9)
    else:
        assert given == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["attack.json", "audit.json"])
def test_reports(results: tuple[Path, str], strategy: str, name: str) -> None:
    folder, _ = results
    given, expected = (read_json(folder / run / name) for run in (f"{strategy}.2", "auto.1"))
    if (strategy, name) == ("fsdp2", "audit.json"):  # what needs the whole model is left out there
        assert given["logit_lens"] is None
        for content in (given, expected):
            del content["logit_lens"], content["flagged"]
    _equal(given, expected)


def test_the_attack_teaches_something(results: tuple[Path, str]) -> None:
    content = read_json(results[0] / "auto.1" / "attack.json")
    assert [(curve["n_attack"], curve["n_scored"]) for curve in content["curves"]] == [(3, 8), (4, 7)] * 2
    for curve in content["curves"]:
        assert curve["forget_scores"][2] > curve["forget_scores"][1] > 1.5 * curve["forget_scores"][0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_attacked_weights(results: tuple[Path, str], strategy: str) -> None:
    two, one = (
        load_file(results[0] / run / "attacked_harmful" / "model.safetensors") for run in (f"{strategy}.2", "auto.1")
    )
    assert two.keys() == one.keys()
    for name, expected in one.items():
        assert (two[name] - expected).abs().max() < 1e-9


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_flags(results: tuple[Path, str], strategy: str) -> None:
    def flags(run: str) -> list[list[str]]:
        with (results[0] / run / "audit_spurious_neurons.csv").open(encoding="utf-8") as file:
            return sorted(row[:3] for row in csv.reader(file))

    assert len(flags("auto.1")) > 1
    assert flags(f"{strategy}.2") == flags("auto.1")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_files_are_written_and_tables_shown_once(results: tuple[Path, str], strategy: str) -> None:
    folder, shown = results
    assert files(folder / f"{strategy}.2") == files(folder / "auto.1")
    for line in ("Highest forget probability", "d_minus_total"):
        assert shown.count(line) == len(STRATEGIES)
    for chatter in ("Initializing distributed", "Warning", "SECRET"):
        assert chatter not in shown


def _attack_a_model_without_weights(folder: Path) -> int:
    options = ["--model", str(folder / "empty"), "--output", str(folder / "out"), "--attack.p", "[0.3]"]
    return main(["attack", *options, "--attack.seeds", "[0]", "--accelerator", "cpu", "--devices", "2"])


def test_a_mistake_that_all_find_late_is_told_once(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    end = ranks(partial(_attack_a_model_without_weights, tmp_path), tmp_path / "processes", 100)
    assert (end.status, end.left) == (2, [])
    (told,) = [line for line in end.err.splitlines() if "error" in line]
    assert told.startswith("lightning-ssiuu: error: model: got '")
    assert not (tmp_path / "out").exists()
