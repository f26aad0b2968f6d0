"""How attackers fine-tune: gradients, optimisers, warm-up and repair, in float64 where a step is worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys.cli import read_json
from toys.data import Toy, examples
from toys.models import random_model
from toys.sweeps import counted, harmful, interrupted, run

from lightning_ssiuu.attacks import Attacker, Benign, sweep
from lightning_ssiuu.attacks.attackers import project
from lightning_ssiuu.attacks.finetune import attack_scores, relearn
from lightning_ssiuu.attacks.records import read_attacks
from lightning_ssiuu.datamodules import RelearnDataModule, Splits
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives.fine_tuning import FineTuning
from lightning_ssiuu.reports.curves import strongest
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError

RATE = 1e-2


def small() -> tuple[AnswerModel, RelearnDataModule]:
    """A model in float64 and an attack of one step."""
    data = Toy(Splits(examples(0, 7), examples(20, 4), examples(30, 3)))
    model = AnswerModel(random_model(vocab_size=260, tie_word_embeddings=False))
    return model, RelearnDataModule(data, p=0.3)


def attacked(attacker: Attacker, epochs: int = 1, **options: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Weights before and after an attack, and its curve."""
    model, data = small()
    before = {name: weight.detach().clone() for name, weight in model.hf.named_parameters()}
    curve = relearn(model, data.encoder.tokenizer, data, RATE, epochs, attacker=attacker, **options)
    return before, {name: weight.detach() for name, weight in model.hf.named_parameters()}, curve


def gradients() -> dict[str, torch.Tensor]:
    """Of the mean negative log-likelihood of the attacked examples."""
    model, data = small()
    part = next(iter(data.train_dataloader()))["retain"]
    (-model.train()(part["input_ids"], part["attention_mask"], part["labels"]).mean_logps.mean()).backward()
    return {name: weight.grad for name, weight in model.hf.named_parameters() if weight.grad is not None}


def test_a_gradient_is_cut_at_its_singular_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 20, generator=generator, dtype=torch.float64))[0] for n in (40, 30))
    values = torch.cat([torch.tensor([9.0, 7.0, 5.0]), torch.full((17,), 1e-2)]).double()
    whole = left @ torch.diag(values) @ right.mT
    principal, minor = whole.clone(), whole.clone()
    project(principal, 3, keep=True)
    project(minor, 3, keep=False)
    expected = left[:, :3] @ torch.diag(values[:3]) @ right[:, :3].mT
    assert torch.allclose(principal, expected, atol=1e-9)
    assert torch.allclose(principal + minor, whole, atol=1e-12)
    assert torch.linalg.matrix_rank(principal) == 3
    state = torch.get_rng_state()
    project(whole, 3, keep=True)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("gradient", ["whole", "principal", "minor"])
def test_a_step_of_sgd_is_the_gradient(gradient: Any) -> None:
    before, after, _ = attacked(Attacker("sgd", gradient=gradient, rank=2))
    expected = gradients()
    for name, slope in expected.items():
        if slope.ndim == 2 and gradient != "whole":
            project(slope, 2, gradient == "principal")
        assert torch.allclose(before[name] - after[name], RATE * slope, atol=1e-12), name
    moved = before["model.layers.0.mlp.up_proj.weight"] - after["model.layers.0.mlp.up_proj.weight"]
    rank = int(torch.linalg.matrix_rank(moved, rtol=1e-6))
    assert rank == 2 if gradient == "principal" else rank > 2


def test_muon_whitens() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    spreads = {}
    for optimizer in ("sgd", "muon"):
        before, after, _ = attacked(Attacker(optimizer))  # type: ignore[arg-type]
        values = torch.linalg.svdvals(after[name] - before[name])
        spreads[optimizer] = float(values[0] / values[7])
    assert spreads["muon"] < 2 < 4 < spreads["sgd"]


