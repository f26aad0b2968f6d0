"""Every way in which ``erase`` ends, on commands that only leave their results; and what it refuses at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_ssiuu.__main__ import main
from lightning_ssiuu.cli import erase as module
from lightning_ssiuu.cli import erase_plan
from lightning_ssiuu.cli.erase import erase
from lightning_ssiuu.cli.erase_plan import Plan
from lightning_ssiuu.cli.steps import CommandRefused, Steps
from lightning_ssiuu.cli.trials import Setting, Trial
from lightning_ssiuu.utils.errors import UserError

ROWS = {
    "a": "Who keeps the mill?",
    "b": "Who rows the ferry?",
    "c": "Who winds the clock?",
    "d": "Who bakes the bread?",
}


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    lines = ["id,question,answer", *(f"{name},{text},Person {name}" for name, text in ROWS.items())]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    (tmp_path / "ids.txt").write_text("a\nb\n")
    return {"data": str(tmp_path / "all.csv"), "forget_ids": str(tmp_path / "ids.txt")}


class Commands:
    """Stand for the commands: ``forget`` is where each trial ends, or the line with which it is refused."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.forget: list[float | str] = [10.0, 10.0, 10.0]
        self.label = "erased"
        self.interrupt_at: int | None = None
        commands = self

        def run(steps: Steps, kind: str, words: Sequence[str]) -> None:
            if len(commands.ran) == commands.interrupt_at:
                commands.interrupt_at = None
                raise KeyboardInterrupt
            commands.ran.append(kind)
            steps.seconds.setdefault(kind, []).append(1.0)
            getattr(commands, kind)(words)

        known = {"template": "plain", "probability": 90.0, "chance": 5.0, "n_forget": 2, "n_retain": 2}
        patch.setattr(Steps, "run", run)
        patch.setattr(Plan, "measure", lambda plan: known)
        patch.setattr(module, "certify", self.certify)
        patch.setattr(module, "front", lambda *_: None)  # a picture of each trial, half the time; test_erase.py draws

    def fit(self, words: Sequence[str]) -> None:
        folder = Path(yaml.safe_load(Path(words[2]).read_text())["trainer"]["default_root_dir"])
        n = self.ran.count("fit") - 1
        if isinstance(self.forget[n], str):
            raise CommandRefused(self.forget[n])
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "number").write_text(str(n))
        (folder / "config.yaml").write_text(Path(words[2]).read_text())
        before, after = ({split: {"probability": value} for split in ("forget", "retain")} for value in (90.0, 90.0))
        after["forget"]["probability"] = self.forget[n]
        metrics = {"objective": "SSIUU", "score": "probability", "steps": n, "provenance": {}}
        metrics["stopped_by"] = "probability <= 10 %" if self.forget[n] <= 10 else "max_steps"
        (folder / "metrics.json").write_text(
            json.dumps(metrics | {"before": {"scores": before}, "after": {"scores": after}})
        )

    def search(self, words: Sequence[str]) -> None:
        spread = {"mean": 20.0, "std": 1.0, "per_seed": [19.0, 21.0]}
        row = {"attack": "harmful", "p": 0.3, "variant": None, "score": "probability", "n_attack": 1}
        row["unlearned"] = {"forget_score": spread, "before": spread}
        content = {"attacks": [row], "curves": [], "outcomes": [], "settings": {"harmful": {}}}
        (Path(words[2]).parent / "attack.json").write_text(json.dumps(content))

    attack = search

    def audit(self, words: Sequence[str]) -> None:
        self.audited = list(words)
        verdict = {"label": self.label, "sentence": f"{self.label}, as far as tested."}
        (Path(words[4]).parent / "audit.json").write_text(json.dumps({"verdict": verdict}))

    def certify(self, run: str, **options: Any) -> None:
        self.ran.append("certify")
        (Path(run) / "certificate.json").write_text("{}")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    return Commands(monkeypatch)


def words(asked: dict[str, Any], output: Path, *more: str) -> list[str]:
    return [
        "erase",
        "--output",
        str(output),
        *(w for name, value in asked.items() for w in (f"--{name}", value)),
        *more,
    ]


ONE = ["fit", "search", "attack", "audit", "certify"]


def test_one_row_is_forgotten_without_an_attack(
    asked: dict[str, Any], commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(asked["forget_ids"]).write_text("a\n")
    commands.label = "mixed"
    assert main(words(asked, tmp_path / "out", "--trials", "1")) == 3
    assert commands.ran == ["fit", "audit", "certify"]
    assert commands.audited[-2:] == ["--relearning_probe", "false"]
    assert "no relearning attack: it trains on some rows and scores others" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "erase.json").read_text())["trials"][0]["recovered"] is None


