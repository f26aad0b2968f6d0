"""What W&B, MLflow and TensorBoard show of a run, and of its audit afterwards; and what they are never told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from toys.cli import BARE, DEFAULT, command, leaks, read_json
from toys.loggers import MADE, MLflow, Unreachable, Wandb
from toys.reports import audit_content, variation
from toys.training import FewFacts, fit, ssiuu

from lightning_ssiuu.attribution.plots import heat_maps_figure
from lightning_ssiuu.callbacks import NeuronAttributionCallback, RunReport
from lightning_ssiuu.cli.resume import config_text
from lightning_ssiuu.cli.run_loggers import log_verdict
from lightning_ssiuu.datamodules import CustomData
from lightning_ssiuu.training.hyperparameters import for_loggers
from lightning_ssiuu.utils.figures import pixels
from lightning_ssiuu.utils.loggers import identities, reopened


@pytest.fixture(scope="module")
def loggers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Wandb, MLflow, Path, Any]:
    folder, wandb, mlflow = tmp_path_factory.mktemp("logged"), Wandb(), MLflow()
    measured = NeuronAttributionCallback(2, write=False, elicited=None)
    callbacks = [measured, RunReport(print_table=False)]
    fit(ssiuu(), callbacks, folder, 1, FewFacts(2, batch_size=2), logger=[wandb, mlflow, CSVLogger(folder)])
    return wandb, mlflow, folder, measured.variation


def test_pictures(loggers: tuple[Wandb, MLflow, Path, Any]) -> None:
    wandb, mlflow, _, measured = loggers
    assert [(name, step) for name, _, step in wandb.images] == [
        ("attribution/heat_maps", 1),
        ("attribution/cumulative_curves", 1),
    ]
    assert np.array_equal(wandb.images[0][1], pixels(heat_maps_figure(measured)))
    names = [f"attribution/{name}/step_000001.png" for name in ("heat_maps", "cumulative_curves")]
    assert [(run, name) for run, _, name in mlflow.figures] == [("r1", name) for name in names]
    assert all(isinstance(figure, Figure) for _, figure, _ in mlflow.figures)


def test_scores_before_and_after_and_what_the_run_is_called(loggers: tuple[Wandb, MLflow, Path, Any]) -> None:
    wandb, mlflow, folder, _ = loggers
    metrics = read_json(folder / "metrics.json")
    for logger in (wandb, mlflow):
        told = {step: own for step, own in logger.metrics if any(name.startswith("report/") for name in own)}
        assert set(told) == {0, 1}
        for step, moment in ((0, "before"), (1, "after")):
            scores = metrics[moment]["scores"]
            assert told[step] == {f"report/{split}_{n}": v for split, own in scores.items() for n, v in own.items()}
    assert metrics["loggers"] == ["abc", "r1", None] == identities([wandb, mlflow, CSVLogger(folder)])


def test_hyperparameters_without_text_of_the_data(loggers: tuple[Wandb, MLflow, Path, Any]) -> None:
    wandb, mlflow, _, _ = loggers
    run = wandb.hyperparameters["run"]
    assert mlflow.hyperparameters["run"] == run
    assert (run["objective"], run["data"]["class"], run["data"]["batch_size"]) == ("SSIUU", "FewFacts", 2)
    assert run["trainer"]["max_steps"] == 1
    assert {name: value for name, value in wandb.hyperparameters.items() if name != "run"} == ssiuu().hparams_initial
    own = CustomData(forget="where/secret.jsonl", retain="where/else.jsonl", system_prompt="Who is Ada?", batch_size=3)
    names = ("max_epochs", "max_steps", "precision", "world_size", "accumulate_grad_batches", "gradient_clip_val")
    trainer = SimpleNamespace(datamodule=own, **dict.fromkeys(names, 1))
    told = json.dumps(for_loggers(ssiuu(), trainer))
    assert not any(text in told for text in ("secret", "where", "Ada"))
    assert '"batch_size": 3' in told

    class Patient(FewFacts):
        def __init__(self, patient: int) -> None:
            super().__init__(2, batch_size=5)
            self.patient = patient

    trainer.datamodule = Patient(4711)
    told = json.dumps(for_loggers(ssiuu(), trainer))
    assert "4711" not in told
    assert '"batch_size": 5' in told


def test_a_csv_file_is_not_begun_anew() -> None:
    assert reopened(CSVLogger, {"save_dir": "x"}, 0) is None
    assert reopened(Wandb, {}, None) is None
    assert reopened("not.there", {}, 1) is None


def test_where_mlflow_is_reached_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning takes it for the argument's default: it would stand in config.yaml, with a password perhaps."""
    server = "https://me:password@host"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    uris = (server, "https://named.by/the/user")
    loggers = [Namespace(class_path="MLFlowLogger", init_args=Namespace(tracking_uri=uri)) for uri in uris]
    parser: Any = SimpleNamespace(dump=lambda config, **_: str(config))
    for given in (loggers, loggers[0], True, None):
        config = Namespace(trainer=Namespace(logger=given))
        text = config_text(parser, config)
        assert server not in text
        assert ("named.by" in text) == isinstance(given, list)
    assert loggers[0].init_args.tracking_uri == server  # the run itself has it


