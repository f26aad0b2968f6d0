"""``audit``: nothing between a model and itself, and the verdicts on models whose story is known."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from toys.audit import World, make_world, plant
from toys.cli import attacking, command, default_run, files, leaks, read_json

from lightning_ssiuu.attribution.influence import CSV_HEADER
from lightning_ssiuu.reports.audit.evidence import recorded_relearning

FEW = ("--probe_examples", "8", "--scores", "[first_token, probability]")
#: A probe of a second; the oracle's gentlest rate does it no harm.
SMALL = (
    *("--probe_examples", "8", "--scores", "[probability]", "--probe.p", "0.25", "--probe.epochs", "2"),
    *("--probe.seeds", "[0, 1]", "--probe.learning_rates", "[3e-4]"),
)


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    same = ("--original", "tiny", "--unlearned", "tiny", "--after_attack", "tiny")
    method = ("--method", "log_probability", "--memory_budget", "200MB")
    few = ("--data", "Facts", "--data.max_eval_examples", "8", "--relearning_probe", "false")
    result = command("audit", *same, "--output", tmp_path, *FEW, *method, *few)
    assert result.status == 0, result.err
    content = read_json(tmp_path / "audit.json")
    assert content["verdict"]["label"] == "not unlearned"
    assert content["verdict"]["sentence"] in " ".join(result.out.split())
    assert content["verdict"]["grounds"][0]["share"] == 0
    assert content["relearning"] is None
    assert content["method"] == "log_probability"
    assert content["data_options"] == {"max_eval_examples": 8}
    words = shlex.split(content["command"])
    assert json.loads(words[words.index("--data") + 1])["init_args"] == {"max_eval_examples": 8}
    assert {"--relearning_probe": "false", "--memory_budget": "200MB"}.items() <= dict(pairwise(words)).items()
    assert set(content["influence"]) == {"unlearned"}
    assert all(value == 0 for value in content["influence"]["unlearned"].values())
    assert content["attribution_correlation"] == pytest.approx(1.0, abs=1e-6)
    assert content["correlation"]["rho"] == content["attribution_correlation"]
    assert content["scores"]["original"] == content["scores"]["unlearned"] == content["scores"]["after_attack"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def judged(world: World, unlearned: str | Path, folder: Path, *more: str | Path) -> dict[str, Any]:
    models = ("--original", world.original, "--unlearned", unlearned)
    result = command("audit", *models, "--output", folder, *world.data, *SMALL, *more)
    assert result.status == 0, result.err
    return read_json(folder / "audit.json")


def test_a_model_that_never_saw_the_forget_set_is_erased(world: World, tmp_path: Path) -> None:
    """The embedded model is the oracle of the one that learned more: also recognised where it is not given as such."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    content = judged(world, "tiny", tmp_path, "--own_change", "false")
    assert content["verdict"]["label"] == "erased", content["verdict"]
    assert content["relearning"]["source"] == "probe"
    assert sorted(curve["model"] for curve in content["relearning"]["curves"]) == 2 * ["control"] + 2 * ["unlearned"]
    assert content["relearning"]["options"]["seeds"] == [0, 1]
    assert content["provenance"]["seed"] is None  # not that of the last attack
    assert "No oracle" in content["verdict"]["uncertainty"]
    assert "Arven" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_planted_neurons_are_hidden_and_named(world: World, tmp_path: Path) -> None:
    neurons = plant(world, tmp_path / "planted")
    content = judged(world, tmp_path / "planted", tmp_path / "audit", "--oracle", "tiny")
    assert content["verdict"]["label"] == "hidden", content["verdict"]
    says = {(ground["what"], ground["says"]) for ground in content["verdict"]["grounds"]}
    assert {("relearning", "hidden"), ("neurons", "hidden")} <= says
    named = [(neuron["module"], neuron["layer"], neuron["index"]) for neuron in content["flagged"]]
    assert neurons == set(named[:4])  # by their own change, ahead of all that D⁻ flags
    assert content["flagged"][0]["own_cost"] > 0.1
    assert {row["variant"] for row in content["ablation"]["rows"]} == {"original", "zero"}
    assert {curve["model"] for curve in content["relearning"]["curves"]} == {"unlearned", "oracle"}


def test_without_an_attack_nothing_is_called_erased(world: World, tmp_path: Path) -> None:
    content = judged(world, "tiny", tmp_path, "--relearning_probe", "false", "--own_change", "false", "--show_text")
    assert content["verdict"]["label"] == "mixed"
    assert "not attacked" in content["verdict"]["sentence"]
    assert content["relearning"] is None
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Where was Arven Tolk born?" in page
    assert "--show_text" in page


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Auditing the default run on the run's own probes; its oracle is no oracle, so that nothing is attacked."""
    folder = tmp_path_factory.mktemp("audit")
    models = ("--original", "tiny", "--unlearned", default_run()[0] / "model", "--oracle", "tiny")
    result = command("audit", *models, "--output", folder, "--own_change", "false")
    assert result.status == 0, result.err
    (folder / "shown.txt").write_text(result.out + result.err, encoding="utf-8")
    return folder