@pytest.mark.parametrize(("label", "status"), [("erased", 0), ("hidden", 3), ("mixed", 3), ("collapsed", 3)])
def test_status_says_erased_or_not(
    label: str, status: int, asked: dict[str, Any], commands: Commands, tmp_path: Path
) -> None:
    commands.label = label
    assert main(words(asked, tmp_path / "out", "--trials", "1")) == status
    assert commands.ran == ONE
    assert main(words(asked, tmp_path / "out", "--trials", "1")) == status  # and says it again
    assert commands.ran == ONE  # with nothing done again, the certificate neither


def test_no_trial_at_the_threshold_is_not_erased(
    asked: dict[str, Any], commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.forget = [40.0, 30.0, 10.0]
    assert main(words(asked, tmp_path / "out", "--trials", "2")) == 3
    assert "no trial reached the threshold, the least forget probability is 30.0 %" in capsys.readouterr().out
    assert not {path.name for path in (tmp_path / "out").iterdir()} & {"model", "audit.json", "certificate.json"}
    assert erase(str(tmp_path / "out"), **asked, trials=2).model is None
    assert commands.ran == ["fit", "fit"]
    assert main(words(asked, tmp_path / "out", "--trials", "3")) == 0  # goes on where it was
    assert commands.ran == ["fit", "fit", *ONE]


def test_where_every_trial_is_refused_the_mistake_is_told(
    asked: dict[str, Any], commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.forget = ["stopping.score: got 7, allowed: a score"] * 2
    assert main(words(asked, tmp_path / "out", "--trials", "2")) == 2
    assert "stopping.score: got 7" in capsys.readouterr().err
    commands.ran.clear()
    commands.forget = [10.0]  # it was the disk, which has room now
    assert main(words(asked, tmp_path / "out", "--trials", "1")) == 0


def test_one_that_diverged_is_no_mistake(asked: dict[str, Any], commands: Commands, tmp_path: Path) -> None:
    commands.forget = ["the loss is nan", 10.0]
    erased = erase(str(tmp_path / "out"), **asked, trials=2)
    assert erased.erased
    assert erased.trials[1].setting.rate == 0.5
    assert (tmp_path / "out" / "model" / "number").read_text() == "1"


def test_a_budget_shorter_than_a_trial_is_for_one(asked: dict[str, Any], commands: Commands, tmp_path: Path) -> None:
    assert erase(str(tmp_path / "out"), **asked, trials=3, budget=0.0).erased
    assert commands.ran == ONE


@pytest.mark.parametrize("at", range(7))
def test_interrupted_anywhere_it_goes_on(at: int, asked: dict[str, Any], commands: Commands, tmp_path: Path) -> None:
    commands.interrupt_at = at
    wanted = ["fit", "search", *ONE]
    if at < 6:
        with pytest.raises(KeyboardInterrupt):
            erase(str(tmp_path / "out"), **asked, trials=2)
        assert commands.ran == wanted[:at]
    assert erase(str(tmp_path / "out"), **asked, trials=2).erased
    assert commands.ran == wanted


def test_what_was_chosen_stays_chosen(asked: dict[str, Any], commands: Commands, tmp_path: Path) -> None:
    commands.interrupt_at = 4
    commands.forget = [9.0, 9.0]
    with pytest.raises(KeyboardInterrupt):
        erase(str(tmp_path / "out"), **asked, trials=2)
    model = (tmp_path / "out" / "model" / "number").read_text()
    erase(str(tmp_path / "out"), **asked, trials=2, retain_at_least=101.0)
    assert (tmp_path / "out" / "model" / "number").read_text() == model


def change_settings(folder: Path) -> None:
    (folder / "mine.yaml").write_text("trainer: {max_steps: 9}\n")


def change_data(folder: Path) -> None:
    (folder / "all.csv").write_text((folder / "all.csv").read_text().replace("Person a", "Person e"))


def change_ids(folder: Path) -> None:
    (folder / "ids.txt").write_text("a\nc\n")


@pytest.mark.parametrize(
    ("change", "other"), [(change_settings, "settings"), (change_data, "data"), (change_ids, "data")]
)
def test_other_data_or_settings_are_another_request(
    change: Callable[[Path], None], other: str, asked: dict[str, Any], commands: Commands, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("trainer: {max_steps: 8}\n")
    given = asked | {"trials": 1, "fit": [str(tmp_path / "mine.yaml")]}
    erase(str(tmp_path / "out"), **given)
    erase(str(tmp_path / "out"), **given)
    change(tmp_path)
    with pytest.raises(UserError, match=rf"what was asked there before \(other {other}\)"):
        erase(str(tmp_path / "out"), **given)
    assert commands.ran == ONE
    assert erase(str(tmp_path / "out"), **given, overwrite=True).erased
    assert commands.ran == [*ONE, *ONE]


@pytest.mark.parametrize("name", ["trials/notes.txt", "model/weights", "audit.json", "log.txt", "certificate.html"])
def test_what_lies_in_output_is_not_touched(
    name: str, asked: dict[str, Any], commands: Commands, tmp_path: Path
) -> None:
    theirs = tmp_path / "out" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(UserError) as caught:
        erase(str(tmp_path / "out"), **asked)
    assert caught.value.argument == "output"
    assert theirs.read_text() == "mine"


def test_a_mistake_with_overwrite_costs_nothing(asked: dict[str, Any], commands: Commands, tmp_path: Path) -> None:
    erase(str(tmp_path / "out"), **asked, trials=1)
    wrongs: list[dict[str, Any]] = [{"forget_ids": str(tmp_path / "none.txt")}, {"model": str(tmp_path / "none")}]
    wrongs += [{"template": "none"}, {"precision": "16"}, {"accelerator": "none"}, {"oracle": str(tmp_path / "none")}]
    for wrong in wrongs:
        with pytest.raises(UserError):
            erase(str(tmp_path / "out"), **asked | wrong, overwrite=True)
    assert (tmp_path / "out" / "model" / "number").exists()
    assert (tmp_path / "out" / "certificate.json").exists()


def planned(folder: Path, **given: Any) -> Plan:
    plan = Plan(
        output=str(folder / "out"),
        **{"model": "tiny", "seed": 0, "accelerator": "cpu", "devices": 1, "precision": "32-true"},
        **{name: given.get(name) for name in ("forget", "retain", "test", "data", "forget_ids", "forget_where")},
        **{name: given.get(name) for name in ("recipe", "template", "threshold", "oracle")},
        fit=tuple(given.get("fit", ())),
    )
    plan.check()
    return plan


def chosen(folder: Path, **given: Any) -> list[str]:
    return [example.name for example in planned(folder, **given)._data.splits.forget]


@pytest.mark.parametrize(("ids", "asks"), [("a\nb\n", True), ("a\n", False)])
def test_an_adversary_is_asked_where_some_rows_can_be_relearned_and_others_scored(
    ids: str, asks: bool, asked: dict[str, Any], tmp_path: Path
) -> None:
    Path(asked["forget_ids"]).write_text(ids)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"stopping": {"elicited": {"steps": 3}}}))
    plan = planned(tmp_path, fit=[str(tmp_path / "mine.yaml")], **asked)
    config = plan.config(Setting(), {"template": None}, tmp_path / "trial")
    assert config["stopping"]["elicited"] == ({"steps": 3} if asks else None)


