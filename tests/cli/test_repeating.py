"""An attack of a certificate is the one that was made, option by option, on as many examples."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from toys.cli import read_json

import lightning_ssiuu.attacks
from lightning_ssiuu.attacks import Attacker, Harmful, Quantization, Relearning
from lightning_ssiuu.attacks.base import Attack
from lightning_ssiuu.cli.attack import attack
from lightning_ssiuu.cli.repeating import AttackAgain, Figure, _alone, _class, scored_again
from lightning_ssiuu.datamodules import Facts
from lightning_ssiuu.evaluation.results import ATTACKS
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError

SGD = Attacker(optimizer="sgd", learning_rates=[0.1, 1.0])
MADE: list[Callable[[], Attack]] = [
    lambda: Harmful(p=[0.1, 0.3], seeds=[3, 4], learning_rates=[1e-3], until_saturated=True),
    lambda: Harmful(seeds=[3, 4], lora=LoRA(r=2), patience=2, epochs=7),
    lambda: Harmful(seeds=[3, 4], attackers=[Attacker(), SGD], batch_size=3, every_n_epochs=2),
    Quantization,
]


def certified(attack: Attack, attacker: Attacker | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"highest": {"mean": 20.0, "std": 1.0, "per_seed": [19.0, 21.0]}}
    if isinstance(attack, Relearning):
        runs = [{"seed": seed, "learning_rate": 2e-3, "epochs": 6} for seed in attack.seeds]
        found["by_seed"] = [run | ({"attacker": attacker.settings} if attacker else {}) for run in runs]
    row = {"attack": attack.name, "variant": None, "unlearned": found}
    fractions = attack.p if isinstance(attack, Harmful) else [None]
    settings = {"score": "probability", "precision": "32-true", "control": "invented"} | attack.settings()
    content = {"tried": [row | {"p": p} for p in fractions], "settings": {attack.name: settings, "mine": {}}}
    return json.loads(json.dumps(content))  # type: ignore[no-any-return]


@pytest.mark.parametrize("made", MADE)
def test_it_has_all_options(made: Callable[[], Attack]) -> None:
    attack = made()
    again = AttackAgain(certified(attack), attack.name, None, None)
    assert type(again.attack) is type(attack)
    assert again.attack.settings() == attack.settings()


def test_it_is_asked_as_it_was(tmp_path: Path) -> None:
    """A smaller sample of the forget set, in the precision of the attack; of a score, too."""
    asked: dict[str, Any] = {
        "attack": Quantization(widths=["4bit"]),
        "data": Facts(max_eval_examples=3),
        "control": "none",
    }
    with redirect_stdout(StringIO()):
        rows = attack("tiny", **asked, output=str(tmp_path))
    settings = read_json(tmp_path / "attack.json")["settings"]
    assert settings["quantization"]["data_options"] == {"max_eval_examples": 3}
    highest = rows[0]["unlearned"]["forget_score"] | {"std": 0.0}
    tried = [rows[0] | {"unlearned": {"highest": highest}}]
    scores = {"unlearned": {"forget": {"probability": rows[0]["unlearned"]["before"]["mean"]}}}
    content = {"tried": tried, "settings": settings, "scores": scores, "scored": settings["quantization"]}
    again = AttackAgain(content, "quantization", None, None)
    (now,) = again.on("tiny", None, Devices("cpu"))
    assert now.now == pytest.approx(now.then, abs=1e-6)
    (now,) = scored_again(content, "tiny", None, Devices("cpu"))
    assert now.now == pytest.approx(now.then, abs=1e-6)
    (now,) = scored_again(content | {"scored": {}}, "tiny", None, Devices("cpu"))
    assert now.now != pytest.approx(now.then, abs=1e-6), "all of the set has another score"
    with pytest.raises(UserError, match="precision: got 'bf16-true', allowed: '32-true', that of the attack"):
        list(again.on("tiny", None, Devices("cpu", precision="bf16-true")))


def test_a_seed_is_the_run_that_found_most_in_it() -> None:
    attack = Harmful(p=[0.1, 0.3], seeds=[3, 4], attackers=[Attacker(), SGD], until_saturated=True, batch_size=3)
    again = AttackAgain(certified(attack, SGD), "harmful", 0.3, 4)
    (row,) = again.rows
    alone = _alone(again.attack, row["p"], row["unlearned"]["by_seed"][1])
    assert isinstance(alone, Harmful)
    assert (alone.p, alone.seeds, alone.learning_rates, alone.epochs, alone.batch_size) == ([0.3], [4], [2e-3], 6, 3)
    assert (alone.attackers, alone.until_saturated) == ([Attacker(optimizer="sgd")], False)
    with pytest.raises(UserError, match="as it was made"):
        _alone(again.attack, 0.3, row["unlearned"]["by_seed"][1] | {"attacker": {"optimizer": "muon"}})


def test_what_is_not_of_the_package_is_not_made() -> None:
    """A certificate names attacks, and nothing that would be imported."""
    content = certified(Harmful())
    content["settings"]["os"] = {"class_path": "os.system"}
    content["tried"].append(content["tried"][0] | {"attack": "os"})
    for name in ("os", "mine", "ablation"):
        with pytest.raises(UserError) as caught:
            AttackAgain(content, name, None, None)
        assert "['scores', 'harmful']" in caught.value.allowed


def test_what_has_no_such_option_is_not_divided() -> None:
    for p, seed in ((0.3, None), (None, 1)):
        with pytest.raises(UserError, match="null with quantization"):
            AttackAgain(certified(Quantization()), "quantization", p, seed)


def test_every_attack_has_its_class() -> None:
    others = {"Attack", "Attacker", "Relearning"}
    own = {name: getattr(lightning_ssiuu.attacks, name) for name in lightning_ssiuu.attacks.__all__}
    kinds = {kind().kind: kind for name, kind in own.items() if name not in others}
    assert {name: _class(name) for name in ATTACKS} == kinds


def test_a_figure_that_is_no_number_does_not_agree() -> None:
    assert Figure("score", 9.99, 9.9).agrees
    assert not Figure("score", 10.11, 9.9).agrees
    assert not Figure("score", float("nan"), 9.9).agrees