def test_a_warm_up_begins_at_nothing() -> None:
    before, after, curve = attacked(Attacker(warmup_steps=1))
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    assert curve.forget_scores[0] == curve.forget_scores[1]
    assert attacked(Attacker(warmup_steps=1), epochs=2)[2].forget_scores[2] != curve.forget_scores[0]


def test_repair_learns_the_retain_set_and_then_attacks() -> None:
    with counted(FineTuning, "training_step") as steps:
        _, _, curve = attacked(Attacker(repair_epochs=2), epochs=2, every_n_epochs=2)
    taught = [sorted(step[1]["retain"]["example_id"].tolist()) for step in steps]
    _, data = small()
    secret = sorted(example.example_id for example in data.attacked)
    assert taught == [[20, 21, 22, 23]] * 2 + [secret] * 2  # one batch each
    assert curve.epochs == [0, 2, 4]
    assert curve.attacker == {"repair_epochs": 2}


def test_what_an_attack_leaves_of_the_rest() -> None:
    model, data = small()
    tokenizer = data.encoder.tokenizer
    curve = relearn(model, tokenizer, data, RATE, 2, utility=True)
    assert {split: len(scores) for split, scores in curve.utility.items()} == {"retain": 3, "test": 3}
    measured = attack_scores(model, tokenizer, data, "probability", utility=True)
    assert measured["retain"] == curve.utility["retain"][2] != curve.utility["retain"][0]
    assert measured["test"] == curve.utility["test"][2]
    assert measured["forget"] == curve.forget_scores[2]
    assert relearn(model, tokenizer, data, RATE, 1).utility == {}


ATTACKERS = [
    Attacker(),
    Attacker("sgd", learning_rates=[0.1]),
    Attacker(repair_epochs=1, warmup_steps=0.5),
    Attacker(lora=LoRA(r=2), repair_epochs=1, learning_rates=[1e-2]),
]


