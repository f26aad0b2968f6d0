"""What an adversary brings back at every measurement of the attributions: shown, harmless, left out if it must be."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.models import equal, weights
from toys.training import FewFacts, fit, ssiuu

from lightning_ssiuu.callbacks import (
    ElicitedLook,
    ElicitedStop,
    ForgetThresholdStopping,
    NeuronAttributionCallback,
    RunReport,
)
from lightning_ssiuu.datamodules import RelearnDataModule
from lightning_ssiuu.evaluation.elicitation import elicited_score
from lightning_ssiuu.utils.errors import NotFinite, UserError

ADVERSARY = ElicitedLook(share=0.5, steps=2, learning_rate=1e-3, batch_size=4)


def watch(**options: Any) -> NeuronAttributionCallback:
    return NeuronAttributionCallback(2, **{"every_n_steps": 2, "elicited": ADVERSARY} | options)


def test_it_is_the_elicited_score_and_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, data, callback = ssiuu(), FewFacts(), watch()
    fit(module, [callback, RunReport()], tmp_path, 3, data)
    fold = RelearnDataModule(data, p=0.5, batch_size=4, seed=1000)
    want = elicited_score(module.model, module.tokenizer, fold, ADVERSARY)
    assert callback.elicited_value == pytest.approx(want, rel=1e-6)
    assert [row["step"] for row in callback.history] == [2, 3]
    assert callback.history[-1]["elicited"] == callback.elicited_value != callback.history[0]["elicited"]
    with (tmp_path / "influence.csv").open(encoding="utf-8") as file:
        assert [float(row["elicited"]) for row in csv.DictReader(file)] == [row["elicited"] for row in callback.history]
    after = json.loads((tmp_path / "metrics.json").read_text())["after"]
    assert after["elicited"] == {"probability": callback.elicited_value}
    assert "forget probability, elicited" in capsys.readouterr().out


def test_training_is_the_same_without_it(tmp_path: Path) -> None:
    found = []
    for elicited in (ADVERSARY, None):
        module = ssiuu()
        fit(module, [watch(elicited=elicited, write=False)], tmp_path, 3)
        found.append(weights(module.model))
    assert equal(*found)


def test_the_stopping_has_its_own(tmp_path: Path) -> None:
    callback = watch(write=False)
    stopping = ForgetThresholdStopping(threshold=None, elicited=ElicitedStop(share=0.5, steps=1))
    fit(ssiuu(), [callback, stopping], tmp_path, 2)
    assert callback.elicited_value is None
    assert stopping.elicited_value is not None
    assert "elicited" not in callback.history[-1]


def test_it_takes_the_score_of_the_stopping(tmp_path: Path) -> None:
    callback, logged = watch(write=False), FewFacts()
    stopping = ForgetThresholdStopping(score="first_token", threshold=None)
    module = ssiuu()
    fit(module, [callback, stopping], tmp_path, 2, logged)
    fold = RelearnDataModule(logged, p=0.5, batch_size=4, seed=1000)
    assert callback.elicited_value == elicited_score(module.model, module.tokenizer, fold, ADVERSARY, "first_token")


def test_one_example_cannot_be_relearned_and_scored(tmp_path: Path) -> None:
    callback = watch(write=False)
    fit(ssiuu(), [callback], tmp_path, 2, FewFacts(1))
    assert callback.elicited_value is None
    assert callback.variation is not None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), NotFinite("elicited.learning_rate", 1.0, "less")])
def test_what_goes_wrong_does_not_end_the_run(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fail(*_: Any, **__: Any) -> float:
        asked.append(1)
        raise error

    monkeypatch.setattr("lightning_ssiuu.callbacks.elicited.elicited_score", fail)
    callback = watch()
    said = "diverges: elicited.learning_rate: got 1.0" if isinstance(error, NotFinite) else "no memory to ask"
    with pytest.warns(UserWarning, match=said):
        fit(ssiuu(), [callback], tmp_path, 3)
    assert len(asked) == 1
    assert callback.elicited_value is None
    assert (tmp_path / "influence.csv").is_file()


@pytest.mark.parametrize("kind", [ElicitedLook, ElicitedStop])
def test_mistakes_name_the_section(kind: Any) -> None:
    for given, name in (({"share": 2.0}, "share"), ({"steps": 0}, "steps"), ({"optimizer": sgd(-1.0)}, "optimizer")):
        with pytest.raises(UserError) as told:
            kind(**given)
        assert told.value.argument == f"{kind.section}.{name}"


def sgd(rate: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)
