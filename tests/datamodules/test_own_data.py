"""Data as people have them: one table with ids or a condition, usual names of columns, ids in every message."""

from __future__ import annotations

import csv
import hashlib
import hmac
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from toys.data import Toy, byte_tokenizer, examples

from lightning_ssiuu import Harmful
from lightning_ssiuu.datamodules import CustomData, RelearnDataModule, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.columns import Columns, id_text, turns_of
from lightning_ssiuu.datamodules.invented import control_of
from lightning_ssiuu.datamodules.readers import read_records
from lightning_ssiuu.reports.audit.measure import Findings
from lightning_ssiuu.utils.errors import UserError

KEY = b"0123456789abcdef"


def records(count: int = 6, **extra: Any) -> list[dict[str, Any]]:
    """Rows whose ids are A0, B1, A0, B3, ...: A0 stands for three of six."""
    asked = [{"question": f'SECRET {n}, "who"?', "answer": f"SECRET; {n}"} for n in range(count)]
    return [{"id": "A0" if n % 2 == 0 else f"B{n}", "customer": 10 + n, **row, **extra} for n, row in enumerate(asked)]


def write(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def ids_of(data: CustomData, split: str = "forget") -> list[str]:
    return [example.name for example in dict(data.splits.items())[split]]


FORMATS = {"t.csv": ",", "semicolons.csv": ";", "tabs.csv": "\t", "t.tsv": "\t", "t.json": "", "t.jsonl": ""}


@pytest.mark.parametrize("name", [*FORMATS, "t.parquet"])
def test_a_table_and_ids_are_what_two_files_are(tmp_path: Path, name: str) -> None:
    table = write(tmp_path / name, records(), FORMATS.get(name, ""))
    sets = {"forget": records()[::2], "retain": records()[1::2]}
    files = [write(tmp_path / f"{part}.jsonl", rows) for part, rows in sets.items()]
    (tmp_path / "ids.txt").write_text("\n A0 \n\n")
    expected = CustomData(*files, tokenizer=byte_tokenizer())
    for chosen in ({"forget_ids": str(tmp_path / "ids.txt")}, {"forget_ids": ["A0"]}, {"forget_where": "id == 'A0'"}):
        data = CustomData(data=table, tokenizer=byte_tokenizer(), **chosen)
        assert (ids_of(data), ids_of(data, "retain")) == (["A0"] * 3, ["B1", "B3", "B5"])
        assert data.splits == expected.splits
        assert data.content_sha256() == expected.content_sha256()


def test_a_column_of_numbers_is_of_ids_too(tmp_path: Path) -> None:
    rows = [{"uid": n, "prompt": f"p{n}?", "completion": f"c{n}"} for n in range(4)]
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        data = CustomData(data=write(tmp_path / name, rows), forget_ids=[2, "0"])
        assert (ids_of(data), ids_of(data, "retain")) == (["0", "2"], ["1", "3"])
    assert [id_text(value) for value in (7, 7.0, "007", " a  b ", None, float("nan"))] == [
        "7",
        "7",
        "007",
        "a b",
        "",
        "",
    ]


@pytest.mark.parametrize("name", ["ids.csv", "ids.jsonl", "ids.parquet"])
def test_ids_in_a_table_of_their_own(tmp_path: Path, name: str) -> None:
    table = write(tmp_path / "t.jsonl", records())
    ids = write(tmp_path / name, [{"asked": "2026-01-01", "ID": "B1"}, {"asked": "2026-01-02", "ID": "B5"}])
    assert ids_of(CustomData(data=table, forget_ids=ids)) == ["B1", "B5"]


def test_a_list_of_ids_that_is_called_a_table(tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("B1\nB5\n")
    data = CustomData(data=write(tmp_path / "t.jsonl", records()), forget_ids=str(tmp_path / "ids.csv"))
    assert ids_of(data) == ["B1", "B5"]


def test_a_test_set_stands_beside_a_table(tmp_path: Path) -> None:
    files = {"data": records(), "test": [{"prompt": "SECRET other?", "response": "x"}]}
    data = CustomData(forget_ids=["A0"], **{n: write(tmp_path / f"{n}.jsonl", rows) for n, rows in files.items()})
    assert [(e.example_id, e.name) for e in data.splits.test] == [(6, "6")]  # no ids there: by number


@pytest.mark.parametrize(
    ("options", "argument", "told"),
    [
        ({"forget_ids": ["A0", "C7", "C8"]}, "forget_ids", r"got 2 ids \(C7, C8\), allowed: ids that rows"),
        ({"forget_ids": [f"C{n}" for n in range(9)]}, "forget_ids", r"9 ids \(C0, C1, C2, C3, C4, C5, C6, C7, C8\)"),
        ({"forget_ids": []}, "forget_ids", "got 0 ids"),
        ({"forget_ids": ["A0", ""]}, "forget_ids", "got an empty id"),
        ({"forget_ids": ["A0", "B1", "B1"]}, "forget_ids", r"got 1 ids \(B1\) more than once"),
        ({"forget_ids": ["A0", "B1", "B3", "B5"]}, "forget_ids", "got every row of 6, allowed: some rows"),
        ({"forget_ids": "gone.txt"}, "forget_ids", "'gone.txt', allowed: an existing file with one id a line"),
        (
            {"forget_ids": ["A0"], "id_column": "number"},
            "id_column",
            "'number', allowed: answer, customer, id, question",
        ),
        ({"forget_where": "customer > 99"}, "forget_where", "got no row of 6"),
        ({"forget_where": "customer > 9"}, "forget_where", "got every row of 6"),
        ({"forget_where": "costumer == 17"}, "forget_where", r"'costumer', allowed: .*\(did you mean 'customer'\?\)"),
        ({"forget_where": "id > 3"}, "forget_where", "got record 0 of 'id', allowed: a number"),
        ({"forget_where": "customer.real == 17"}, "forget_where", "allowed: columns, numbers and quoted texts"),
        ({}, "forget_ids, forget_where", "got nothing, allowed: one of the two"),
        ({"forget_ids": ["A0"], "forget_where": "id == 1"}, "forget_ids, forget_where", "one of the two"),
    ],
)
def test_what_is_chosen_badly(tmp_path: Path, options: dict[str, Any], argument: str, told: str) -> None:
    table = write(tmp_path / "t.jsonl", records())
    with pytest.raises(UserError, match=told) as error:
        _ = CustomData(data=table, **options).splits
    assert error.value.argument == argument
    assert "SECRET" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "argument", "told"),
    [
        ({}, "forget, retain", "got nothing, allowed: a file or hub data set for each; or one table"),
        ({"forget": "f.jsonl"}, "retain", "got nothing"),
        ({"forget": "f.jsonl", "retain": "r.jsonl", "forget_ids": ["1"]}, "forget_ids", "null, or a table"),
        ({"data": "t.csv", "forget_ids": ["1"], "retain": "r.jsonl"}, "retain", "null, beside a table"),
        ({"data": "t.csv", "forget_ids": ["1"], "ids": "hidden"}, "ids", "one of"),
        ({"data": "t.csv", "forget_ids": ["1"], "answers": "first"}, "answers", "one of"),
        ({"data": "t.csv", "forget_ids": ["1"], "ids": "hashed"}, "id_key", "openssl rand"),
        ({"data": "t.csv", "forget_ids": ["1"], "ids": "hashed", "id_key": "gone"}, "id_key", "openssl rand"),
    ],
)
def test_sources_that_do_not_go_together(options: dict[str, Any], argument: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:  # before anything is read
        CustomData(**options)
    assert error.value.argument == argument


def test_rows_without_an_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = records()
    del rows[1]["id"]
    rows[3]["id"] = None
    data = CustomData(data=write(tmp_path / "t.jsonl", rows), forget_ids=["A0"])
    with caplog.at_level(logging.INFO):
        assert ids_of(data, "retain") == ["record 1", "record 3", "B5"]
    assert "data: 2 of 6 rows have no id; they are in the retain set." in caplog.text
    unnamed = write(tmp_path / "u.jsonl", [{k: row[k] for k in ("customer", "question", "answer")} for row in rows])
    data = CustomData(data=unnamed, forget_where="customer in (11, 13)")
    assert (ids_of(data), ids_of(data, "retain")) == (["record 1", "record 3"], [f"record {n}" for n in (0, 2, 4, 5)])
    told = r"^id_column: got no column called 'id', .*, allowed: answer, customer, question$"
    with pytest.raises(UserError, match=told):
        _ = CustomData(data=unnamed, forget_ids=["A0"]).splits
    assert ids_of(CustomData(data=unnamed, forget_ids=["12"], id_column="customer")) == ["12"]


ROW = {"question": "q?", "answer": "a"}
USER, ASSISTANT = {"role": "user", "content": "u?"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROW, ("q?", "a")),
        ({"Prompt": "p?", "Completion": "c"}, ("p?", "c")),
        ({"prompt": "p?", "response": "r", "text": "all"}, ("p?", "r")),
        ({"instruction": "i", "input": "x", "output": "o"}, ("i\nx", "o")),
        ({"instruction": "i", "input": "", "output": "o"}, ("i", "o")),
        ({"instruction": "i", "input": None, "output": "o"}, ("i", "o")),
        ({"input": "x", "output": "o"}, ("x", "o")),
        ({"question": "q?", "input": "not for it", "answer": 3}, ("q?", "3")),
        ({"prompt": [USER], "completion": [ASSISTANT]}, ("u?", "a")),
        ({"messages": [USER, ASSISTANT]}, ("u?", "a")),
        ({"prompt": "u?", "messages": [USER, ASSISTANT]}, ("u?", "a")),
        ({"conversations": [{"from": "human", "value": "h?"}, {"from": "gpt", "value": "g"}]}, ("h?", "g")),
        ({"messages": json.dumps([USER, ASSISTANT])}, ("u?", "a")),
    ],
)  # fmt: skip
def test_columns_are_found_by_their_usual_names(row: dict[str, Any], expected: tuple[str, str]) -> None:
    (example,) = Columns().found(row).examples(row, 0)
    assert (example.question, example.answer, example.history) == (*expected, ())