def test_agrees_with_the_run_it_audits(audited: Path) -> None:
    content, metrics = read_json(audited / "audit.json"), read_json(default_run()[0] / "metrics.json")
    assert content["influence"]["unlearned"] == pytest.approx(metrics["after"]["influence"], rel=1e-4)
    forget = dict(content["scores"]["unlearned"]["forget"])
    del forget["highest_probability"]  # which a run does not measure unasked
    assert forget == pytest.approx(metrics["after"]["scores"]["forget"], rel=1e-4)
    assert all(value == 0 for value in content["influence"]["oracle"].values())


def test_says_unasked_how_probable_the_most_probable_forget_answer_is(audited: Path) -> None:
    scores, shown = read_json(audited / "audit.json")["scores"], (audited / "shown.txt").read_text(encoding="utf-8")
    for model in scores.values():
        assert 100 >= model["forget"]["highest_probability"] > model["forget"]["probability"]
        assert not any("highest_probability" in measured for split, measured in model.items() if split != "forget")
    assert f"{scores['unlearned']['forget']['highest_probability']:.1f}" in shown


def test_writes_numbers_table_plots_and_page(audited: Path) -> None:
    plots = {"audit_heat_maps_unlearned", "audit_heat_maps_oracle", "audit_cumulative_curves"}
    plain = {"audit.json", "audit_spurious_neurons.csv", "report.html"}
    assert files(audited) - {"shown.txt"} == plain | {f"plots/{name}.png" for name in plots}
    content = read_json(audited / "audit.json")
    kept = {"scores", "score", "command", "influence", "target", "method", "alpha", "data_options", "provenance"}
    assert set(content) == kept | {"verdict", "flagged", "relearning", "ablation", "logit_lens"}
    with (audited / "audit_spurious_neurons.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == CSV_HEADER
    assert len(rows) - 1 == content["influence"]["unlearned"]["n_spurious"]
    assert ["" if value is None else str(value) for value in content["flagged"][0].values()] == rows[1]


def test_no_forget_text_is_written_or_shown(audited: Path) -> None:
    assert leaks(audited) == []


def test_results_are_not_overwritten_unasked(audited: Path) -> None:
    result = command("audit", "--original", "tiny", "--unlearned", "tiny", "--output", audited, *FEW)
    assert result.status == 2
    assert "allowed: a directory without audit.json, or --overwrite" in result.err
    assert set(read_json(audited / "audit.json")["influence"]) == {"unlearned", "oracle"}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the default run with an attack beside it."""
    run = tmp_path_factory.mktemp("attacked") / "run"
    shutil.copytree(default_run()[0], run)
    rate = attacking(p=[0.1], learning_rates=[1e-3], seeds=[0, 1], epochs=1)
    assert command("attack", "--model", run / "model", "--score", "probability", *rate).status == 0
    return run


def test_an_attack_of_the_run_is_taken_and_results_lie_beside_it(attacked: Path) -> None:
    models = ("--original", "tiny", "--unlearned", attacked / "model")
    assert command("audit", *models, "--own_change", "false", *FEW).status == 0
    content = read_json(attacked / "audit.json")
    assert content["relearning"]["source"] == "attack.json"
    assert content["relearning"]["attacks"] == read_json(attacked / "attack.json")["attacks"]
    # The attack's score is the verdict's, not the run's own.
    assert content["verdict"]["grounds"][0]["name"] == "forget probability"
    assert "From the run&#39;s attack.json" in (attacked / "report.html").read_text(encoding="utf-8")


def test_attacks_that_do_not_answer_the_question_are_not_taken(attacked: Path, tmp_path: Path) -> None:
    model = str(attacked / "model")
    assert recorded_relearning(model, "probability", oracle=False) is not None
    assert recorded_relearning(model, "all_tokens", oracle=False) is None
    assert recorded_relearning(model, None, oracle=True) is None
    assert recorded_relearning(str(tmp_path / "model"), None, oracle=False) is None


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        (("--probe.p", "0"), "probe.p"),
        (("--probe.seeds", "[]"), "probe.seeds"),
        (("--probe.learning_rates", "[0.0]"), "probe.learning_rates"),
        (("--probe.epochs", "0"), "probe.epochs"),
        (("--score", "nonsense"), "score"),
        (("--method", "shapley"), "method"),
        (("--memory_budget", "plenty"), "memory_budget"),
    ],
)
def test_mistakes(options: tuple[str, ...], argument: str, tmp_path: Path) -> None:
    same = ("--original", "tiny", "--unlearned", "tiny", "--output", tmp_path / "audit")
    result = command("audit", *same, *options)
    assert result.status == 2
    assert f"{argument}: got" in result.err
    assert not (tmp_path / "audit").exists()
