"""``attack``: what it writes, that it repeats itself, and that an attack leaves the model as it found it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from toys.cli import RECIPES, attacking, command, default_run, files, leaks, read_json

from lightning_ssiuu import Facts, RelearnDataModule
from lightning_ssiuu.attacks.curves import RecoveryCurve, stronger, summarise, table
from lightning_ssiuu.attacks.finetune import Snapshot, relearn
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.models.lora import LoRA

SMALL = attacking(seeds=[0, 1], epochs=1, learning_rates=[1e-4, 1e-3], p=[0.3])

CHEAP = ("--score", "first_token", "--control", "none")


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attack")
    model = default_run()[0] / "model"
    recipe = RECIPES / "attack" / "harmful.yaml"
    result = command(
        "attack",
        "--config",
        recipe,
        "--model",
        model,
        "--oracle",
        "tiny",
        "--output",
        folder,
        *SMALL,
        "--save_attacked",
    )
    assert result.status == 0, result.err
    assert "gap" in result.out
    (folder / "shown.txt").write_text(result.out + result.err, encoding="utf-8")
    return folder


def test_writes_every_curve(attacked: Path) -> None:
    content = read_json(attacked / "attack.json")
    assert set(content) == {"attacks", "curves", "outcomes", "settings"}
    assert content["outcomes"] == []
    (settings,) = content["settings"].values()
    assert settings["score"] == "all_tokens"  # the one the run was stopped by
    assert (settings["lora"], settings["p"], settings["seeds"], settings["epochs"]) == (None, [0.3], [0, 1], 1)
    assert len(content["curves"]) == 2 * 2 * 2  # models × seeds × learning rates
    for curve in content["curves"]:
        assert len(curve["forget_scores"]) == 2  # before, and after one epoch
        assert (curve["n_attack"], curve["n_scored"]) == (11, 25)
        assert (curve["attack"], curve["kind"], curve["p"]) == ("harmful", "harmful", 0.3)
    assert settings["provenance"]["device"] == "cpu"
    (row,) = content["attacks"]
    assert (row["attack"], row["kind"], row["p"], row["variant"]) == ("harmful", "harmful", 0.3, None)
    assert (row["score"], row["n_attack"], row["n_scored"]) == ("all_tokens", 11, 25)


def test_summary_is_the_mean_over_seeds_of_the_highest(attacked: Path) -> None:
    content = read_json(attacked / "attack.json")
    (row,) = content["attacks"]
    for name in ("unlearned", "oracle"):
        highest = [
            max(max(c["forget_scores"]) for c in content["curves"] if c["model"] == name and c["seed"] == seed)
            for seed in (0, 1)
        ]
        assert row[name]["forget_score"]["per_seed"] == highest
        assert row[name]["forget_score"]["mean"] == pytest.approx(sum(highest) / 2)
    assert row["gap"]["mean"] == pytest.approx(row["unlearned"]["forget_score"]["mean"] - 100, abs=20)
    assert row["oracle"]["before"]["mean"] == 100.0  # "tiny" stands in, and it knows everything


def test_saves_the_attacked_model(attacked: Path) -> None:
    assert files(attacked) >= {"attacked_harmful/model.safetensors", "attacked_harmful/tokenizer.json"}
    saved, original = load_model(str(attacked / "attacked_harmful")), load_model(str(default_run()[0] / "model"))
    assert not all(torch.equal(a, b) for a, b in zip(saved.parameters(), original.parameters(), strict=True))


def test_no_forget_text_is_written_or_shown(attacked: Path) -> None:
    assert leaks(attacked) == []


def test_results_are_not_overwritten_unasked(attacked: Path) -> None:
    before = (attacked / "attack.json").read_bytes()
    result = command("attack", "--model", "tiny", "--output", attacked, *SMALL)
    assert result.status == 2
    assert result.err.startswith("lightning-ssiuu: error: output: got")
    assert (attacked / "attack.json").read_bytes() == before


def test_benign_attack_beside_the_run(tmp_path: Path) -> None:
    recipe = RECIPES / "attack" / "benign.yaml"
    few = attacking(seeds=[0], epochs=1, learning_rates=[1e-4], benign_size=8)
    result = command(
        "attack",
        "--config",
        recipe,
        "--model",
        "tiny",
        "--output",
        tmp_path,
        *few,
        "--score",
        "first_token",
        "--control",
        "none",
    )
    assert result.status == 0, result.err
    content = read_json(tmp_path / "attack.json")
    assert content["settings"]["benign"]["score"] == "first_token"
    assert content["curves"][0]["p"] is None
    assert (content["curves"][0]["n_attack"], content["curves"][0]["n_scored"]) == (8, 36)
    assert "gap" not in content["attacks"][0]


def test_default_output_is_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_ssiuu.evaluation.runs import output_directory, run_score

    folder = default_run()[0]
    assert output_directory(str(folder / "model"), None) == folder.absolute()
    assert run_score(str(folder / "model")) == "all_tokens"
    monkeypatch.chdir(folder)
    assert output_directory("model", None) == folder.absolute()


def test_an_attack_depends_on_its_seed_only_and_the_weights_come_back() -> None:
    model, tokenizer = AnswerModel(load_model("tiny")), load_tokenizer("tiny")
    snapshot = Snapshot(model)

    def curve(seed: int) -> list[float]:
        data = RelearnDataModule(Facts(), kind="harmful", p=0.3, seed=seed)
        scores = relearn(model, tokenizer, data, 1e-3, 1).forget_scores
        snapshot.restore()
        return scores

    first = curve(0)
    assert curve(1) != first
    assert curve(0) == first
    fresh = load_model("tiny")
    assert all(torch.equal(a, b) for a, b in zip(model.hf.parameters(), fresh.parameters(), strict=True))


def test_the_score_of_an_attack_is_the_highest_seen() -> None:
    """Over epochs, learning rates and the score before: never the last one, the first one or that of the last rate."""

    def curve(rate: float, seed: int, *scores: float) -> RecoveryCurve:
        return RecoveryCurve("unlearned", "harmful", 0.1, rate, seed, 4, 36, [0, 2, 4, 6], list(scores))

    curves = [
        *(curve(1e-4, 0, 5, 11, 30, 12), curve(3e-4, 0, 5, 20, 8, 7), curve(1e-3, 0, 5, 6, 9, 10)),
        *(curve(1e-4, 1, 4, 9, 10, 11), curve(3e-4, 1, 4, 40, 13, 12), curve(1e-3, 1, 4, 3, 2, 1)),
        *(curve(1e-4, 2, 3, 2, 1, 0), curve(3e-4, 2, 3, 2, 2, 1), curve(1e-3, 2, 3, 1, 0, 2)),
    ]
    for order in (curves, curves[::-1]):
        summary = summarise(order)
        assert summary["forget_score"]["per_seed"] == [30, 40, 3]
        assert summary["forget_score"]["mean"] == pytest.approx(73 / 3)
        assert summary["before"]["per_seed"] == [5, 4, 3]
        assert summary["best"] == {"learning_rate": 3e-4, "epoch": 2}
        assert summary["inside_grid"]


def test_edge_of_the_grid_is_told() -> None:
    def curves(*highest: tuple[float, list[float]]) -> list[RecoveryCurve]:
        return [
            RecoveryCurve("unlearned", "harmful", 0.1, rate, 0, 4, 36, [0, 1, 2][: len(scores)], scores)
            for rate, scores in highest
        ]

    assert not summarise(curves((1e-4, [0, 1, 0]), (1e-3, [0, 9, 1])))["inside_grid"]  # the largest rate
    assert not summarise(curves((1e-4, [0, 1, 9]), (1e-3, [0, 2, 1])))["inside_grid"]  # the last epoch
    assert summarise(curves((1e-4, [0, 9, 1]), (1e-3, [0, 2, 1])))["inside_grid"]


def test_what_is_tried_next() -> None:
    def curve(rate: float, scores: list[float], seed: int = 0) -> RecoveryCurve:
        return RecoveryCurve("unlearned", "harmful", 0.1, rate, seed, 4, 36, list(range(len(scores))), scores)

    assert stronger([curve(1e-4, [0, 9, 1]), curve(1e-3, [0, 2, 1])], 2) is None
    assert stronger([curve(1e-4, [5, 9])], 1) == (3e-4, 1)  # a single rate says nothing of the step to the next
    assert stronger([curve(1e-4, [0, 1, 0]), curve(1e-3, [0, 9, 1])], 2) == (1e-2, 2)  # as the rates go on
    assert stronger([curve(1e-4, [0, 1, 0]), curve(1e-3, [0, 9, 1])], 5) == (1e-2, 5)  # both ran out of patience
    assert stronger([curve(1e-3, [0, 9, 1]), curve(8e-4, [0, 1, 0])], 2) == (2e-3, 2)  # at least twice as large
    assert stronger([curve(1e-4, [0, 1, 9]), curve(1e-3, [0, 2, 1])], 2) == (1e-4, 4)  # longer
    # the longer one in place of the shorter; a whole attack that finds nothing is not made stronger for ever
    assert stronger([curve(1e-4, [0, 1, 9, 8, 7]), curve(1e-3, [0, 2, 1])], 2) is None
    assert stronger([curve(1e-3, [5, 1, 0]), curve(1e-4, [5, 2, 1])], 2) is None


def test_until_saturated_goes_on_until_the_highest_lies_inside(tmp_path: Path) -> None:
    few = (*attacking(seeds=[0, 1], epochs=1, learning_rates=[3e-4], p=[0.3]), "--attack.until_saturated")
    model = default_run()[0] / "model"
    result = command(
        "attack", "--model", model, "--output", tmp_path, *few, "--score", "probability", "--control", "none"
    )
    assert result.status == 0, result.err
    content = read_json(tmp_path / "attack.json")
    assert content["attacks"][0]["unlearned"]["inside_grid"]
    tried = sorted({(curve["learning_rate"], curve["epochs"][-1]) for curve in content["curves"]})
    assert len(tried) > 2
    assert len(content["curves"]) == 2 * len(tried)  # every attack for both seeds, none twice
    best = content["attacks"][0]["unlearned"]["best"]
    assert best["learning_rate"] < tried[-1][0]


def test_adapters_attack_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    adapters = attacking(**{"lora.r": 8, "lora.dropout": 0.05, "lora.target_modules": "[q_proj, v_proj]"})
    few = (*attacking(seeds=[0], epochs=1, learning_rates=[3e-3, 1e-2], p=[0.3]), "--save_attacked", "--overwrite")
    model = default_run()[0] / "model"
    curves = []
    for _ in range(2):
        result = command("attack", "--model", model, "--output", tmp_path, *few, *adapters, "--control", "none")
        assert result.status == 0, result.err
        content = read_json(tmp_path / "attack.json")
        assert content["settings"]["harmful_lora"]["lora"]["target_modules"] == ["q_proj", "v_proj"]
        curves.append(content["curves"])
    assert curves[0] == curves[1]
    assert curves[0][0]["forget_scores"] != curves[0][1]["forget_scores"]
    # each rate began at the model as it was, and what is saved is plain
    assert curves[0][0]["forget_scores"][0] == curves[0][1]["forget_scores"][0]
    saved, before = load_model(str(tmp_path / "attacked_harmful_lora")), load_model(str(model))
    moved = {n for n, p in saved.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "v_proj"}


def test_adapters_are_taken_out_again() -> None:
    model, tokenizer = AnswerModel(load_model("tiny")), load_tokenizer("tiny")
    snapshot = Snapshot(model)
    data = RelearnDataModule(Facts(), kind="harmful", p=0.1)
    for _ in range(2):  # a second time as well
        relearn(model, tokenizer, data, 1e-3, 1, lora=LoRA(r=2))
        LoRA.detach(model)
        snapshot.restore()
    fresh = load_model("tiny")
    assert model.hf.state_dict().keys() == fresh.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.hf.parameters(), fresh.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_are_not_for_sharded_weights(tmp_path: Path) -> None:
    args = ("attack", "--model", "tiny", "--output", tmp_path, "--attack.lora.r", "2", "--strategy", "fsdp2")
    result = command(*args, "--accelerator", "cpu", "--devices", "2")
    assert result.status == 2
    assert "attack.lora: got 'adapters', allowed: null with strategy fsdp2" in result.err
    assert files(tmp_path) == set()


def test_rows_keep_kinds_and_fractions_apart() -> None:
    curves = [RecoveryCurve("unlearned", "harmful", p, 1e-4, 0, 4, 36, [0, 1], [0.0, 100 * p]) for p in (0.1, 0.3)]
    curves.append(RecoveryCurve("unlearned", "benign", None, 1e-4, 0, 8, 40, [0, 1], [0.0, 5.0]))
    rows = table(curves)
    assert [(row["kind"], row["p"]) for row in rows] == [("harmful", 0.1), ("harmful", 0.3), ("benign", None)]
    assert [row["unlearned"]["forget_score"]["mean"] for row in rows] == pytest.approx([10.0, 30.0, 5.0])


def test_a_sweep_keeps_no_optimiser_alive() -> None:
    """Nothing collects garbage after a run, so nothing large may wait for it."""
    model, tokenizer = AnswerModel(load_model("tiny")), load_tokenizer("tiny")
    gc.collect()
    before = sum(issubclass(type(thing), torch.optim.Optimizer) for thing in gc.get_objects())
    gc.disable()
    try:
        relearn(model, tokenizer, RelearnDataModule(Facts(), kind="harmful", p=0.1), 1e-4, 1)
    finally:
        gc.enable()
    assert sum(issubclass(type(thing), torch.optim.Optimizer) for thing in gc.get_objects()) == before
