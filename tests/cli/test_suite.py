"""``audit --suite tofu`` from a name alone, on tiny models in directories with open-unlearning's names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from toys.cli import Result, command, read_json, write_rows

from lightning_ssiuu.datamodules import Facts
from lightning_ssiuu.models.export import save_pretrained
from lightning_ssiuu.models.loading import TINY, load_model, load_tokenizer

SMALL = (
    *("--probe_examples", "4", "--own_change", "false", "--scores", "[first_token]", "--score", "probability"),
    *("--probe.epochs", "1", "--probe.learning_rates", "[1e-3]", "--probe.seeds", "[0]", "--probe.p", "0.25"),
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TOFU's files, an original that knows them, and an oracle and two unlearned models that know nothing at all."""
    folder = tmp_path_factory.mktemp("hub")
    splits = Facts().splits
    for name, examples in (("forget10", splits.forget[:8]), ("retain90", splits.retain[:8])):
        rows = [{"question": example.question, "answer": example.answer} for example in examples]
        write_rows(folder / f"{name}.jsonl", rows)
    shutil.copytree(TINY, folder / "tofu_phi-1_5_full")
    model = load_model("tiny")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for name in ("tofu_phi-1_5_retain90", "unlearn_tofu_phi-1_5_forget10_NPO_lr1e-05", "tofu_phi-1_5_forget10_RMU"):
        save_pretrained(model, load_tokenizer("tiny"), folder / name)
    return folder


def audit(hub: Path, name: str) -> Result:
    return command("audit", "--suite", "tofu", "--unlearned", hub / name, "--suite_data", hub, *SMALL)


def test_from_a_name_to_the_verdict_and_the_oracle_is_attacked_once(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_SSIUU_CACHE", str(tmp_path / "cache"))
    result = audit(hub, "unlearn_tofu_phi-1_5_forget10_NPO_lr1e-05")
    assert result.status == 0, result.err
    content = read_json(tmp_path / "audits" / "unlearn_tofu_phi-1_5_forget10_NPO_lr1e-05" / "audit.json")
    suite = content["suite"]
    assert (suite["split"], suite["method"], suite["settings"]) == ("forget10", "NPO", {"lr": "1e-05"})
    assert suite["names"]["oracle"] == "tofu_phi-1_5_retain90"
    assert (set(content["scores"]), content["score"]) == ({"original", "unlearned", "oracle"}, "probability")
    assert "--suite tofu" in content["command"]
    assert "--probe.epochs 1 " in content["command"]
    (row,) = content["relearning"]["attacks"]
    assert row["unlearned"]["forget_score"] == row["oracle"]["forget_score"]  # the same weights, attacked apart
    assert row["gap"]["mean"] == 0.0
    (kept,) = (tmp_path / "cache" / "oracles").iterdir()
    # What is kept is what the next audit takes: marked, it shows there.
    head, *lines = kept.read_text(encoding="utf-8").splitlines()
    curves = [json.loads(line) | {"forget_scores": [1.0, 2.5]} for line in lines]
    kept.write_text("\n".join([head, *map(json.dumps, curves), ""]), encoding="utf-8")
    assert audit(hub, "tofu_phi-1_5_forget10_RMU").status == 0
    again = read_json(tmp_path / "audits" / "tofu_phi-1_5_forget10_RMU" / "audit.json")
    (other,) = again["relearning"]["attacks"]
    assert other["oracle"]["forget_score"]["per_seed"] == [2.5]
    assert other["unlearned"] == row["unlearned"]
    both = command("leaderboard", *sorted((tmp_path / "audits").iterdir()), "--output", "board")
    assert both.status == 2  # the two are the same weights
    assert "one audit per model" in both.err
    one = command("leaderboard", tmp_path / "audits" / "tofu_phi-1_5_forget10_RMU", "--output", "board")
    assert one.status == 0, one.err
    assert "TOFU forget10, phi-1_5" in (tmp_path / "board" / "leaderboard.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--unlearned", "tiny"), "unlearned: got 'tiny', allowed: a model called unlearn_tofu_MODEL_SPLIT"),
        (("--original", "tiny"), "unlearned: got None, allowed: the model that --suite is asked about"),
    ],
)
def test_what_cannot_be_found_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command("audit", "--suite", "tofu", *options)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert told in result.err
    assert list(tmp_path.iterdir()) == []


def test_without_a_suite_both_models_are_named() -> None:
    for options, told in (
        (("--unlearned", "tiny"), "original: got None"),
        (("--original", "tiny"), "unlearned: got None"),
        (("--original", "tiny", "--unlearned", "tiny", "--suite_data", "here"), "suite_data: got 'here'"),
    ):
        result = command("audit", *options)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert told in result.err
