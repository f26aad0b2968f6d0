"""An architecture of one's own: a type not in the table, a user's file, the console script, an empty directory."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from toys.cli import DEFAULT, DRAWN, command, fit, read_json, script
from transformers import AutoModelForCausalLM, PhiConfig

from lightning_ssiuu import ARCHITECTURES
from lightning_ssiuu.models.loading import TINY

pytestmark = pytest.mark.usefixtures("few_facts")

USERS_FILE = """\
from lightning_ssiuu import Architecture
NAMES = {"attn_q": "self_attn.q_proj", "attn_o": "self_attn.dense", "mlp_up": "mlp.fc1", "mlp_down": "mlp.fc2"}
PHI = Architecture("model.layers", "model.final_layernorm", NAMES, plain_head=True)
"""
RECORD = {
    "blocks": "model.layers",
    "final_norm": "model.final_layernorm",
    "modules": {"mlp_up": "mlp.fc1", "mlp_down": "mlp.fc2"},
}
TRAINED = (*DRAWN, "--stopping.unknown", "warn", "--attribution.alpha", "0.3", "--model.init_args.checkpoint", "model")


def save_phi(folder: Path) -> None:
    sizes = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 128}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = PhiConfig(num_hidden_layers=2, num_attention_heads=4, initializer_range=0.15, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_phi(tmp_path / "model")
    (tmp_path / "my_architectures.py").write_text(USERS_FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kinds(table: Path) -> set[str]:
    with table.open(encoding="utf-8") as file:
        return {row["module"] for row in csv.DictReader(file)}


def test_from_an_empty_directory(workplace: Path) -> None:
    assert len(USERS_FILE.splitlines()) <= 3

    def run(*args: str | Path) -> str:
        done = script(workplace, *args)
        assert done.status == 0, done.err
        return done.out + done.err

    assert "phi" not in ARCHITECTURES
    record = ("--model.init_args.architecture", "my_architectures.PHI")
    shown = run("fit", "--config", DEFAULT, *TRAINED, "--trainer.default_root_dir", "run", *record)
    assert shown.count("phi: no neurons of the kinds attn_k, attn_v") == 1
    assert "own logits" not in shown
    flagged = kinds(workplace / "run" / "spurious_neurons.csv")
    assert flagged
    assert flagged <= {"attn_q", "attn_o", "mlp_up", "mlp_down"}
    assert read_json(workplace / "run" / "metrics.json")["after"]["influence"]["n_spurious"] > 0
    # The run's configuration tells what the saved model is like.
    options = ("--original", "model", "--unlearned", "run/model", "--relearning_probe", "false", "--alpha", "0.3")
    run("audit", *options, "--probe_examples", "8")
    audited = kinds(workplace / "run" / "audit_spurious_neurons.csv")
    assert audited
    assert audited <= {"attn_q", "attn_o", "mlp_up", "mlp_down"}


def test_from_a_recipe(workplace: Path) -> None:
    recipe = workplace / "phi.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"init_args": {"architecture": RECORD}}}))
    result = fit(workplace / "run", "--config", recipe, *TRAINED)
    assert result.status == 0, result.err
    assert kinds(workplace / "run" / "spurious_neurons.csv") <= {"mlp_up", "mlp_down"}
    kept = yaml.safe_load((workplace / "run" / "config.yaml").read_text())["model"]["init_args"]["architecture"]
    assert kept == RECORD
    options = ("--model", "run/model", "--attack", "Quantization", "--attack.widths", "[8bit]")
    assert command("attack", *options).status == 0
    options = ("--original", "model", "--unlearned", "run/model", "--relearning_probe", "false")
    assert command("audit", *options, "--probe_examples", "8", "--output", "own").status == 0


def test_what_users_can_get_wrong(workplace: Path) -> None:
    options = [
        ("my_architectures.NO", "architecture: got 'my_architectures.NO'"),
        ("phi", "architecture: got 'phi', allowed: one of ['"),
        ("{blocks: model.layers}", "architecture: got ['blocks'], allowed: a record with the fields"),
        ("{blocks: b, final_norm: n, modules: {mlp: m}}", "architecture.modules: got ['mlp']"),
        ("{blocks: b, final_norm: n, modules: {mlp_up: m}}", "architecture: got 'b', allowed: names of modules"),
    ]
    for value, message in options:
        result = fit(workplace / "run", *TRAINED, "--model.init_args.architecture", value)
        assert result.status == 2
        assert message in result.err.strip().splitlines()[-1]
        assert not (workplace / "run").exists()
    given = ("--original", "tiny", "--unlearned", "tiny", "--output", "run", "--architecture", "phi")
    assert command("audit", *given).err.strip().startswith("lightning-ssiuu: error: architecture: got 'phi'")
    result = command("audit", *given[:-1], "{blocks: model.layers, final_norm: n, modules: {mlp_up: mlp.up_proj}}")
    assert "architecture: got 'n', allowed: names of modules of this llama" in result.err