def test_columns_are_given() -> None:
    row = {"question": "no", "answer": "no", "q": "Who?", "more": "Now.", "a": "Me", "w": ["You"], "nr": 7}
    columns = Columns("q", "a", "more", distractors="w", id="nr").found(row)
    (example,) = columns.examples(row, 0)
    assert (example.question, example.answer, example.distractors) == ("Who?\nNow.", "Me", ("You",))
    assert example.name == "7"
    talk = {
        "question": "no",
        "answer": "no",
        "t": [{"role": "user", "content": "u?"}, {"role": "model", "content": "a"}],
    }
    assert [e.answer for e in Columns(messages="t").found(talk).examples(talk, 0)] == ["a"]


@pytest.mark.parametrize(
    ("row", "argument", "told"),
    [
        ({"id": 1, "text": "SECRET"}, "question_column", "got 'question', allowed: id, text; .*Documents takes"),
        ({"id": 1, "said": "SECRET"}, "question_column", "got 'question', allowed: id, said; found .* prompt,"),
        ({"id": 1, "prompt": "SECRET"}, "answer_column", "got 'answer', allowed: id, prompt; found .* completion,"),
        ({"prompt": "SECRET", "answer": None}, "answer_column", "NoneType in record 0 of 'answer'"),
        ({"messages": "SECRET"}, "messages_column", "record 0 of 'messages', allowed: a list of messages"),
        (
            {"messages": {"role": 7, "content": ["SECRET"]}},
            "messages_column",
            "record 0 of 'messages', allowed: a list",
        ),
        ({"prompt": {"SECRET": 1}, "answer": "SECRET"}, "question_column", "record 0 of 'prompt', allowed: a list"),
        ({"messages": []}, "messages_column", "record 0 of 'messages', allowed: a list of messages"),
        ({"messages": [{"role": "SECRET", "content": "SECRET"}]}, "messages_column", "another role in record 0"),
        ({"messages": [{"role": "user", "content": None}]}, "messages_column", "NoneType in record 0 of 'messages'"),
        (
            {"messages": [{"role": "user", "content": "SECRET"}]},
            "messages_column",
            "an assistant's turn after a user's",
        ),
        ({"SECRET is this?": "SECRET"}, "question_column", "whose names look like data"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, row: dict[str, Any], argument: str, told: str) -> None:
    file = write(tmp_path / "t.jsonl", [row])
    with pytest.raises(UserError, match=told) as error:
        _ = CustomData(file, file).splits
    assert error.value.argument == argument
    assert "SECRET" not in str(error.value)


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "."}]},
    {"role": "user", "content": "Thanks."},
]


