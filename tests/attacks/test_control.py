"""Without an oracle: the same attack on facts that nobody was ever taught, beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toys.cli import read_json, write_rows
from toys.sweeps import counted, harmful, interrupted, run

from lightning_ssiuu.attacks import Benign, Paraphrase, sweep
from lightning_ssiuu.attacks.curves import RecoveryCurve, table
from lightning_ssiuu.reports.audit.evidence import relearning_evidence
from lightning_ssiuu.reports.audit.verdict import Forgetting, decide
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError

#: Attacks without an oracle, which then have a control.
ALONE: dict[str, Any] = {"oracle": None, "control": "auto"}


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(models, tmp_path_factory.mktemp("alone"), **ALONE)


def test_the_gap_is_to_the_control_where_there_is_no_oracle(
    alone: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    (row,) = alone["attacks"]
    assert {curve["model"] for curve in alone["curves"]} == {"unlearned", "control"}
    own, other = row["unlearned"], row["control"]
    ahead = [max(0.0, b - a) for a, b in zip(own["before"]["per_seed"], other["before"]["per_seed"], strict=True)]
    pairs = zip(own["forget_score"]["per_seed"], other["forget_score"]["per_seed"], ahead, strict=True)
    assert row["gap"]["per_seed"] == pytest.approx([high - (control - more) for high, control, more in pairs])
    sizes = {(curve["n_attack"], curve["n_scored"]) for curve in alone["curves"]}
    assert len(sizes) == 1
    assert alone["settings"]["harmful"]["control"] == "forget questions with each other's answers"
    # what is found on the forget set does not depend on it
    without = run(models, tmp_path, oracle=None)
    assert without["attacks"][0]["unlearned"] == row["unlearned"]
    assert "gap" not in without["attacks"][0]
    assert "control" not in without["settings"]["harmful"]


def test_one_model_is_in_memory_at_a_time_and_a_killed_sweep_goes_on(
    alone: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    with counted(Devices, "load") as loads:
        interrupted(models, tmp_path, 6, **ALONE)
    assert len(loads) == 2
    with counted(sweep, "relearn") as rest:
        assert run(models, tmp_path, **ALONE) == alone
    assert len(rest) == 2
    interrupted(models, tmp_path / "other", 2, **ALONE)
    with pytest.raises(UserError, match="that was interrupted there, or with --over"):  # another sweep
        run(models, tmp_path / "other", oracle=None)


def test_with_an_oracle_there_is_none_unless_it_is_asked_for(models: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"attack": harmful(Benign, learning_rates=[1e-2], seeds=[0])}
    assert "control" not in run(models, tmp_path / "auto", control="auto", **few)["attacks"][0]
    write_rows(tmp_path / "made.jsonl", [{"question": f"Who is {n}?", "answer": f"One {n}"} for n in range(7)])
    (row,) = run(models, tmp_path / "file", control=str(tmp_path / "made.jsonl"), **few)["attacks"]
    oracle = row["oracle"]["forget_score"]["mean"]
    assert row["gap"]["mean"] == row["unlearned"]["forget_score"]["mean"] - oracle
    assert row["control"]["forget_score"]["mean"] != oracle
    assert row["control"]["before"]["per_seed"] != row["unlearned"]["before"]["per_seed"]


def test_mistakes(models: Path, tmp_path: Path) -> None:
    told = r"^control: got 'made\.jsonl', allowed: auto or none with an attack that trains nothing"
    with pytest.raises(UserError, match=told):
        run(models, tmp_path, attack=Paraphrase(), control="made.jsonl")
    with pytest.raises(UserError, match=r"^control: got '/no/such\.jsonl'"):
        run(models, tmp_path, control="/no/such.jsonl")
    assert not list(tmp_path.iterdir())


def curves(model: str, *highest: float, before: float = 10.0) -> list[RecoveryCurve]:
    scores = [[before, value] for value in highest]
    return [RecoveryCurve(model, "harmful", 0.1, 1e-3, n, 4, 32, [0, 1], one) for n, one in enumerate(scores)]


def test_the_verdict_is_that_beyond_the_control() -> None:
    fallen = Forgetting("probability", 90.0, 10.0, 8.0, "chance")

    def judged(*others: RecoveryCurve) -> Any:
        found = table([*curves("unlearned", 30.0, 31.0, 32.0), *others])
        return decide(fallen, relearning_evidence([{"attack": "harmful"} | row for row in found], fallen))

    assert judged().label == "hidden"  # beyond the score before
    controlled = judged(*curves("control", 29.0, 30.0, 31.0))
    assert controlled.label == "erased"
    assert "beyond invented facts under the same attack" in controlled.sentence
    assert "told by invented facts" in controlled.uncertainty
    assert "may be what any model" not in controlled.uncertainty
    assert judged(*curves("control", 12.0, 13.0, 13.0)).label == "hidden"
    # wrong answers that are more probable hide nothing: the attack taught 1 point
    held = curves("control", 33.0, 34.0, 34.0, before=33.0)
    assert judged(*held).label == "hidden"
    (row,) = table([*curves("unlearned", 30.0, 31.0, 32.0), *held])
    assert row["gap"]["per_seed"] == [20.0, 20.0, 21.0]
    both = judged(*curves("control", 12.0, 13.0, 13.0), *curves("oracle", 29.0, 30.0, 31.0))
    assert both.label == "erased"
    assert "beyond the oracle" in both.sentence


def test_the_audits_own_attack_has_a_control(tmp_path: Path) -> None:
    from toys.audit import make_world
    from toys.cli import command

    world = make_world(tmp_path / "world")
    small = ("--probe.p", "0.25", "--probe.epochs", "1", "--probe.seeds", "[0, 1]", "--probe.learning_rates", "[3e-4]")
    models = ("--original", world.original, "--unlearned", "tiny", "--own_change", "false", "--probe_examples", "8")
    result = command("audit", *models, *world.data, *small, "--output", tmp_path, "--scores", "[probability]")
    assert result.status == 0, result.err
    content = read_json(tmp_path / "audit.json")
    (row,) = content["relearning"]["attacks"]
    assert set(row) >= {"unlearned", "control", "gap"}
    assert content["verdict"]["label"] == "erased", content["verdict"]
    assert "beyond invented facts" in content["verdict"]["grounds"][1]["text"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "facts that nobody was ever taught" in page
    assert "control, lr 0.0003" in page
