"""The commands as a user runs them: what they print, what they write, and that they repeat themselves to the byte."""

from __future__ import annotations

import csv
import hashlib
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from toys.cli import DEFAULT, DRAWN, FAST, SHORT, command, default_run, files, fit, leaks, read_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ssiuu import NeuronAttributionCallback, __main__
from lightning_ssiuu.attribution.influence import CSV_HEADER

pytestmark = pytest.mark.usefixtures("few_facts")

SEEDED = (*DRAWN, "--seed_everything", "3")


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "run"
    assert fit(folder, *SEEDED).status == 0
    return folder


def test_default_recipe_forgets_and_retains() -> None:
    folder, result = default_run()
    assert result.status == 0, result.err
    metrics = read_json(folder / "metrics.json")
    before, after = metrics["before"], metrics["after"]
    assert before["forget_score"] >= 95
    assert after["forget_score"] <= 15
    assert after["retain_score"] >= 0.9 * before["retain_score"]
    assert metrics["stopped_by"] == "all_tokens <= 15 %"
    assert metrics["score"] == "all_tokens"


def test_default_recipe_writes_what_is_promised() -> None:
    folder, _ = default_run()
    written = {name for name in files(folder) if not name.startswith(("lightning_logs/", "model/"))}
    plots = {"plots/heat_maps.png", "plots/cumulative_curves.png"}
    assert written == {"metrics.json", "config.yaml", "spurious_neurons.csv", "influence.csv"} | plots
    assert {"model/model.safetensors", "model/config.json", "model/tokenizer.json"} <= files(folder)
    for plot in plots:
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")


_METRICS = {
    "objective",
    "steps",
    "stopped_by",
    "walked_back",
    "score",
    "collapsed",
    "retain_chance",
    "before",
    "after",
    "loggers",
    "provenance",
}


def test_metrics_keys() -> None:
    metrics = read_json(default_run()[0] / "metrics.json")
    assert set(metrics) == _METRICS
    influence = {"d_plus_total", "d_minus_total", "d_plus_top100", "d_minus_top100", "n_spurious"}
    for moment in ("before", "after"):
        block = metrics[moment]
        told = {"forget_score", "retain_score", "test_score", "scores", "influence"}
        assert set(block) == told | ({"elicited"} if moment == "after" else set())
        assert set(block["influence"]) == influence
        assert all(0 <= value <= 100 for split in block["scores"].values() for value in split.values())
    assert metrics["collapsed"] is False
    assert metrics["retain_chance"] == 0.0  # no question gets an answer that is its own
    provenance = metrics["provenance"]
    assert {"versions", "commit", "seed", "config_sha256", "data_sha256", "device", "wall_s"} == set(provenance)
    assert provenance["seed"] == 0


