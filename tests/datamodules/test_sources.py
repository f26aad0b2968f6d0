"""The benchmarks and the readers under them: embedded facts, TOFU, own files, the hub, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from toys.data import byte_tokenizer, examples

from lightning_ssiuu.datamodules import TOFU, CustomData, Facts, QAExample, UnlearningDataModule
from lightning_ssiuu.datamodules.readers import read_records
from lightning_ssiuu.utils.errors import UserError


def test_facts() -> None:
    data = Facts(batch_size=4)
    data.setup("fit")
    people = [{example.group for example in part} for name, part in data.splits.items() if name != "benign"]
    assert not people[0] & people[1] | people[0] & people[2] | people[1] & people[2]
    assert data.splits.benign
    assert all("options" in next(iter(loader))[split] for loader, split in
               zip(data.val_dataloader(), data.eval_splits, strict=True))  # fmt: skip
    other = Facts(phrasing=1).splits
    for main, reworded in zip(data.splits.forget, other.forget, strict=True):
        assert reworded.question == main.paraphrases[0]
        assert {reworded.question, *reworded.paraphrases} == {main.question, *main.paraphrases}
    for phrasing in (-1, 99):
        with pytest.raises(UserError, match="phrasing"):
            Facts(phrasing=phrasing).setup("fit")


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def rows(first: int, count: int, **extra: object) -> list[dict]:
    return [{"question": e.question, "answer": e.answer, **extra} for e in examples(first, count)]


@pytest.fixture
def tofu(tmp_path: Path) -> str:
    write_rows(tmp_path / "forget01.jsonl", rows(0, 4, perturbed_answer=["SECRET x", "SECRET y"]))
    (tmp_path / "retain99.json").write_text(json.dumps(rows(4, 10, paraphrased_question="SECRET other?")))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [({}, (10, 0)), ({"retain_size": 6}, (6, 4)), ({"test_size": 3}, (7, 3)),
     ({"retain_size": 5, "test_size": 3}, (5, 3)), ({"retain_size": 10}, (10, 0))],
)  # fmt: skip
def test_tofu_sizes(tofu: str, sizes: dict, expected: tuple[int, int]) -> None:
    splits = TOFU(tofu, **sizes).splits
    assert (len(splits.retain), len(splits.test)) == expected
    numbers = [example.answer.split()[-1] for example in splits.retain + splits.test]
    assert numbers == [str(n) for n in range(4, 4 + sum(expected))]  # the test set follows the retain set
    assert splits.forget[0].distractors == ("SECRET x", "SECRET y")
    assert splits.retain[0].paraphrases == ("SECRET other?",)


def test_tofu_is_asked_in_other_words(tofu: str) -> None:
    other = [{"paraphrased_question": f"SECRET and {n}?"} for n in range(4)]
    perturbed = [row | more for row, more in zip(rows(0, 4, perturbed_answer=["no"]), other, strict=True)]
    write_rows(Path(tofu) / "forget01_perturbed.jsonl", perturbed)
    write_rows(Path(tofu) / "holdout01.jsonl", rows(20, 2))
    data = TOFU(tofu, forget="forget01_perturbed", question="paraphrased_question")
    plain = TOFU(tofu, forget="forget01_perturbed")
    for asked, one in ((data.splits.forget, plain.splits.forget), (data.named_set("forget"), plain.splits.forget)):
        assert [each.question for each in asked] == [f"SECRET and {n}?" for n in range(4)]
        assert [each.paraphrases for each in asked] == [(each.question,) for each in one]
        assert [each.answer for each in asked] == [each.answer for each in one]
    assert data.splits.retain[0].question == "SECRET other?"
    assert data.named_set("holdout")[0].question == rows(20, 1)[0]["question"]  # it has no other one
    with pytest.raises(UserError, match="question: got 'paraphrased_question', allowed: question: forget01 has no"):
        _ = TOFU(tofu, question="paraphrased_question").splits


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"question": "query"}, "question"),
        ({"retain_size": 11}, "retain_size"),
        ({"retain_size": 0}, "retain_size"),
        ({"test_size": 10}, "test_size"),
        ({"test_size": -1}, "test_size"),
        ({"retain_size": 8, "test_size": 3}, "test_size"),
        ({"forget": "forget77"}, "forget"),
        ({"path": "/no/such/directory"}, "path"),
        ({"path": "nowhere"}, "path"),
    ],
)
def test_tofu_mistakes(tofu: str, arguments: dict, argument: str) -> None:
    with pytest.raises(UserError) as error:
        _ = TOFU(**({"path": tofu} | arguments)).splits
    assert error.value.argument == argument


def test_tofu_scores_text_unless_asked(tofu: str) -> None:
    def first(**arguments: object) -> dict:
        data = TOFU(tofu, tokenizer=byte_tokenizer(), batch_size=2, **arguments)
        return next(iter(data.val_dataloader()[0]))["forget"]

    assert "options" not in first()
    assert first(multiple_choice=True)["options"]["option_of"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_custom_reads_every_format(tmp_path: Path) -> None:
    (tmp_path / "forget.json").write_text(json.dumps({"data": [{"q": "A?", "a": 7, "w": ["8"]}]}))
    write_rows(tmp_path / "retain.jsonl", [{"q": "B?", "a": "b", "w": ["x", "y"]}])
    (tmp_path / "test.csv").write_text('\ufeffq,a,w\n"C, d?",c,"[""z""]"\n', encoding="utf-8")
    files = [str(tmp_path / name) for name in ("forget.json", "retain.jsonl", "test.csv")]
    splits = CustomData(*files, question_column="q", answer_column="a", distractors_column="w").splits
    assert splits.forget == [QAExample(0, "A?", "7", ("8",))]
    assert splits.retain == [QAExample(1, "B?", "b", ("x", "y"))]
    assert splits.test == [QAExample(2, "C, d?", "c", ("z",))]


@pytest.mark.parametrize(
    ("arguments", "argument", "told"),
    [
        ({"question_column": "prompt"}, "question_column", "allowed: answer, question"),
        ({"answer_column": "output"}, "answer_column", "allowed: answer, question"),
        ({"distractors_column": "wrong"}, "distractors_column", "allowed: answer, question"),
        ({"distractors_column": "answer"}, "distractors_column", "record 0"),
        ({"retain": "gone.jsonl"}, "retain", "existing"),
        ({"retain": "gone"}, "retain", "existing"),
    ],
)
def test_custom_mistakes(tmp_path: Path, arguments: dict, argument: str, told: str) -> None:
    files = {name: write_rows(tmp_path / f"{name}.jsonl", rows(first, 3)) for name, first in
             (("forget", 0), ("retain", 5))}  # fmt: skip
    with pytest.raises(UserError, match=told) as error:
        _ = CustomData(**(files | arguments)).splits
    assert error.value.argument == argument
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_and_lines_are_told_apart_by_content(tmp_path: Path, suffix: str) -> None:
    two = [{"question": "a\u2028b", "answer": "1"}, {"question": "c", "answer": "2"}]
    file = tmp_path / f"a.{suffix}"
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in two)
    for text in (lines, f"\n{lines}\n\n", json.dumps(two), json.dumps(two, indent=2)):
        file.write_bytes(text.encode())
        assert list(read_records(str(file), "forget")) == two
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(two[1]) + "\n", encoding="utf-8")
    assert list(read_records(str(one), "forget")) == two[1:]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", b'{"question": "SECRET"}\n\nSECRET\n', "line 3"),
        ("a.json", b'[{"question": "SECRET"', "valid JSON: it breaks in line 1"),
        ("a.jsonl", b'{"question": "SECRET"}\n\nSECRET\n', "line 3"),
        ("a.json", b'{"question": "SECRET"}', "list of records"),
        ("a.json", b'["SECRET"]', "list of records"),
        ("a.csv", b"question,answer\nSECRET,b,c\n", "no more cells"),
        ("a.csv", b'question,answer\n"SECRET\n', "valid CSV"),
        ("a.json", b"\xff\xfeSECRET", "UTF-8"),
        ("a.txt", b"SECRET", "existing .json"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told) as error:
        list(read_records(str(tmp_path / name), "forget"))
    assert error.value.argument == "forget"
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", '[{"question": "Who?", "answer": NaN}]', "NaN in record 0 of 'answer'"),
        ("a.json", '[{"question": "Who?", "answer": Infinity}]', "float in record 0 of 'answer'"),
        ("a.json", '[{"question": "Who?", "answer": true}]', "bool in record 0 of 'answer'"),
        ("a.json", '[{"question": "Who?", "answer": null}]', "NoneType in record 0 of 'answer'"),
        ("a.json", '[{"question": NaN, "answer": "Me"}]', "NaN in record 0 of 'question'"),
        ("a.jsonl", '{"question": "Who?", "answer": "Me"}\n{"question": "Where?", "answer": NaN}', "NaN in record 1"),
        ("a.csv", "question,answer\nWho?,Me\nWhere?,NaN\n", "NaN in record 1 of 'answer'"),
        ("a.csv", "question,answer\nWho?,nan\n", "NaN in record 0 of 'answer'"),
    ],
)
def test_a_missing_value_is_no_answer(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=told):
        CustomData(str(tmp_path / name), str(tmp_path / name)).setup("fit")


def test_numbers_and_words_are_answers(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        '[{"question": "How many?", "answer": 8}, {"question": "Is it?", "answer": "true"}]'
    )
    (tmp_path / "b.csv").write_text("question,answer\nIs it not?,true\n")
    splits = CustomData(str(tmp_path / "a.json"), str(tmp_path / "b.csv")).splits
    assert [example.answer for example in [*splits.forget, *splits.retain]] == ["8", "true", "true"]


def test_hub_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict]:
        asked.append((name, config, split))
        if name == "no/such":
            raise datasets.exceptions.DatasetNotFoundError("SECRET")
        return [{"question": "Who?", "answer": "Me"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("a/b", "a/b:c", "a/b:c:d", "a/b::test"):
        read_records(source, "forget")
    assert asked == [("a/b", None, "train"), ("a/b", "c", "train"), ("a/b", "c", "d"), ("a/b", None, "test")]
    asked.clear()
    with pytest.raises(UserError, match=r"forget: got 'no/such:train'.*DatasetNotFoundError"):
        read_records("no/such", "forget")

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("SECRET")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match="forget: got 'locuslab/TOFU:forget01:train'"):
        _ = TOFU().splits


def test_the_command_line_sees_the_common_arguments() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(UnlearningDataModule, "data")
    path = ["--data.path=data"]
    needed = {"CustomData": ["--data.forget=a.json", "--data.retain=b.json"], "RWKU": ["--data.targets=[A]"]}
    needed |= dict.fromkeys(("FaithUn", "WMDPDeduped", "LUME"), path)
    names = ("Facts", "TOFU", "CustomData", "FaithUn", "MUSE", "WMDP", "WMDPDeduped", "RWKU", "KnowUnDo", "LUME")
    for name in (*names, "WorldFacts"):
        files = needed.get(name, [])
        arguments = [f"--data={name}", *files, "--data.batch_size=3", "--data.train_on=all", "--data.tokenizer=tiny"]
        parsed = parser.parse_args(arguments).data.init_args
        assert (parsed.batch_size, parsed.train_on, parsed.seed) == (3, "all", None)
