"""``erase``: from a table and ids to a verdict, in processes of its own; what was done is not done again."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from toys.cli import Forked

from lightning_ssiuu.__main__ import main
from lightning_ssiuu.cli import erase_plan
from lightning_ssiuu.cli.erase import erase
from lightning_ssiuu.cli.steps import Steps
from lightning_ssiuu.cli.trials import Setting
from lightning_ssiuu.datamodules import Facts
from lightning_ssiuu.models.digest import weights_sha256
from lightning_ssiuu.utils.errors import UserError


def table(path: Path) -> tuple[Path, Path]:
    """Twelve rows that the embedded model knows, as a customer would have them, and the ids of ten of them... to go."""
    splits = Facts().splits
    rows = [*splits.forget[:10], *splits.retain[:20]]
    with (path / "customers.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["customer_id", "question", "answer"])
        writer.writerows([f"C{number}", row.question, row.answer] for number, row in enumerate(rows))
    (path / "delete.txt").write_text("".join(f"C{number}\n" for number in range(10)), encoding="utf-8")
    return path / "customers.csv", path / "delete.txt"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("erase")
    data, ids = table(folder)
    quick = folder / "quick.yaml"
    quick.write_text(yaml.safe_dump({"data": {"init_args": {"retain_batch_size": 12}}}))
    given = {"data": str(data), "forget_ids": str(ids), "threshold": 40.0, "trials": 1, "fit": [str(quick)]}
    ran: list[str] = []
    run = Steps.run

    def once(self: Steps, kind: str, words: Any) -> None:
        if kind == "attack" and "attack" not in ran:
            ran.append("attack")
            raise KeyboardInterrupt
        ran.append(kind)
        run(self, kind, words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erase_plan, "_SEARCH", {"p": [0.3], "seeds": [0, 1], "epochs": 1})
        patch.setattr(erase_plan, "_FULL", {"p": [0.3], "seeds": [0, 1], "epochs": 1})
        patch.setattr(erase_plan, "_ATTACKED_AT", (1.0,))
        patch.setattr(Steps, "run", once)
        # tests/test_wheel.py has processes of their own
        patch.setattr("lightning_ssiuu.cli.steps.subprocess", SimpleNamespace(Popen=Forked, STDOUT=None))
        with pytest.raises(KeyboardInterrupt):
            erase(str(folder / "out"), **given)
        erased = erase(str(folder / "out"), **given)
        yield {"folder": folder / "out", "given": given, "erased": erased, "ran": ran, "ids": ids}


def test_nothing_that_was_done_is_done_again(made: dict[str, Any]) -> None:
    assert made["ran"] == ["fit", "search", "attack", "attack", "audit"]


def test_everything_is_there_and_agrees(made: dict[str, Any]) -> None:
    folder, erased = made["folder"], made["erased"]
    names = {path.name for path in folder.iterdir()}
    assert {"model", "config.yaml", "metrics.json", "attack.json", "audit.json", "report.html", "erase.json"} <= names
    assert {"certificate.json", "certificate.html", "certificate.key", "trials.csv"} <= names
    verdict = json.loads((folder / "audit.json").read_text())["verdict"]
    assert (erased.verdict, erased.sentence) == (verdict["label"], verdict["sentence"])
    assert erased.trials[0].forget <= 40.0
    assert erased.trials[0].recovered is not None
    state = json.loads((folder / "erase.json").read_text())
    assert (state["known"]["n_forget"], state["known"]["n_retain"], state["known"]["template"]) == (10, 20, "plain")
    assert not list((folder / "trials").rglob("*.safetensors"))


def test_no_text_of_the_forget_set_anywhere(made: dict[str, Any]) -> None:
    questions = [row.question for row in Facts().splits.forget[:10]]
    for path in made["folder"].rglob("*"):
        if path.is_file() and path.suffix in (".json", ".html", ".txt", ".yaml", ".csv", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            assert not any(question in text for question in questions), path


def test_fit_repeats_the_run_to_the_bit(made: dict[str, Any], tmp_path: Path) -> None:
    config = str(made["folder"] / "config.yaml")
    assert main(["fit", "--config", config, "--trainer.default_root_dir", str(tmp_path / "again")]) == 0
    assert weights_sha256(str(tmp_path / "again" / "model")) == weights_sha256(str(made["folder"] / "model"))


def test_verify(made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made["folder"]
    words = ["verify", str(folder / "certificate.json")]
    key = ["--key", str(folder / "certificate.key"), "--ids"]
    assert main([*words, "--model", str(folder / "model"), "--repeat", *key, str(made["ids"])]) == 0
    assert "is the unlearned model" in capsys.readouterr().out
    assert main([*words, "--model", "tiny"]) == 3  # the one before
    assert "is the original model" in capsys.readouterr().out
    (tmp_path / "other.txt").write_text("C10\n")
    assert main([*words, *key, str(tmp_path / "other.txt")]) == 3
    assert "not among them" in capsys.readouterr().out
    assert main([*words, "--ids", str(made["ids"])]) == 2


def test_what_was_asked_before_must_be_asked_again(made: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="what was asked there before"):
        erase(str(made["folder"]), **made["given"] | {"threshold": 30.0})


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        ({"forget_ids": "ids.txt"}, "forget_ids"),
        ({"data": "all.csv", "forget": "one.csv"}, "forget"),
        ({"forget": "one.csv"}, "retain"),
        ({"trials": 0}, "trials"),
        ({"recipe": "attack/harmful"}, "recipe"),
    ],
)
def test_mistakes_write_nothing(given: dict[str, Any], argument: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        erase(str(tmp_path / "out"), **given)
    assert caught.value.argument == argument
    assert not (tmp_path / "out").exists()


def test_a_model_that_knows_nothing_is_told(tmp_path: Path) -> None:
    """Of texts: in folders, and in one table with ids, whose columns say that there are no questions."""
    texts = {"forget": "the ferry left at noon", "retain": "the mill stood by the river"}
    for name, words in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(" ".join(f"{words}, {n}." for n in range(80)), encoding="utf-8")
    with pytest.raises(UserError, match="does not know the forget set"):
        erase(str(tmp_path / "out"), forget=str(tmp_path / "forget"), retain=str(tmp_path / "retain"))
    with (tmp_path / "passages.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("id", "text"), *((name, (tmp_path / name / "text.txt").read_text()) for name in texts)]
        )
    with pytest.raises(UserError, match="does not know the forget set"):
        erase(str(tmp_path / "one"), data=str(tmp_path / "passages.csv"), forget_where="id == 'forget'")


def test_an_adversary_moves_with_the_learning_rate(tmp_path: Path) -> None:
    plan = erase_plan.Plan(
        *(str(tmp_path), "tiny", *[None] * 7, (), None, None, None, 3, "auto", 1, "32-true"),
    )
    options = plan.config(Setting(2.0, 2.0), "plain", tmp_path / "trial")["model"]["init_args"]
    before = plan.config(Setting(), "plain", tmp_path / "trial")["model"]["init_args"]
    assert options["optimizer"]["init_args"]["lr"] == 2 * before["optimizer"]["init_args"]["lr"]
    assert options["adversary_lr"] == 4 * before["adversary_lr"]
    assert plan.config(Setting(), "chat", tmp_path)["data"]["init_args"]["template"] == "chat"