def test_spurious_neuron_table() -> None:
    folder, _ = default_run()
    with (folder / "spurious_neurons.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CSV_HEADER
    assert len(rows) == read_json(folder / "metrics.json")["after"]["influence"]["n_spurious"]


def test_saved_model_is_a_plain_transformers_directory() -> None:
    folder = default_run()[0] / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Question: Who?\nAnswer:", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]


def test_prints_the_before_after_table() -> None:
    out = default_run()[1].out
    for text in ("before", "after", "forget all_tokens", "retain all_tokens", "d_minus_total", "n_spurious"):
        assert text in out


def test_screen_shows_no_chatter() -> None:
    _, result = default_run()
    shown = result.out + result.err
    for text in ("Tip:", "LeafSpec", "args parameter", "tensorboardX", "eval mode", "Loading weights", "Traceback"):
        assert text not in shown


def test_warnings_of_our_own_are_shown(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        fit(tmp_path / "run", *FAST, "--trainer.max_steps", "1", "--attribution.probe_examples", "0")
    assert any("training ended before all_tokens fell to 15 %" in str(one.message) for one in shown)


def test_no_forget_text_is_written_or_shown() -> None:
    folder, result = default_run()
    assert leaks(folder) == []  # the tokenizer's vocabulary, the original model's, holds none of them whole either
    (folder.parent / "shown.txt").write_text(result.out + result.err, encoding="utf-8")
    assert leaks(folder.parent, but_for=("facts.json",)) == []


def test_refuses_to_overwrite_and_overwrites_when_told(short_run: Path) -> None:
    before = {name: (short_run / name).stat().st_mtime_ns for name in files(short_run)}
    refused = fit(short_run, *SEEDED)
    assert refused.status == 2
    assert refused.err == (
        f"lightning-ssiuu: error: trainer.default_root_dir: got {str(short_run)!r}, "
        "allowed: a directory without model, or --overwrite\n"
    )
    assert before == {name: (short_run / name).stat().st_mtime_ns for name in files(short_run)}
    assert fit(short_run, *SEEDED, "--overwrite").status == 0
    assert (short_run / "metrics.json").stat().st_mtime_ns > before["metrics.json"]


def test_written_config_reproduces_the_bytes(short_run: Path, tmp_path: Path) -> None:
    """The same seed through the run's own config.yaml: the same weights, and the same numbers."""
    assert fit(tmp_path / "again", recipe=short_run / "config.yaml").status == 0
    weights = "model/model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (short_run / weights).read_bytes()
    first, second = (read_json(folder / "metrics.json") for folder in (short_run, tmp_path / "again"))
    assert (first["before"], first["after"]) == (second["before"], second["after"])


def test_written_config_is_resolved_and_hashed(short_run: Path) -> None:
    text = (short_run / "config.yaml").read_bytes()
    config = yaml.safe_load(text)
    assert config["model"]["class_path"].endswith("SSIUU")
    assert config["trainer"]["max_steps"] == 2
    assert config["seed_everything"] == config["data"]["init_args"]["seed"] == 3  # a seed also orders the data
    assert read_json(short_run / "metrics.json")["provenance"]["config_sha256"] == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("name", ["validate", "test"])
def test_scoring_commands(name: str, short_run: Path, tmp_path: Path) -> None:
    model = ("--model.init_args.checkpoint", short_run / "model")
    result = command(name, "--config", DEFAULT, "--trainer.default_root_dir", tmp_path, *model)
    assert result.status == 0, result.err
    for text in ("forget/all_tokens", "retain/all_tokens", "test/probability"):
        assert text in result.out
    assert not (tmp_path / "model").exists()


def test_no_trace_of_callbacks_where_attribution_is_off(tmp_path: Path) -> None:
    assert fit(tmp_path / "run", *DRAWN, "--attribution.probe_examples", "0").status == 0
    assert not (tmp_path / "run" / "plots").exists()
    assert read_json(tmp_path / "run" / "metrics.json")["after"]["influence"] == {}


def test_help_and_version_import_nothing_heavy() -> None:
    script = """
import sys
from lightning_ssiuu.__main__ import main
assert main(["--help"]) == main(["--version"]) == main([]) == 0
assert main(["nope"]) == 2
import lightning_ssiuu
assert "SSIUU" in dir(lightning_ssiuu)
heavy = {"torch", "lightning", "transformers", "jsonargparse", "numpy", "bitsandbytes"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "attack" in done.stdout


@pytest.mark.parametrize("name", ["fit", "attack", "audit"])
def test_help_of_a_command(name: str) -> None:
    result = command(name, "--help")
    assert result.status == 0
    assert "--config" in result.out


def test_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(NeuronAttributionCallback, "on_train_batch_end", interrupted)
    try:
        result = fit(tmp_path / "run", *SHORT)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal from its first one on
    assert result.status == 130
    assert "Traceback" not in result.err
    assert not (tmp_path / "run" / "model").exists()


def test_defects_are_not_disguised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("lightning_ssiuu.cli.audit.run", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        __main__.main(["audit"])


def test_module_runs_as_a_script(tmp_path: Path) -> None:
    script = f"""
import runpy, sys
sys.argv = ["lightning_ssiuu", "attack", "--model", "no/where/at/all", "--output", {str(tmp_path / "o")!r}]
try:
    runpy.run_module("lightning_ssiuu", run_name="__main__", alter_sys=True)
finally:
    assert "bitsandbytes" not in sys.modules  # seconds of import that only quantised models need
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("lightning-ssiuu: error: model: got 'no/where/at/all'")
    assert not (tmp_path / "o").exists()


def test_threads_are_limited() -> None:
    assert torch.get_num_threads() == 1  # tests/conftest.py: the suite shares few cores


@pytest.mark.parametrize(
    ("model", "method"), [("DisplacedObjective", "displaced_gradient"), ("UnlearningModule", "forget_loss")]
)
def test_an_objective_that_is_not_written_is_refused(model: str, method: str, tmp_path: Path) -> None:
    root = ("--trainer.default_root_dir", tmp_path / "run")
    result = command("fit", "--model", model, "--data", "Facts", *root)
    assert result.status == 2
    assert result.err.splitlines()[-1].endswith(
        f"model: got '{model}', allowed: an objective that defines {method}(batch)"
    )
    assert not (tmp_path / "run").exists()
