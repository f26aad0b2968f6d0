"""``audit``: nothing between a model and itself, and what unlearning leaves between a model and its origin."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
from cli_tools import command, default_run, files, leaks, read_json

from lightning_ssiuu.callbacks.neuron_attribution import CSV_HEADER

FEW = ("--probe_examples", "8", "--scores", "[first_token, probability]")


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    same = ("--original", "tiny", "--unlearned", "tiny", "--after_attack", "tiny")
    result = command("audit", *same, "--output", tmp_path, *FEW)
    assert result.status == 0, result.err
    content = read_json(tmp_path / "audit.json")
    assert set(content["influence"]) == {"unlearned"}
    assert all(value == 0 for value in content["influence"]["unlearned"].values())
    assert content["attribution_correlation"] == pytest.approx(1.0, abs=1e-6)
    assert content["scores"]["original"] == content["scores"]["unlearned"] == content["scores"]["after_attack"]


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Auditing the default run on the run's own probes."""
    folder = tmp_path_factory.mktemp("audit")
    models = ("--original", "tiny", "--unlearned", default_run()[0] / "model", "--oracle", "tiny")
    result = command("audit", *models, "--output", folder)
    assert result.status == 0, result.err
    (folder / "shown.txt").write_text(result.out + result.err, encoding="utf-8")
    return folder


def test_agrees_with_the_run_it_audits(audited: Path) -> None:
    content, metrics = read_json(audited / "audit.json"), read_json(default_run()[0] / "metrics.json")
    assert content["influence"]["unlearned"] == pytest.approx(metrics["after"]["influence"], rel=1e-4)
    assert content["scores"]["unlearned"]["forget"] == pytest.approx(metrics["after"]["scores"]["forget"], rel=1e-4)
    assert all(value == 0 for value in content["influence"]["oracle"].values())


def test_writes_numbers_table_and_plots(audited: Path) -> None:
    plots = {"audit_heat_maps_unlearned", "audit_heat_maps_oracle", "audit_cumulative_curves"}
    expected = {"audit.json", "audit_spurious_neurons.csv", *(f"plots/{name}.png" for name in plots)}
    assert files(audited) - {"shown.txt"} == expected
    content = read_json(audited / "audit.json")
    assert set(content) == {"scores", "influence", "target", "alpha", "provenance"}
    with (audited / "audit_spurious_neurons.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == CSV_HEADER
    assert len(rows) - 1 == content["influence"]["unlearned"]["n_spurious"]


def test_no_forget_text_is_written_or_shown(audited: Path) -> None:
    assert leaks(audited) == []


def test_results_are_not_overwritten_unasked(audited: Path) -> None:
    result = command("audit", "--original", "tiny", "--unlearned", "tiny", "--output", audited, *FEW)
    assert result.status == 2
    assert "allowed: a directory without audit.json, or --overwrite" in result.err
    assert set(read_json(audited / "audit.json")["influence"]) == {"unlearned", "oracle"}


def test_default_output_is_the_run(tmp_path: Path) -> None:
    shutil.copytree(default_run()[0], tmp_path / "run")
    unlearned = tmp_path / "run" / "model"
    assert command("audit", "--original", "tiny", "--unlearned", unlearned, *FEW).status == 0
    assert (tmp_path / "run" / "audit.json").is_file()
