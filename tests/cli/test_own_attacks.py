"""Attacks of a user's own, written in a file beside the run: swept, resumed, compared and audited like the others."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from toys.cli import ROOT, attacking, command, default_run, files, leaks, read_json, script

from lightning_ssiuu.objectives.fine_tuning import FineTuning

PAGE = ROOT / "docs" / "how-to" / "extending.md"
#: The two examples of how-to/extending.md, by the name of the class.
WRITTEN = {
    found[1]: block
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    if (found := re.search(r"class (\w+)\((?:Harmful|Attack)\)", block))
}
#: Attacks that give what cannot be summed up.
BAD = """
from lightning_ssiuu import Harmful
from lightning_ssiuu.attacks.base import Attack

class Nothing(Attack):
    def run(self, targets, data, score, devices):
        pass

class OracleAlone(Attack):
    def run(self, targets, data, score, devices):
        yield self.outcome(targets[1], data, score, 1.0, 2.0)

class Unpaired(Attack):
    def run(self, targets, data, score, devices):
        for n, target in enumerate(targets, 1):
            for seed in range(n):
                yield self.outcome(target, data, score, 1.0, 2.0, seed=seed)

class NoPair(Harmful):
    def select(self, forget, p, rng):
        return forget
"""
FEW = attacking(p=[0.3], learning_rates=[3e-4, 1e-3], seeds=[0, 1], epochs=1)


def own_lines(name: str) -> list[str]:
    return [line for line in WRITTEN[name].splitlines() if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory: a finished run, and a file with both attacks."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(default_run()[0], folder / "run")
    (folder / "my_attacks.py").write_text(WRITTEN["ShortestFirst"] + WRITTEN["Noise"], encoding="utf-8")
    (folder / "bad_attacks.py").write_text(BAD, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs in this process runs as from the user's directory."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the command adds the working directory


MODELS = ("--model", "run/model", "--oracle", "tiny", "--score", "probability")
RELEARN = ("attack", *MODELS, "--attack", "my_attacks.ShortestFirst", *FEW)


def test_they_are_as_short_as_promised() -> None:
    assert len(own_lines("ShortestFirst")) <= 6
    assert len(own_lines("Noise")) <= 15


@pytest.fixture(scope="module")
def swept(workplace: Path) -> dict[str, Any]:
    """An uninterrupted sweep's report, by a process of its own that knows only the directory it is started in."""
    done = script(workplace, *RELEARN, "--output", "whole")
    assert done.status == 0, done.err
    assert "Highest forget probability under attack" in done.out
    return read_json(workplace / "whole" / "attack.json")


def test_a_relearning_attack_is_swept(workplace: Path, swept: dict[str, Any]) -> None:
    assert files(workplace / "whole") == {"attack.json"}
    (row,) = swept["attacks"]
    assert (row["attack"], row["kind"], row["p"], row["n_attack"]) == ("shortest_first", "shortest_first", 0.3, 11)
    assert {"unlearned", "oracle", "gap"} <= row.keys()
    assert len(swept["curves"]) == 2 * 2 * 2
    highest = [
        max(max(c["forget_scores"]) for c in swept["curves"] if c["model"] == "unlearned" and c["seed"] == seed)
        for seed in (0, 1)
    ]
    assert row["unlearned"]["forget_score"]["per_seed"] == highest
    settings = swept["settings"]["shortest_first"]
    assert (settings["p"], settings["learning_rates"], settings["pool"]) == ([0.3], [3e-4, 1e-3], "all")


def test_what_it_selects_is_what_is_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_ssiuu import Facts

    written: dict[str, Any] = {"__name__": "written"}
    exec(WRITTEN["ShortestFirst"], written)
    (cell,) = written["ShortestFirst"](p=[0.25], seeds=[7]).cells(Facts())
    lengths = [[len(one.answer) for one in examples] for examples in (cell.attacked, cell.scored)]
    assert (len(lengths[0]), len(lengths[1])) == (9, 27)
    assert max(lengths[0]) <= min(lengths[1])


def killed(at: int, *args: str) -> None:
    """Fork; the child's sweep is killed in the given training step."""
    if (child := os.fork()) == 0:
        try:
            step, steps = FineTuning.training_step, []

            def deadly(self: Any, batch: Any, batch_idx: int) -> Any:
                steps.append(0)
                if len(steps) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(self, batch, batch_idx)

            FineTuning.training_step = deadly  # type: ignore[method-assign]
            command(*args)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def test_a_killed_sweep_goes_on(workplace: Path, swept: dict[str, Any]) -> None:
    killed(5, *RELEARN, "--output", "part")  # two steps an attack: in the third one
    partial = workplace / "part" / "attack.shortest_first.partial.jsonl"
    assert files(workplace / "part") == {partial.name}
    assert len(partial.read_bytes().splitlines()) == 1 + 2
    refused = command(*RELEARN, "--output", "part", "--attack.epochs", "2")
    assert refused.status == 2
    assert "options of the shortest_first attack that was interrupted there" in refused.err
    done = command(*RELEARN, "--output", "part")
    assert done.status == 0, done.err
    assert files(workplace / "part") == {"attack.json"}
    resumed = read_json(workplace / "part" / "attack.json")
    for key in ("attacks", "curves"):
        assert resumed[key] == swept[key]