def test_conversations() -> None:
    row = {"id": "T", "messages": TALK}
    (last,) = Columns().found(row).examples(row, 0)
    said = tuple((turn["role"], turn["content"]) for turn in TALK[:4])
    assert (last.history, last.question, last.answer, last.name) == (said, "Two?", "2.", "T")
    first, second = Columns(answers="all").found(row).examples(row, 0)  # the greeting answers nothing
    assert (first.history, first.question, first.answer, first.name) == (said[:2], "One?", "1", "T")
    assert second == last
    assert first.folded == "be brief. hello! one?"
    by_column = {"role": ["human", "gpt"], "content": ["Who?", "Me"]}
    assert turns_of(by_column, 0, "messages", "") == [("user", "Who?"), ("assistant", "Me")]


def test_conversations_in_parquet(tmp_path: Path) -> None:
    rows = [{"id": n, "messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}"}] * 2}
            for n in range(3)]  # fmt: skip
    data = CustomData(data=write(tmp_path / "t.parquet", rows), forget_ids=[1], answers="all")
    assert [(e.name, e.question, len(e.history)) for e in data.splits.forget] == [("1", "1?", 0), ("1", "1?", 2)]
    assert len(data.splits.retain) == 4


def hashed(name: str) -> str:
    return hmac.new(KEY, name.encode(), hashlib.sha256).hexdigest()[:16]


