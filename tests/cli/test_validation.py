"""Lightning's own callbacks act when they are given, and ``validate`` and ``test`` score what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys.cli import FAST, command, csv_logger, files, fit, read_json, refused

pytestmark = pytest.mark.usefixtures("few_facts")

#: Two epochs of three steps.
EPOCHS = (*FAST, "--stopping.threshold", "null", "--trainer.max_epochs", "2", "--attribution.probe_examples", "0")


def callback(name: str, **options: object) -> list[str]:
    words = [word for option, value in options.items() for word in (f"--trainer.callbacks.{option}", str(value))]
    return ["--trainer.callbacks", name, *words]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert fit(folder, *EPOCHS, "--model.init_args.optimizer.init_args.lr", "1e-3").status == 0
    return folder


def test_checkpoints_by_score(plain_run: Path, tmp_path: Path) -> None:
    watched = callback("ModelCheckpoint", monitor="forget/first_token", save_top_k=-1)
    result = fit(tmp_path / "run", *EPOCHS, "--model.init_args.optimizer.init_args.lr", "1e-3", *watched)
    assert result.status == 0, result.err
    kept = sorted((tmp_path / "run").rglob("*.ckpt"))
    assert [path.name for path in kept] == ["epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt"]
    states = torch.load(kept[1], weights_only=True)["callbacks"]
    [state] = [value for name, value in states.items() if name.startswith("ModelCheckpoint")]
    # The last one's score is the one the report has: the model of the same moment was validated.
    assert state["current_score"].item() == pytest.approx(
        read_json(tmp_path / "run" / "metrics.json")["after"]["scores"]["forget"]["first_token"]
    )
    weights = "model/model.safetensors"  # looking changes nothing
    assert (tmp_path / "run" / weights).read_bytes() == (plain_run / weights).read_bytes()


def test_early_stopping(tmp_path: Path) -> None:
    watched = callback("EarlyStopping", monitor="retain/first_token", mode="max", stopping_threshold=50)
    assert fit(tmp_path / "run", *EPOCHS, *watched).status == 0
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert (metrics["steps"], metrics["stopped_by"]) == (3, "EarlyStopping on retain/first_token")


def test_a_run_that_ends_before_the_first_validation(tmp_path: Path) -> None:
    watched = callback("EarlyStopping", monitor="retain/first_token")
    result = fit(tmp_path / "run", *EPOCHS, *watched, "--trainer.max_steps", "1")
    assert result.status == 0, result.err
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert result.err.count("`max_steps=1` reached") <= 1


def test_without_such_a_callback_nothing_is_validated(plain_run: Path) -> None:
    # By TensorBoard where it is installed, which has names as they are, too.
    logged = b"".join(path.read_bytes() for path in (plain_run / "lightning_logs").rglob("*") if path.is_file())
    assert b"train/forget_loss" in logged
    assert b"forget/first_token" not in logged


def test_the_learning_rate_is_logged(tmp_path: Path) -> None:
    monitor, logger = callback("LearningRateMonitor"), csv_logger(tmp_path / "run")
    assert fit(tmp_path / "run", *EPOCHS, *monitor, *logger, "--trainer.max_steps", "1").status == 0
    [logged] = (tmp_path / "run").rglob("metrics.csv")
    header = logged.read_text(encoding="utf-8").splitlines()[0]
    assert "lr-AdamW" in header
    assert "forget/first_token" not in header
    result = fit(tmp_path / "none", *EPOCHS, *monitor, "--trainer.logger", "false")
    refused(result, "trainer.callbacks", "LearningRateMonitor", "a logger")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("name", "monitor"), [("ModelCheckpoint", "forget/frist_token"), ("EarlyStopping", "nothing")])
def test_an_unknown_score_is_refused_before_anything_is_written(name: str, monitor: str, tmp_path: Path) -> None:
    result = fit(tmp_path / "run", *EPOCHS, *callback(name, monitor=monitor))
    refused(result, f"trainer.callbacks.{name}.monitor", monitor, "'forget/first_token'", "'train/forget_loss'")
    assert not (tmp_path / "run").exists()


def test_a_training_figure_that_never_comes_is_told(tmp_path: Path) -> None:
    result = fit(tmp_path / "run", *EPOCHS, *callback("EarlyStopping", monitor="train/nothing"))
    refused(result, "trainer.callbacks", "train/nothing", "train/forget_loss")


@pytest.mark.parametrize("name", ["validate", "test"])
def test_each_score_once_under_its_name(name: str, plain_run: Path) -> None:
    before = files(plain_run)
    result = command(name, "--config", plain_run / "config.yaml")
    assert result.status == 0, result.err
    scores = read_json(plain_run / "metrics.json")["after"]["scores"]
    assert scores["forget"]["first_token"] < 100  # or the original would do
    for split in ("forget", "retain", "test"):
        lines = [line.split() for line in result.out.splitlines() if f"{split}/first_token" in line]
        assert lines == [[f"{split}/first_token", f"{scores[split]['first_token']:.1f}", "%"]]
    assert f"Scores of {plain_run / 'model'}" in result.out
    assert files(plain_run) == before  # no lightning_logs of another version


def test_the_model_that_is_named_is_scored(plain_run: Path) -> None:
    result = command("validate", "--config", plain_run / "config.yaml", "--model.init_args.checkpoint", "tiny")
    assert result.status == 0, result.err
    assert "Scores of tiny" in result.out
    assert ["forget/first_token", "100.0", "%"] in [line.split() for line in result.out.splitlines()]
    refused(command("validate", "--config", plain_run / "config.yaml", "--ckpt_path", "last"), "ckpt_path", "'last'")