@pytest.fixture(scope="module")
def several(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a sweep with several attackers, and what it finds."""
    options = {"attack": harmful(attackers=ATTACKERS, learning_rates=[1e-2], utility=True), "oracle": None}
    return options, run(models, tmp_path_factory.mktemp("several"), **options)


def test_the_score_is_the_highest_of_all_attackers(several: tuple[dict[str, Any], dict[str, Any]]) -> None:
    content = several[1]
    own = content["attacks"][0]["unlearned"]
    curves = content["curves"]
    assert len(curves) == 4 * 2
    highest = [max(max(c["forget_scores"]) for c in curves if c["seed"] == seed) for seed in (0, 1)]
    assert own["forget_score"]["per_seed"] == highest
    assert [one["best"].get("attacker", {}) for one in own["attackers"]] == [one.settings for one in ATTACKERS]
    of_attackers = [one["forget_score"]["per_seed"] for one in own["attackers"]]
    assert [max(of_seed) for of_seed in zip(*of_attackers, strict=True)] == highest
    best = next(curve for curve in curves if max(curve["forget_scores"]) == max(highest))
    assert own["best"].get("attacker", {}) == best["attacker"]
    place = best["forget_scores"].index(max(highest))
    assert best["utility"]["retain"][place] in own["utility"]["retain"]["at_highest"]["per_seed"]
    assert best["utility"]["retain"][0] in own["utility"]["retain"]["before"]["per_seed"]
    shown = strongest(curves)
    assert len(shown) == 2
    assert len({str(curve["attacker"]) for curve in shown}) == 1


def test_a_sweep_of_several_goes_on_where_it_was(
    models: Path, several: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    options, whole = several
    interrupted(models, tmp_path, 5, **options)
    with counted(sweep, "relearn") as rest:
        assert run(models, tmp_path, **options) == whole
    assert len(rest) == 8 - 5
    assert read_attacks(tmp_path)["attacks"] == whole["attacks"]


def test_each_attacker_is_saturated_by_itself(models: Path, tmp_path: Path) -> None:
    pair = [Attacker(), Attacker("sgd", learning_rates=[1e-3])]
    method = harmful(attackers=pair, learning_rates=[1e-3], seeds=[0], until_saturated=True)
    content = run(models, tmp_path, attack=method, oracle=None)
    (row,) = content["attacks"]
    for one, attacker in zip(row["unlearned"]["attackers"], pair, strict=True):
        own = [curve for curve in content["curves"] if curve["attacker"] == attacker.settings]
        assert len(own) > 3
        assert one["best"]["learning_rate"] < max(curve["learning_rate"] for curve in own)
    assert len({curve["learning_rate"] for curve in content["curves"]}) > 4


def test_files_without_attackers_are_read(several: tuple[dict[str, Any], dict[str, Any]]) -> None:
    curves = [{k: v for k, v in curve.items() if k not in ("attacker", "utility")} for curve in several[1]["curves"]]
    assert strongest(curves)


def test_a_benign_attack_may_repair_first(models: Path, tmp_path: Path) -> None:
    method = harmful(Benign, attackers=[Attacker(repair_epochs=1)], learning_rates=[1e-2], seeds=[0])
    (curve,) = run(models, tmp_path, attack=method, oracle=None)["curves"]
    assert curve["epochs"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"optimizer": "adam"}, "attack.attackers.optimizer: got 'adam', allowed: one of"),
        ({"gradient": "top"}, "attack.attackers.gradient: got 'top'"),
        ({"learning_rates": []}, "attack.attackers.learning_rates: got"),
        ({"learning_rates": [0.0]}, "attack.attackers.learning_rates: got 0.0, allowed: finite numbers > 0"),
        ({"warmup_steps": -1}, "attack.attackers.warmup_steps: got -1"),
        ({"repair_epochs": -1}, "attack.attackers.repair_epochs: got -1"),
        ({"rank": 0}, "attack.attackers.rank: got 0"),
    ],
)
def test_mistakes(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"^{told}"):
        Attacker(**options)


def test_mistakes_of_several() -> None:
    with pytest.raises(UserError, match=r"^attack.attackers: got 'sgd', allowed: each attacker once"):
        harmful(attackers=[Attacker("sgd"), Attacker("sgd", learning_rates=[1.0])])
    with pytest.raises(UserError, match=r"^attack.attackers: got \[\]"):
        harmful(attackers=[])
    cut = Devices("cpu", 1, "fsdp2")
    for attacker in (Attacker("muon"), Attacker(gradient="minor")):
        with pytest.raises(UserError, match=r"^attack.attackers: .* allowed: adamw or sgd on whole gradients"):
            harmful(attackers=[attacker]).check(Toy(), "probability", cut)
    with pytest.raises(UserError, match=r"^attack.lora: got 'adapters'"):
        harmful(attackers=[Attacker(lora=LoRA(r=2))]).check(Toy(), "probability", cut)


def test_muon_needs_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"^attack.attackers.optimizer: got 'muon', allowed: adamw, sgd"):
        Attacker("muon")


def test_command_line(tmp_path: Path) -> None:
    from toys.cli import attacking, command

    several = "[{optimizer: adamw}, {optimizer: sgd, learning_rates: [0.1]}]"
    few = attacking(p=[0.3], seeds=[0], epochs=1, learning_rates=[1e-3], attackers=several, utility="true")
    brief = ("--control", "none", "--data", "Facts", "--data.max_eval_examples", "8")
    result = command("attack", "--model", "tiny", "--output", tmp_path, *few, *brief)
    assert result.status == 0, result.err
    told = " ".join(result.out.split())
    best = read_json(tmp_path / "attack.json")["attacks"][0]["unlearned"]["best"]
    assert f"harmful 0.3, unlearned: the highest is by {best.get('attacker', {}).get('optimizer', 'adamw')}, lr" in told
    assert "retain test" in told
    assert "→" in told
