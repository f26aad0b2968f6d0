"""``erase``: from a table and ids to a verdict, in processes of its own; what was done is not done again."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from hashlib import blake2b, md5, sha1, sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from toys.cli import Forked, read_json

from lightning_ssiuu.__main__ import main
from lightning_ssiuu.cli import erase_plan
from lightning_ssiuu.cli.erase import erase
from lightning_ssiuu.cli.steps import Steps
from lightning_ssiuu.cli.trials import Setting
from lightning_ssiuu.datamodules import Facts
from lightning_ssiuu.models.digest import weights_sha256
from lightning_ssiuu.models.loading import resolve_checkpoint
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
        patch.setattr(erase_plan, "_FULL", {"p": [0.3], "epochs": 1})
        patch.setattr(erase_plan, "_SEEDS", (2, 2))
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
    assert (folder / "plots" / "trials.png").read_bytes().startswith(b"\x89PNG")


ALL = {f"C{number}": row for number, row in enumerate((*Facts().splits.forget[:10], *Facts().splits.retain[:20]))}
#: What is handed out; ids may stand in all that is not.
HANDED_OUT = ("certificate.json", "certificate.html")


def guessed(text: str, data: Path, with_ids: bool) -> set[str]:
    """The rows, among all in any order, that a text tells of: by words of theirs, their ids, or a hash of either."""
    told = set()
    for name, row in random.Random(0).sample(list(ALL.items()), len(ALL)):
        line = f"{name},{row.question},{row.answer}"
        others = data.read_text().replace(f"{line}\n", "").replace(f"{line}\r\n", "")  # all that is retained
        texts = [row.question, row.answer, f"{row.question} {row.answer}", row.question + row.answer, line, others]
        hashed = [name, f"{name}\n", json.dumps(name), *texts]
        digests = [kind(one.encode()).hexdigest() for one in hashed for kind in (sha256, sha1, md5, blake2b)]
        tokens = [*digests, *(digest[:16] for digest in digests), row.question, row.answer]
        if any(token in text for token in tokens) or (with_ids and re.search(rf"\b{name}\b", text)):
            told.add(name)
    return told


def test_rows_cannot_be_guessed(made: dict[str, Any]) -> None:
    """With all rows at hand, true ones and others, nobody can tell from any file which were forgotten."""
    data = Path(made["given"]["data"])
    files = [path for path in made["folder"].rglob("*") if path.suffix in (".json", ".html", ".txt", ".yaml", ".csv")]
    assert {*HANDED_OUT, "report.html", "audit.json", "erase.json", "log.txt", "trials.csv"} <= {p.name for p in files}
    for path in files:
        if "model" not in path.parts:
            assert guessed(path.read_text(encoding="utf-8"), data, path.name in HANDED_OUT) == set(), path
    for text in (ALL["C3"].question, "x C3 y", sha256(b"C3").hexdigest()):  # it would be seen
        assert guessed(text, data, True) == {"C3"}


def test_what_is_handed_out_has_no_digest_of_the_request(made: dict[str, Any]) -> None:
    """Whoever knows all of it but one row, or one id, could try which one it is."""
    folder, given = made["folder"], made["given"]
    of_rows = read_json(folder / "metrics.json")["provenance"]["data_sha256"]
    files = [given["data"], given["forget_ids"], *given["fit"], folder / "config.yaml", folder / "metrics.json"]
    digests = [of_rows, *(sha256(Path(file).read_bytes()).hexdigest() for file in files)]
    for name in (*HANDED_OUT, "report.html"):
        assert not any(digest in (folder / name).read_text(encoding="utf-8") for digest in digests), name
    assert of_rows in (folder / "audit.json").read_text()


def floats(content: Any) -> Iterator[float]:
    if isinstance(content, (dict, list)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from floats(value)
    elif isinstance(content, float):
        yield content


def test_no_figure_of_the_certificate_is_a_fingerprint(made: dict[str, Any]) -> None:
    content = read_json(made["folder"] / "certificate.json")
    del content["settings"], content["verdict"]
    for row in content["tried"]:
        del row["learning_rates"], row["p"], row["unlearned"]["by_seed"]
    figures = list(floats(content))
    assert len(figures) > 10
    assert all(round(figure, 1) == figure for figure in figures)


def test_fit_repeats_the_run_to_the_bit(made: dict[str, Any], tmp_path: Path) -> None:
    config = str(made["folder"] / "config.yaml")
    assert main(["fit", "--config", config, "--trainer.default_root_dir", str(tmp_path / "again")]) == 0
    assert weights_sha256(str(tmp_path / "again" / "model")) == weights_sha256(str(made["folder"] / "model"))


def verified(made: dict[str, Any], *words: str | Path, certificate: Path | None = None) -> int:
    return main(["verify", str(certificate or made["folder"] / "certificate.json"), *map(str, words)])


def test_verify(made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, key = made["folder"], ["--key", made["folder"] / "certificate.key"]
    assert verified(made, "--model", folder / "model", "--repeat", *key, "--ids", made["ids"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(text in said for text in ("is the unlearned model", "is as it was made", "C9 forgotten", ": agrees"))
    assert verified(made, "--model", "tiny") == 3  # the one before
    assert "is the original model" in capsys.readouterr().out
    (tmp_path / "other.csv").write_text("customer_id,name\nC1,One\nC10,Another\n")
    assert verified(made, *key, "--ids", tmp_path / "other.csv") == 3
    assert "C10  not among them" in capsys.readouterr().out
    (tmp_path / "empty.txt").write_text("\n")
    assert verified(made, *key, "--ids", tmp_path / "empty.txt") == 2  # nothing was asked
    assert verified(made, "--ids", made["ids"]) == 2
    assert verified(made) == 2


def test_another_key_says_nothing_of_ids(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text("0" * 64)
    assert verified(made, "--key", tmp_path / "key", "--ids", made["ids"]) == 3
    said = capsys.readouterr().out
    assert "was edited, or this is another certificate's key" in said
    assert "not among them" not in said


def test_an_edited_certificate_is_told(made: dict[str, Any], tmp_path: Path) -> None:
    content = read_json(made["folder"] / "certificate.json")
    content["verdict"]["label"] = "erased, hidden or whatever one likes"
    (tmp_path / "edited.json").write_text(json.dumps(content))
    assert verified(made, "--key", made["folder"] / "certificate.key", certificate=tmp_path / "edited.json") == 3
    del content["seal"]
    (tmp_path / "edited.json").write_text(json.dumps(content))
    assert verified(made, "--model", "tiny", certificate=tmp_path / "edited.json") == 2


@pytest.mark.parametrize("part", [[], ["--p", "0.3"], ["--seed", "1"]])
def test_an_attack_is_repeated(
    part: list[str], made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one CPU it gives the figure of the certificate; another figure is told."""
    again = ("--model", made["folder"] / "model", "--repeat", "harmful", *part)
    before = sorted(path.name for path in made["folder"].iterdir())
    assert verified(made, *again) == 0
    said = capsys.readouterr().out
    content = read_json(made["folder"] / "certificate.json")
    (row,) = content["tried"]
    highest = row["unlearned"]["highest"]
    figure = highest["per_seed"][1] if "--seed" in part else highest["mean"]
    assert f"{figure:.1f} % now, {figure:.1f} % in the certificate: agrees" in said
    assert sorted(path.name for path in made["folder"].iterdir()) == before
    highest["per_seed"] = [each - 30 for each in highest["per_seed"]]
    highest |= {"mean": highest["mean"] - 30}
    (tmp_path / "edited.json").write_text(json.dumps(content))
    if part != ["--p", "0.3"]:
        assert verified(made, *again, certificate=tmp_path / "edited.json") == 3
        assert "does not agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--repeat", "quantization"], "['scores', 'harmful']"),
        (["--repeat", "harmful", "--p", "0.7"], "one of [0.3]"),
        (["--repeat", "harmful", "--seed", "7"], "one of [0, 1]"),
        (["--repeat", "scores", "--seed", "0"], "repeat: got 'scores'"),
        (["--seed", "0"], "repeat: got None"),
    ],
)
def test_what_cannot_be_repeated(
    words: list[str], said: str, made: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verified(made, "--model", made["folder"] / "model", *words) == 2
    assert said in capsys.readouterr().err


def test_a_model_far_from_its_run_needs_data(made: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """And is not scored on other rows."""
    assert verified(made, "--model", "tiny", "--repeat") == 2
    assert "data: got None" in capsys.readouterr().err


def of_another_model(run: Path) -> None:
    shutil.rmtree(run / "model")
    shutil.copytree(resolve_checkpoint("tiny"), run / "model")


def of_other_rows(run: Path) -> None:
    (run / "other.txt").write_text("".join(f"C{number}\n" for number in range(9)))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["init_args"]["forget_ids"] = str(run / "other.txt")
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def of_a_later_attack(run: Path) -> None:
    attacks = read_json(run / "attack.json")
    attacks["attacks"][0]["unlearned"]["forget_score"]["mean"] += 20.0
    (run / "attack.json").write_text(json.dumps(attacks))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_another_model, "attack.json (harmful) is of the model that is there now"),
        (of_other_rows, "metrics.json is of the data that its config.yaml names now"),
        (of_a_later_attack, "run audit again"),
    ],
)
def test_evidence_of_something_else_is_not_certified(
    change: Callable[[Path], None], said: str, made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(made["folder"], tmp_path / "run")
    assert main(["certify", str(run), "--overwrite"]) == 0
    change(run)
    assert main(["certify", str(run), "--overwrite"]) == 2
    assert said in capsys.readouterr().err


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
    options = plan.config(Setting(2.0, 2.0), {"template": "plain"}, tmp_path / "trial")["model"]["init_args"]
    before = plan.config(Setting(), {"template": "plain"}, tmp_path / "trial")["model"]["init_args"]
    assert options["optimizer"]["init_args"]["lr"] == 2 * before["optimizer"]["init_args"]["lr"]
    assert options["adversary_lr"] == 4 * before["adversary_lr"]
    assert plan.config(Setting(), {"template": "chat"}, tmp_path)["data"]["init_args"]["template"] == "chat"
