"""The callbacks: thresholds hold, training is not disturbed, nothing leaks."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from toys.models import bare_trainer, equal, weights
from toys.training import FewFacts, adam, fit, gpt2_with_dropout, ssiuu
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ssiuu.callbacks import (
    ForgetThresholdStopping,
    KeepCheckpoints,
    NeuronAttributionCallback,
    RunReport,
    SavePretrained,
)
from lightning_ssiuu.callbacks.run_report import print_before_after
from lightning_ssiuu.evaluation.scorer import Scorer, evaluate
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import written_atomically

# ---- the attribution callback ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "steps", "accumulate", "expected"),
    [(2, 4, 1, [2, 4]), (2, 5, 1, [2, 4, 5]), (None, 3, 1, [3]), (1, 2, 2, [1, 2]), (5, 3, 1, [3])],
)
def test_when_it_measures(every: int | None, steps: int, accumulate: int, expected: list[int], tmp_path: Path) -> None:
    callback = NeuronAttributionCallback(4, every_n_steps=every, write=False)
    fit(ssiuu(), [callback], tmp_path, steps, accumulate_grad_batches=accumulate)
    assert [entry["step"] for entry in callback.history] == expected
    assert list(tmp_path.iterdir()) == []
    assert callback.variation is not None
    assert callback.variation.before.n_examples == 4


def test_switched_off(tmp_path: Path) -> None:
    callback = NeuronAttributionCallback(probe_examples=0)
    fit(ssiuu(), [callback], tmp_path, 1)
    assert callback.influence() == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [{"probe_examples": -1}, {"every_n_steps": 0}, {"alpha": 0.0}, {"alpha": 1.0}])
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"attribution\.{next(iter(arguments))}"):
        NeuronAttributionCallback(**arguments)
    with pytest.raises(UserError, match=r"^checkpoints\.every_n_steps: got 0, allowed: a number ≥ 1, or null$"):
        KeepCheckpoints(every_n_steps=0)


def test_more_probes_than_examples(tmp_path: Path) -> None:
    callback = NeuronAttributionCallback(1000, write=False)
    fit(ssiuu(), [callback], tmp_path, 1)
    assert callback.variation is not None
    assert callback.variation.after.n_examples == 8


# ---- training is not disturbed -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory: pytest.TempPathFactory) -> str:
    return gpt2_with_dropout(tmp_path_factory.mktemp("dropout"))


def trajectory(checkpoint: str, callbacks: list[Any], folder: Path, seed: int = 0, data_seed: int = 0) -> list[Tensor]:
    L.seed_everything(seed, verbose=False)
    module = ssiuu(checkpoint=checkpoint)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4)  # slow: no threshold is reached
    trainer = fit(module, callbacks, folder, 4, FewFacts(tokenizer=checkpoint, seed=data_seed))
    assert trainer.global_step == 4
    return weights(module)


@pytest.mark.parametrize("model", ["tiny", "with_dropout"])
@pytest.mark.filterwarnings("ignore:.*training ended before")
def test_callbacks_change_no_bit_of_the_training(model: str, with_dropout: str, tmp_path: Path) -> None:
    checkpoint = with_dropout if model == "with_dropout" else model
    watchers: dict[str, Any] = {
        "attribution": [NeuronAttributionCallback(4, every_n_steps=1, write=False)],
        "report": [RunReport(print_table=False)],
        "stopping": [ForgetThresholdStopping("probability", 0.0, unknown="warn")],
    }
    if model == "tiny":
        watchers["generating"] = [ForgetThresholdStopping("rouge_l", 0.0)]
    else:  # where every step draws random numbers: together, and whoever draws one is seen
        watchers = {"all": [NeuronAttributionCallback(4, every_n_steps=2), *watchers["report"], *watchers["stopping"]]}
    plain = trajectory(checkpoint, [], tmp_path)
    for name, callbacks in watchers.items():
        assert equal(plain, trajectory(checkpoint, callbacks, tmp_path)), name


def test_seeds(with_dropout: str, tmp_path: Path) -> None:
    first = trajectory(with_dropout, [], tmp_path)
    assert equal(first, trajectory(with_dropout, [], tmp_path))
    assert not equal(first, trajectory(with_dropout, [], tmp_path, seed=1))
    assert not equal(first, trajectory(with_dropout, [], tmp_path, data_seed=1))


# ---- stopping ----------------------------------------------------------------------------------------------------


class Watch(L.Callback):
    """The forget set's probability after every step, measured independently of the callback under test."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        data = FewFacts()
        loader = data.eval_dataloader("forget")
        self.values.append(
            evaluate(pl_module.model, data.tokenizer, [loader], ["probability"])["forget"]["probability"]
        )