def run_with(folder: Path, *kinds: str, identities: list[Any]) -> str:
    """A run directory as far as loggers go; its model's place."""
    folder.mkdir(exist_ok=True)
    given = [{"class_path": kind, "init_args": {}} for kind in kinds]
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {"logger": given}}), encoding="utf-8")
    moment: dict[str, Any] = {"scores": {}}
    metrics = {"objective": "SSIUU", "score": "probability", "steps": 7, "before": moment, "after": moment}
    (folder / "metrics.json").write_text(json.dumps(metrics | {"loggers": identities}), encoding="utf-8")
    return str(folder / "model")


def test_the_verdict_goes_where_the_run_was_logged(tmp_path: Path) -> None:
    content, figures = audit_content(hostile=False), variation(0)
    kinds = ("lightning.pytorch.loggers.CSVLogger", "toys.loggers.Wandb", "toys.loggers.MLflow")
    model = run_with(tmp_path, *kinds, identities=[None, "w7", "m7"])
    MADE.clear()
    log_verdict(model, content, figures)
    wandb, mlflow = MADE
    assert (wandb.version, mlflow.version) == ("w7", "m7")
    label, sentence = content["verdict"]["label"], content["verdict"]["sentence"]
    assert wandb.run.summary == {"audit/verdict": label, "audit/sentence": sentence}
    assert mlflow.tags == {("m7", "audit/verdict"): label, ("m7", "audit/sentence"): sentence}
    for logger in (wandb, mlflow):
        [(step, metrics)] = logger.metrics
        assert step == 7
        assert metrics["audit/forget_probability"] == content["scores"]["unlearned"]["forget"]["probability"]
        assert metrics["audit/d_minus_total"] == content["influence"]["unlearned"]["d_minus_total"]
    assert wandb.images[0][0] == "audit/heat_maps"
    assert mlflow.figures[0][2] == "audit/heat_maps/step_000007.png"
    assert wandb.run.finished


def test_what_a_logger_cannot_take_is_a_warning(tmp_path: Path) -> None:
    kinds = [f"toys.loggers.{kind.__name__}" for kind in (Unreachable, Wandb)]
    model = run_with(tmp_path, *kinds, identities=["a", "b"])
    MADE.clear()
    with pytest.warns(UserWarning, match="not logged to Unreachable: no route to host"):
        log_verdict(model, audit_content(hostile=False), variation(0))
    assert MADE[-1].run.summary  # the next one has it
    log_verdict("tiny", {}, variation(0))  # no run
    (tmp_path / "config.yaml").write_text("trainer: {logger: true}")
    MADE.clear()
    log_verdict(model, {}, variation(0))
    assert not MADE


def test_tensorboard_by_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    result = command("fit", "--config", DEFAULT, "--config", "logger/tensorboard", *BARE)
    assert result.status == 0, result.err
    content = audit_content(hostile=False)
    log_verdict("runs/ssiuu/model", content, variation(0))
    [place] = (tmp_path / "runs" / "tensorboard").iterdir()
    events = EventAccumulator(str(place)).Reload()
    scores = {event.step: event.value for event in events.Scalars("report/forget_first_token")}
    metrics = read_json(tmp_path / "runs" / "ssiuu" / "metrics.json")
    for step, moment in ((0, "before"), (1, "after")):
        assert scores[step] == pytest.approx(metrics[moment]["scores"]["forget"]["first_token"])
    assert metrics["loggers"] == [0]
    assert events.Images("audit/heat_maps")[0].width > 0
    [sentence] = events.Tensors("audit/sentence/text_summary")
    assert sentence.tensor_proto.string_val[0].decode() == content["verdict"]["sentence"]
    told = yaml.safe_load((place / "hparams.yaml").read_text(encoding="utf-8"))
    assert told["run"]["data"]["class"] == "Facts"
    assert any(b"run/data/batch_size" in path.read_bytes() for path in place.glob("events.*"))  # the tab of them
    assert leaks(tmp_path, but_for=("tokenizer.json",)) == []
    elsewhere = tmp_path / "elsewhere"  # where no other run must get it
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.warns(UserWarning, match=r"not logged to TensorBoardLogger: there is no runs/tensorboard/version_0"):
        log_verdict("../runs/ssiuu/model", content, variation(0))
    assert not list(elsewhere.iterdir())