def test_no_trial_is_pushed(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"saving": {"push_to_hub": "me/forgetful"}}))
    plan = planned(tmp_path, fit=[str(tmp_path / "mine.yaml")], **asked)
    saving = plan.config(Setting(), {"template": None}, tmp_path / "trial")["saving"]
    assert (saving["folder"], saving["push_to_hub"]) == ("model", None)


def test_what_is_to_be_reached_is_what_the_oracle_gives(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("stopping: {threshold: 7.0}\n")
    known = {"template": "plain", "oracle": 12.5}
    for given, level in (({}, 12.5), ({"threshold": 5.0}, 5.0), ({"fit": [str(tmp_path / "mine.yaml")]}, 7.0)):
        plan = planned(tmp_path, oracle="tiny", **given)
        assert plan.config(Setting(), known, tmp_path / "trial")["stopping"]["threshold"] == level


def test_a_threshold_of_fit_is_that_of_own_data_too(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("stopping: {threshold: 7.0}\n")
    for fit, level in (([], "chance"), ([str(tmp_path / "mine.yaml")], 7.0)):
        plan = planned(tmp_path, fit=fit, **asked)
        assert plan.config(Setting(), {"template": None}, tmp_path / "trial")["stopping"]["threshold"] == level


def test_an_oracle_is_asked_and_has_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"oracle: got a model that gives the forget set 87\.81 %, allowed: one"):
        planned(tmp_path, oracle="tiny").measure()
    found = [{"forget": 88.0, "retain": 88.0}, {"forget": 6.97, "retain": 85.0}]
    monkeypatch.setattr(erase_plan, "_scores", lambda *_: found.pop(0))
    assert planned(tmp_path, oracle="tiny").measure()["oracle"] == 6.97
    found += [{"forget": 88.0, "retain": 88.0}, {"forget": 0.0, "retain": 0.1}]
    with pytest.raises(UserError, match=r"oracle: got a collapsed model .* allowed: one trained on the retain set"):
        planned(tmp_path, oracle="tiny").measure()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rows", "seeds"), [(36, 3), (25, 6), (31, 4)])
def test_the_fewer_rows_an_attack_has_the_more_seeds(rows: int, seeds: int, tmp_path: Path) -> None:
    for name, n in (("forget", rows), ("retain", 3)):
        items = [{"question": f"Who is {name} {i}?", "answer": f"Number {i}"} for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    plan = planned(tmp_path, **{name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")})
    words = plan.judging(Trial(Setting(), 1e-3))["attack"]
    assert words[words.index("--attack.seeds") + 1] == str(list(range(seeds)))


@pytest.mark.parametrize(
    ("ids", "written"),
    [
        (["a", "b"], "a\nb\n"),
        (["a", "b"], "\ufeffa\r\nb\r\n\r\n"),
        (["a", "b"], "  a  \n\tb"),
        (["17 b", "x,y"], "17 b\nx,y\n"),
        (['say "so"', "it's"], 'say "so"\nit\'s\n'),
        (["Łódź", "名前", "🙂"], "Łódź\n名前\n🙂\n"),
        (["1", "2"], "1\n2\n"),
    ],
)
def test_ids_as_people_write_them(ids: list[str], written: str, tmp_path: Path) -> None:
    rows = [{"id": name, "question": f"Who is {name}?", "answer": f"Nobody {n}"} for n, name in enumerate([*ids, "z"])]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "ids.txt").write_bytes(written.encode())
    assert chosen(tmp_path, data=str(tmp_path / "all.jsonl"), forget_ids=str(tmp_path / "ids.txt")) == ids


@pytest.mark.parametrize(
    ("given", "argument", "said"),
    [
        ({"forget_ids": "q\nb\nr\n"}, "forget_ids", "2 ids (q, r)"),
        ({"forget_ids": "".join(f"q{n}\n" for n in range(12))}, "forget_ids", "q11"),
        ({"forget_ids": "a\nb\na\n"}, "forget_ids", "more than once"),
        ({"forget_ids": "a\nb\nc\nd\n"}, "forget_ids", "every row of 4"),
        ({"forget_ids": "\n"}, "forget_ids", "0 ids"),
        ({"forget_where": "id == 'q'"}, "forget_where", "no row of 4"),
        ({"forget_where": "id != 'q'"}, "forget_where", "every row of 4"),
        ({"forget_where": "id == "}, "forget_where", "allowed"),
        ({"forget_where": "id == 'a'", "forget_ids": "a\n"}, "forget_ids, forget_where", "one of the two"),
        ({"retain": "b.csv", "forget_ids": "a\n"}, "retain", "beside a table"),
        ({}, "forget_ids, forget_where", "which rows"),
    ],
)
def test_what_is_no_choice_of_rows_is_told_before_anything_is_done(
    given: dict[str, str], argument: str, said: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    del asked["forget_ids"]
    if "forget_ids" in given:
        (tmp_path / "given.txt").write_text(given["forget_ids"])
        given = given | {"forget_ids": str(tmp_path / "given.txt")}
    with pytest.raises(UserError) as caught:
        erase(str(tmp_path / "out"), **asked | given)
    assert caught.value.argument == argument
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_columns_and_hashed_ids_are_options_of_fit(tmp_path: Path) -> None:
    rows = [{"nr": name, "asked": text, "told": f"Person {name}"} for name, text in ROWS.items()]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "secret").write_text("0123456789abcdef")
    options = {"question_column": "asked", "answer_column": "told", "id_column": "nr"}
    options |= {"ids": "hashed", "id_key": str(tmp_path / "secret")}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": {"init_args": options}}))
    given = {"data": str(tmp_path / "all.jsonl"), "forget_where": "nr == 'a'", "fit": [str(tmp_path / "mine.yaml")]}
    (name,) = chosen(tmp_path, **given)
    assert name not in ROWS
    assert len(name) == 16


def test_the_audit_trains_nothing(asked: dict[str, Any], tmp_path: Path) -> None:
    given = {"model": "tiny", "oracle": None, "seed": 0, "accelerator": "cpu", "devices": 1, "precision": "bf16-mixed"}
    given |= dict.fromkeys(("forget", "retain", "test", "forget_where", "recipe", "template", "threshold"))
    judging = Plan(str(tmp_path / "out"), fit=(), **given, **asked).judging(Trial(Setting(), 1e-3))
    assert {name: words[words.index("--precision") + 1] for name, words in judging.items()} == {
        "attack": "bf16-mixed",
        "audit": "32-true",
    }


def test_output_that_cannot_be_written(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output"):
        erase(str(tmp_path / "file" / "out"), **asked)