@pytest.fixture(scope="module")
def falling(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Probabilities after steps 1 to 6."""
    watch = Watch()
    fit(GradientDifference(optimizer=adam), [watch], tmp_path_factory.mktemp("falling"), 6)
    assert watch.values == sorted(watch.values, reverse=True)
    return watch.values


def stopped(threshold: Any, folder: Path, **kwargs: Any) -> tuple[int, ForgetThresholdStopping]:
    callback = ForgetThresholdStopping("probability", threshold, **kwargs)
    return fit(GradientDifference(optimizer=adam), [callback], folder, 6).global_step, callback


def test_stops_at_the_first_step_at_or_below(falling: list[float], tmp_path: Path) -> None:
    between = (falling[1] + falling[2]) / 2
    steps, callback = stopped(between, tmp_path)
    assert steps == 3
    assert callback.stopped
    assert callback.level == between
    assert callback.value == falling[2]
    assert stopped(falling[2], tmp_path)[0] == 3
    assert stopped(between, tmp_path, every_n_steps=2)[0] == 4


def test_the_report_takes_over_what_stopping_has_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[tuple[str, ...]] = []
    update = Scorer.update

    def counted(self: Scorer, batch: Any) -> None:
        scored.append(tuple(batch))
        update(self, batch)

    data, scores = FewFacts(), ["probability", "first_token"]
    alone, report = RunReport(print_table=False), RunReport(print_table=False)
    fit(GradientDifference(optimizer=adam, scores=scores), [alone], tmp_path / "a", 2, data=data)
    monkeypatch.setattr(Scorer, "update", counted)
    module, callbacks = GradientDifference(optimizer=adam, scores=scores), [ForgetThresholdStopping("probability", 0.0)]
    with pytest.warns(UserWarning, match="training ended before"):
        fit(module, [*callbacks, report], tmp_path / "b", 2, data=FewFacts())
    assert (report.before, report.after) == (alone.before, alone.after)
    # One batch before, after each step and at the end; and re-paired ones of the forget and of the retain set.
    assert len(data.eval_dataloader("forget")) == 1
    assert scored.count(("forget",)) == 1 + 2 + 1 + 1 + len(data.eval_dataloader("retain"))


def test_never_reached(falling: list[float], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"training ended before probability fell to 0 % \(last: "):
        steps, callback = stopped(0.0, tmp_path)
    assert (steps, callback.stopped) == (6, False)
    assert callback.value == falling[-1]
    assert stopped(None, tmp_path)[0] == 6


def test_already_met(tmp_path: Path) -> None:
    module = GradientDifference(optimizer=adam)
    with pytest.raises(UserError, match=r"stopping\.threshold.*before the first step"):
        fit(module, [ForgetThresholdStopping("probability", 99.9), SavePretrained()], tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert equal(weights(module.model.hf), weights(load_model("tiny")))


@pytest.mark.parametrize(
    "arguments",
    [
        {"score": "luck"},
        {"threshold": -1.0},
        {"threshold": 100.0},
        {"threshold": math.nan},
        {"threshold": "x"},
        {"every_n_steps": 0},
    ],
)
def test_bad_stopping_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"stopping\.{next(iter(arguments))}"):
        ForgetThresholdStopping(**arguments)


# ---- saving ------------------------------------------------------------------------------------------------------


def test_saved_models_load_anywhere(tmp_path: Path) -> None:
    module = ssiuu()
    fit(module, [SavePretrained()], tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert equal(weights(loaded), weights(module.model.hf))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("Question: Who?")["input_ids"] == load_tokenizer("tiny")("Question: Who?")["input_ids"]


def test_saving_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ssiuu()
    module.configure_model()

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module.tokenizer, "save_pretrained", broken, raising=False)
    with pytest.raises(OSError, match="disk full"):
        fit(module, [SavePretrained()], tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("kept")
    with pytest.raises(OSError, match="disk full"):
        fit(module, [SavePretrained()], tmp_path, 1)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["model", "model/old"]
    monkeypatch.undo()
    fit(module, [SavePretrained()], tmp_path, 1)
    assert not (tmp_path / "model" / "old").exists()
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"trainer\.default_root_dir.*MB free"):
        fit(ssiuu(), [SavePretrained()], tmp_path / "deep" / "er", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with written_atomically(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new"


# ---- the report --------------------------------------------------------------------------------------------------


def test_report_and_privacy(tmp_path: Path) -> None:
    data = FewFacts()
    callbacks = [
        NeuronAttributionCallback(8, every_n_steps=2),
        ForgetThresholdStopping("probability", 50.0),
        SavePretrained(),
        RunReport(print_table=False),
    ]
    logger = CSVLogger(tmp_path)
    trainer = fit(ssiuu(), callbacks, tmp_path, 6, data, logger=logger, log_every_n_steps=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert set(content) == {"objective", "steps", "stopped_by", "walked_back", "score", "collapsed"} | {
        *("retain_chance", "before", "after", "loggers", "provenance")
    }
    assert content["collapsed"] is False
    assert 0 < content["retain_chance"] < content["after"]["retain_score"]
    assert content["objective"] == "SSIUU"
    assert content["steps"] == trainer.global_step < 6
    assert content["stopped_by"] == "probability <= 50 %"
    influence = {"d_plus_total", "d_minus_total", "d_plus_top100", "d_minus_top100", "n_spurious"}
    for when in ("before", "after"):
        told = {"forget_score", "retain_score", "test_score", "scores", "influence"}
        assert set(content[when]) == told | ({"elicited"} if when == "after" else set())
        assert set(content[when]["influence"]) == influence
        assert set(content[when]["scores"]) == {"forget", "retain", "test"}
    assert set(content["before"]["influence"].values()) == {0.0}
    assert content["after"]["influence"]["d_plus_total"] > 0
    assert content["after"]["forget_score"] <= 50 < content["before"]["forget_score"]
    assert content["after"]["forget_score"] == content["after"]["scores"]["forget"]["probability"]
    provenance = content["provenance"]
    assert set(provenance) == {"versions", "commit", "seed", "config_sha256", "data_sha256", "device", "wall_s"}
    assert provenance["data_sha256"] == data.content_sha256()
    # No question or answer of the forget set, in whole, in any file: not even in a checkpoint's pickles.
    secrets = [text.encode() for fact in data.splits.forget for text in (fact.question, fact.answer, fact.group)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"metrics.json", "spurious_neurons.csv", "last.ckpt", "metrics.csv", "model.safetensors"} <= {
        path.name for path in files
    }
    for path in files:
        held = path.read_bytes()
        assert not [secret for secret in secrets if secret in held], path.name


def test_printed_table(capsys: pytest.CaptureFixture[str]) -> None:
    before = {"scores": {"forget": {"probability": 90.0}}, "influence": {"n_spurious": 0}}
    after = {"scores": {"forget": {"probability": 10.0}}, "influence": {"n_spurious": 2}}
    print_before_after({"objective": "SSIUU", "steps": 3, "stopped_by": "steps", "before": before, "after": after})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["SSIUU,", "3", "steps,", "stopped", "by:", "steps"],
        ["before", "after"],
        ["forget", "probability", "90.0", "10.0", "%"],
        ["n_spurious", "0", "2"],
    ]


def test_report_without_other_callbacks(tmp_path: Path) -> None:
    fit(ssiuu(scores=["first_token"]), [RunReport(print_table=False)], tmp_path, 2)
    content = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert content["score"] == "first_token"
    assert content["stopped_by"] == "steps"
    assert content["after"]["influence"] == {}


@pytest.mark.filterwarnings("ignore:.*training ended before")
def test_resuming_takes_measurements_up(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [
            NeuronAttributionCallback(4, every_n_steps=1, write=False),
            ForgetThresholdStopping("probability", "mismatched"),
            RunReport(print_table=False),
        ]

    data_seed = {"max_epochs": 2}
    whole, first, second = callbacks(), callbacks(), callbacks()
    modules = [ssiuu() for _ in range(3)]
    fit(modules[0], whole, tmp_path, -1, **data_seed)
    fit(modules[1], first, tmp_path, -1, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    trainer = bare_trainer(-1, callbacks=second, default_root_dir=tmp_path, **data_seed, check_val_every_n_epoch=10**6)
    trainer.fit(modules[2], FewFacts(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert equal(weights(modules[0]), weights(modules[2]))
    assert second[0].history == whole[0].history
    assert torch.equal(second[0].variation.d_minus, whole[0].variation.d_minus)
    assert second[0].flagged == whole[0].flagged
    assert (second[1].level, second[1].value) == (whole[1].level, whole[1].value)
    assert (second[2].before, second[2].after) == (whole[2].before, whole[2].after)


def test_scores_agree_with_validation(tmp_path: Path) -> None:
    module, data = ssiuu(), FewFacts()
    module.configure_model()
    trainer = bare_trainer(default_root_dir=tmp_path)
    trainer.validate(module, data, verbose=False)
    scores = evaluate(module.model, module.tokenizer, data.val_dataloader())
    flat = {f"{split}/{name}": value for split, each in scores.items() for name, value in each.items()}
    assert {k: pytest.approx(float(v)) for k, v in trainer.callback_metrics.items()} == flat
    with pytest.raises(UserError, match="needs options"):
        evaluate(module.model, module.tokenizer, FewFacts(multiple_choice=False).val_dataloader(), ["multiple_choice"])
    with pytest.raises(UserError, match="luck"):
        Scorer(module.model, module.tokenizer, ["luck"])