@pytest.fixture
def key(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "id.key").write_bytes(KEY + b"\n")
    return {"ids": "hashed", "id_key": str(tmp_path / "id.key")}


def test_hashed_ids(tmp_path: Path, key: dict[str, str]) -> None:
    table = write(tmp_path / "t.jsonl", records())
    data = CustomData(data=table, forget_ids=["B1", "B3"], **key)
    assert ids_of(data) == [hashed("B1"), hashed("B3")]
    assert not any(name in str(vars(e)) for _, some in data.splits.items() for e in some for name in ("A0", "B1", "B3"))
    plain = CustomData(data=table, forget_ids=["B1", "B3"])
    assert data.content_sha256() == plain.content_sha256()  # what ids are called changes nothing else
    assert data.splits.sha256() == plain.splits.sha256()
    with pytest.raises(UserError) as error:
        _ = CustomData(data=table, forget_ids=["B1", "C7"], **key).splits
    assert hashed("C7") in str(error.value)
    assert "C7" not in str(error.value)
    (tmp_path / "id.key").write_text("short")
    with pytest.raises(UserError, match=r"id_key: .*at least 16 bytes"):
        CustomData(data=table, forget_ids=["B1"], **key)


def mistakes(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Tables whose row B5 is wrong in some way, which the name of the table says."""
    long, blank, shared, distractors = (records() for _ in range(4))
    long[5]["answer"] = "SECRET " * 60
    blank[5]["answer"] = " "
    shared[5]["question"] = shared[0]["question"].upper()
    for row in distractors:
        row["wrong"] = ["SECRET wrong", row["answer"] if row["id"] == "B5" else "SECRET other"]
    return {"long": long, "blank": blank, "shared": shared, "distractors": distractors}


@pytest.mark.parametrize("name", ["long", "blank", "shared", "distractors"])
@pytest.mark.parametrize("hide", [False, True])
def test_messages_have_the_ids(tmp_path: Path, name: str, hide: bool, key: dict[str, str]) -> None:
    table = write(tmp_path / "t.jsonl", mistakes(tmp_path)[name])
    options = {"distractors_column": "wrong"} if name == "distractors" else {}
    data = CustomData(data=table, forget_ids=["A0"], tokenizer=byte_tokenizer(), **options, **(key if hide else {}))
    with pytest.raises(UserError) as error:
        data.setup("fit")
    shown, hidden = (hashed("B5"), "B5") if hide else ("B5", hashed("B5"))
    assert shown in str(error.value)
    assert hidden not in str(error.value)
    assert "SECRET" not in str(error.value)


def test_reports_and_attacks_have_the_ids(tmp_path: Path) -> None:
    data = CustomData(data=write(tmp_path / "t.jsonl", records()), forget_ids=["B1", "B3", "B5"])
    findings = Findings()
    findings.answers |= {"original": {1: "x", 2: "y"}, "unlearned": {1: "u", 2: "v"}}
    assert [(row["example_id"], row["unlearned"]) for row in findings.examples(data)] == [("B3", "u"), ("B5", "v")]
    assert [data.name_of(number) for number in (0, 3, 99)] == ["B1", "A0", "99"]
    twice = RelearnDataModule(data, "own", None, selection=lambda forget, p, rng: (forget[:2], forget[1:]))
    with pytest.raises(UserError, match=r"scored: got 1 questions that are also attacked \(example ids B3\)"):
        twice.setup("fit")
    control = control_of(data)
    assert control is not None
    assert all(example.source_id == "" for example in control.data.splits.forget)  # made of them, but nobody's rows


def test_a_few_rows_are_enough_to_attack(caplog: pytest.LogCaptureFixture) -> None:
    data = Toy(Splits(examples(0, 3), examples(10, 7)))
    cells = Harmful(seeds=[0, 1]).cells(data)
    assert [(cell.p, len(cell.attacked), len(cell.scored)) for cell in cells] == [(0.3, 1, 2)] * 2
    assert [cell.p for cell in Harmful(seeds=[0]).cells(Toy(Splits(examples(0, 6), examples(10, 4))))] == [0.1, 0.3]
    with pytest.raises(UserError, match=r"attack.p: got 0.1, allowed: .* of 1 it takes 0 and leaves 1"):
        Harmful().cells(Toy(Splits(examples(0, 1), examples(10, 4))))
    with caplog.at_level(logging.INFO):
        from lightning_ssiuu.training.devices import Devices

        Harmful(seeds=[0]).check(data, "first_token", Devices("cpu"))
    assert "attack.p: without 0.1, which of 3 forget examples is less than half of one." in caplog.text


def test_the_columns_found_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"ID": n, "prompt": f"{n}?", "response": "r"} for n in range(4)]
    with caplog.at_level(logging.INFO):
        _ = CustomData(data=write(tmp_path / "t.csv", rows), forget_ids=[1]).splits
    assert "data: questions in 'prompt', answers in 'response', ids in 'ID'." in caplog.text


def test_options_of_earlier_runs_and_from_the_command_line(tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(UnlearningDataModule, "data")
    files = {name: write(tmp_path / f"{name}.jsonl", records()[n::2]) for n, name in enumerate(("forget", "retain"))}
    names = {"test": None, "question_column": "question", "answer_column": "answer", "distractors_column": None}
    config = {"class_path": "lightning_ssiuu.CustomData", "init_args": files | names}
    earlier = parser.instantiate_classes(parser.parse_object({"data": config})).data
    table = write(tmp_path / "t.csv", records())
    given = ["--data=CustomData", f"--data.data={table}", '--data.forget_ids=["A0"]']
    assert parser.instantiate_classes(parser.parse_args(given)).data.splits == earlier.splits
    where = [*given[:2], "--data.forget_where=customer == 11"]
    assert len(parser.instantiate_classes(parser.parse_args(where)).data.splits.forget) == 1


def test_revisions_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((*args, options)) or [])
    list(read_records("a/b@v1.0:c:d", "data"))
    list(read_records("a/b@refs/convert/parquet", "data"))
    assert asked == [
        ("a/b", "c", {"split": "d", "revision": "v1.0"}),
        ("a/b", None, {"split": "train", "revision": "refs/convert/parquet"}),
    ]
    with pytest.raises(UserError, match="data: got 'a/b@'"):
        read_records("a/b@", "data")


def test_long_cells(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", [{"question": "Who?", "answer": "me " * 100_000}])
    assert len(next(read_records(file, "data"))["answer"]) == 300_000