def test_a_sweep_is_not_gone_on_with_by_another_selection(workplace: Path) -> None:
    """By the same class of the same options, once its author has changed what it selects."""
    killed(3, *RELEARN, "--output", "other")
    from my_attacks import ShortestFirst

    with patch.object(ShortestFirst, "select", lambda self, forget, p, rng: (forget[:9], forget[9:])):
        refused = command(*RELEARN, "--output", "other")
    assert refused.status == 2
    assert "options of the shortest_first attack that was interrupted there" in refused.err


@pytest.fixture(scope="module")
def beside(workplace: Path, swept: dict[str, Any]) -> Path:
    """The run with both attacks beside it."""
    shutil.copy(workplace / "whole" / "attack.json", workplace / "run" / "attack.json")
    noise = ("attack", "--attack", "my_attacks.Noise", "--attack.std", "0.3", "--score", "probability")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(workplace)
        patched.setattr(sys, "path", [*sys.path])
        done = command(*noise, "--model", "run/model", "--oracle", "tiny")
    assert done.status == 0, done.err
    assert "Forget probability under attack" in done.out
    return workplace


def test_an_attack_without_training_is_in_the_report(beside: Path) -> None:
    content = read_json(beside / "run" / "attack.json")
    assert [row["attack"] for row in content["attacks"]] == ["shortest_first", "noise"]
    row = content["attacks"][1]
    assert (row["kind"], row["variant"], row["n_scored"], row["n_attack"]) == ("noise", None, 36, None)
    assert row["unlearned"]["forget_score"]["mean"] != row["unlearned"]["before"]["mean"]
    assert row["oracle"]["before"]["mean"] > 80  # "tiny" stands in, and it knows everything
    assert [outcome["model"] for outcome in content["outcomes"]] == ["unlearned", "oracle"]
    settings = content["settings"]["noise"]
    assert (settings["std"], settings["score"]) == (0.3, "probability")
    assert leaks(beside / "run") == []


def test_both_are_compared(beside: Path) -> None:
    done = command("compare", "run", "--output", "compared")
    assert done.status == 0, done.err
    content = read_json(beside / "run" / "attack.json")
    with (beside / "compared" / "compare.csv").open(encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if row["n"] == "1")
    for column, given in zip(("shortest_first_0.3", "noise"), content["attacks"], strict=True):
        assert float(row[column]) == pytest.approx(given["unlearned"]["forget_score"]["mean"])
    assert row["shortest_first_0.3_inside_grid"] in ("true", "false")  # it has a grid, and the noise has none
    assert "noise_inside_grid" not in row
    assert files(beside / "compared") >= {"plots/recovery_curves.pdf"}


def test_audit_counts_the_relearning_one_as_evidence(beside: Path) -> None:
    models = ("--original", "tiny", "--unlearned", "run/model")
    few = ("--probe_examples", "8", "--scores", "[probability]", "--own_change", "false")
    done = command("audit", *models, *few, "--output", "audited")
    assert done.status == 0, done.err
    content = read_json(beside / "audited" / "audit.json")
    assert content["relearning"]["source"] == "attack.json"
    assert [row["attack"] for row in content["relearning"]["attacks"]] == ["shortest_first"]
    grounds = [ground["name"] for ground in content["verdict"]["grounds"] if ground["what"] == "relearning"]
    assert grounds == ["relearning, shortest first 30 %"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("my_attacks.ShortestFirst", "--attack.p", "[1.5]"), "attack.p: got 1.5, allowed: a fraction in (0, 1)"),
        (("my_attacks.Nothing",), "attack.class_path: got 'my_attacks.Nothing'"),
        (("my_attacks.Noise", "--save_attacked"), "save_attacked: got True, allowed: false with attack Noise"),
        (("my_attacks.Noise", "--attack.p", "[0.3]"), "attack.init_args.p: got an option that does not exist"),
    ],
)
def test_mistakes(workplace: Path, args: tuple[str, ...], told: str) -> None:
    done = command("attack", "--model", "run/model", "--output", "none", "--attack", *args)
    assert done.status == 2
    assert done.err.startswith(f"lightning-ssiuu: error: {told}"), done.err
    assert not (workplace / "none").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Nothing", "'nothing', allowed: an attack whose run() gives Outcome objects, not NoneType"),
        ("OracleAlone", "'oracle_alone', allowed: an attack whose run() gives at least one Outcome for each of"),
        ("Unpaired", "'unpaired', allowed: an attack whose run() gives the same variants, seeds and controls for"),
        ("NoPair", "'no_pair', allowed: select() that returns attacked and scored examples"),
    ],
)
def test_what_an_attack_gives_is_checked(workplace: Path, name: str, told: str) -> None:
    done = command("attack", *MODELS, "--output", "none", "--attack", f"bad_attacks.{name}")
    assert done.status == 2
    (line,) = [line for line in done.err.splitlines() if "error" in line]
    assert line.startswith(f"lightning-ssiuu: error: attack: got {told}"), done.err
    assert not (workplace / "none").exists()
