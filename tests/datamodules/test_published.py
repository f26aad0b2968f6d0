"""Benchmarks in their published formats: what is trained on, what is only scored, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toys import published
from toys.data import byte_tokenizer

from lightning_ssiuu.attacks import HeldOutFacts
from lightning_ssiuu.datamodules import LUME, MUSE, RWKU, WMDP, KnowUnDo, QAExample, UnlearningDataModule, WMDPDeduped
from lightning_ssiuu.datamodules.chunks import Chunk
from lightning_ssiuu.datamodules.lume import of_kind
from lightning_ssiuu.datamodules.multiple_choice import choice_items
from lightning_ssiuu.datamodules.trained_on import refuse_trained, trained_on
from lightning_ssiuu.utils.errors import UserError

SMALL = {"batch_size": 2, "max_length": 2000}


def trained_texts(data: UnlearningDataModule) -> dict[str, list[str]]:
    """The texts of the sets, each document put together from its chunks."""
    found: dict[str, dict[str, str]] = {}
    for split, examples in data.splits.items():
        for example in examples:
            texts = found.setdefault(split, {})
            texts[example.group] = texts.get(example.group, "") + example.question + example.answer
    # The tokenizer of bytes has no decoder
    return {s: [text.replace(" ", "").replace("Ġ", " ") for text in texts.values()] for s, texts in found.items()}


def muse(folder: Path, **options: object) -> MUSE:
    return MUSE(str(folder), tokenizer=byte_tokenizer(), chunk_tokens=1000, **SMALL, **options)  # type: ignore[arg-type]


def test_muse_trains_on_texts_and_scores_the_rest(tmp_path: Path) -> None:
    data = muse(published.write_muse(tmp_path), test="raw/retain2")
    assert trained_texts(data) == {
        "forget": [published.passage(n) for n in range(4)],
        "retain": [published.passage(n) for n in range(10, 14)],
        "test": [published.passage(n) for n in range(20, 22)],
    }
    assert data.splits.forget[0].name == "raw/forget 1#1"
    assert [e.question + e.answer for e in data.verbmem()] == [published.passage(n) for n in range(3)]
    asked, shown = data.knowmem("forget_qa")
    assert [e.question for e in asked] == [published.question(n) for n in range(3)]
    assert [e.answer for e in shown] == ["SECRET 20", "SECRET 21"]
    assert data.privleak("holdout") == [published.passage(50 + n, 20) for n in range(3)]
    assert len(trained_texts(muse(tmp_path, forget="scal/forget_3"))["forget"]) == 6
    folds = [set(trained_texts(muse(tmp_path, forget=f"sust/forget_{n}"))["forget"]) for n in range(1, 5)]
    assert len(set.union(*folds)) == sum(map(len, folds)) == 8


@pytest.mark.parametrize(
    ("options", "argument", "told"),
    [
        ({"forget": "forget_qa"}, "forget", "questions are only scored"),
        ({"retain": "knowmem/retain_qa"}, "retain", "questions are only scored"),
        ({"test": "privleak/holdout"}, "test", "only scored"),
        ({"forget": "raw/gone"}, "forget", "knowmem/forget_qa, "),
        ({"path": "nowhere"}, "path", "existing directory"),
    ],
)
def test_muse_mistakes(tmp_path: Path, options: dict, argument: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        _ = MUSE(**({"path": str(published.write_muse(tmp_path)), "tokenizer": byte_tokenizer()} | options)).splits
    assert error.value.argument == argument
    assert "SECRET" not in str(error.value)


def test_the_hub_is_asked_for_configurations_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict]:
        asked.append((name, config, split))
        return [{"text": published.passage(len(asked)), "subject": "A" if len(asked) == 3 else "B"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"tokenizer": byte_tokenizer(), "chunk_tokens": 1000, **SMALL}
    _ = MUSE("muse-bench/MUSE-Books", **options).splits
    _ = WMDP("bio", **options).splits
    assert asked == [
        ("muse-bench/MUSE-Books", "raw", "forget"),
        ("muse-bench/MUSE-Books", "raw", "retain1"),
        ("cais/wmdp-bio-forget-corpus", None, "train"),
        ("cais/wmdp-corpora", "bio-retain-corpus", "train"),
    ]
    with pytest.raises(UserError, match="test_items"):
        WMDP().items()  # no choices in this hub's rows
    assert asked[-1] == ("cais/wmdp", "wmdp-cyber", "test")
    with pytest.raises(UserError, match="allowed: people"):
        _ = RWKU(targets=["Nobody"], **options).splits
    assert asked[-1] == ("jinzhuoran/RWKU", "train_positive_llama3", "train")


def test_wmdp_trains_on_corpora_and_never_on_items(tmp_path: Path) -> None:
    folder = published.write_wmdp(tmp_path)
    options = {"path": str(folder), "tokenizer": byte_tokenizer(), "chunk_tokens": 1000, **SMALL}
    data = WMDP("cyber", **options)
    assert trained_texts(data)["forget"] == [published.passage(n) for n in range(4)]
    assert trained_texts(data)["retain"] == [published.passage(n) for n in range(10, 14)]
    assert [(item.question, item.answer) for item in data.items()] == [(published.question(n), n % 4) for n in range(5)]
    assert [item.about for item in data.mmlu()] == ["astronomy"] * 2 + ["high school biology"] * 3
    published.write(folder / "cyber_remove_dataset.jsonl", [])
    items = str(folder / "cyber_questions.json")
    for name in ("forget", "retain"):
        with pytest.raises(UserError, match=f"{name}: got multiple-choice items, allowed: .*only scored"):
            _ = WMDP("cyber", **(options | {name: items})).splits
    with pytest.raises(UserError, match="domain: got 'chem'"):
        WMDP("chem")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"forget: got .*bio-forget-corpus.jsonl"):
        _ = WMDP("bio", **options).splits


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"answer": 4}, "'answer' of record 1"),
        ({"answer": "E"}, "'answer' of record 1"),
        ({"answer": "SECRET"}, "'answer' of record 1"),
        ({"choices": ["SECRET"]}, "1 'choices' in record 1"),
        ({"choices": "SECRET"}, "record 1 of 'choices'"),
    ],
)
def test_items_with_mistakes(row: dict, told: str) -> None:
    first, second = published.choice_rows(0, 2)
    with pytest.raises(UserError, match=told) as error:
        choice_items([first, second | row], "test_items")
    assert "SECRET" not in str(error.value)
    assert choice_items([first | {"answer": "C"}], "test_items")[0].answer == 2


def test_what_is_taught_again_shares_no_fact_with_what_is_asked(tmp_path: Path) -> None:
    folder = published.write_wmdp_deduped(tmp_path)
    data = WMDPDeduped(str(folder), tokenizer=byte_tokenizer(), chunk_tokens=500, **SMALL)
    assert [len(texts) for texts in trained_texts(data).values()] == [20, 5]
    for held_out in range(5):
        (cell,) = HeldOutFacts(held_out=held_out, seeds=[0]).cells(data)
        own = {item.prompt("") for item in data.items(held_out)}
        assert {example.question for example in cell.scored} == own
        assert len(cell.attacked) == 8
        assert not own & {example.question for example in cell.attacked}
    assert [(e.answer, len(e.distractors)) for e in cell.scored] == [("ABCD"[n % 4], 3) for n in (40, 41)]
    ids = [e.example_id for _, examples in (*data.splits.items(), *cell.splits.items()) for e in examples]
    assert len(set(ids)) == 35
    batch = next(iter(cell.eval_dataloader("forget")))["forget"]
    (options, labels) = (batch["options"][key] for key in ("input_ids", "labels"))
    assert ((labels != -100).sum(1) == 2).all(), "a space and the letter, without an end"
    assert len(options) == 8
    assert {item.subject for item in data.kept_items()} == {"health", "history", "law", "philosophy", "social sciences"}
    with pytest.raises(UserError, match=r"attack.held_out: got 5"):
        HeldOutFacts(held_out=5).cells(data)
    with pytest.raises(UserError, match="WMDPDeduped"):
        HeldOutFacts().cells(muse(published.write_muse(tmp_path / "muse")))


def test_rwku_forgets_people_and_keeps_the_others(tmp_path: Path) -> None:
    folder = published.write_rwku(tmp_path)
    options = {
        "path": str(folder),
        "tokenizer": byte_tokenizer(),
        "chunk_tokens": 1000,
        "targets": ["Jon Vale"],
        **SMALL,
    }
    data = RWKU(**options)
    assert trained_texts(data)["forget"] == [published.passage(10 + n) for n in range(3)]
    assert trained_texts(data)["retain"] == [published.passage(n) for n in (0, 1, 2, 20, 21, 22)]
    assert len(RWKU(**options, retain_size=2).splits.retain) == 2
    (probe,) = data.probes("forget_level3")
    assert (probe.query, probe.answer, probe.level, probe.kind) == (
        published.question(301),
        "SECRET Jon Vale",
        3,
        "affirmative suffix",
    )
    assert [probe.level for probe in data.probes("neighbor_level1")] == [1]
    assert data.passages("mia_forget") == [published.passage(301)]
    assert data.passages("mia_retain") == [published.passage(400 + n) for n in range(3)]
    for bad, told in (({"targets": []}, "names of people"), ({"targets": ["No One"]}, r"targets: got \['No One'\]")):
        with pytest.raises(UserError, match=told):
            _ = RWKU(**(options | bad)).splits


def test_knowundo_trains_on_one_half(tmp_path: Path) -> None:
    folder = published.write_knowundo(tmp_path)
    data = KnowUnDo(str(folder), tokenizer=byte_tokenizer(), **SMALL)
    assert [e.question for e in data.splits.forget] == [published.question(n) for n in range(4)]
    assert [e.answer for e in data.splits.retain] == [f"SECRET answer {n}" for n in range(20, 24)]
    assert [e.question for e in data.scored("retention")] == [published.question(n) for n in range(30, 34)]
    # Columns of lists, as a reader of structs may give them
    halves = json.loads((folder / "copyright" / "unlearn.json").read_text())[0]
    columns = {half: {key: [row[key] for row in rows] for key in rows[0]} for half, rows in halves.items()}
    published.write(folder / "copyright" / "unlearn.json", [columns])
    again = KnowUnDo(str(folder), tokenizer=byte_tokenizer(), **SMALL)
    assert again.splits.sha256() == data.splits.sha256()
    published.write(folder / "copyright" / "unlearn.json", [{"train": "SECRET"}])
    with pytest.raises(UserError, match="'train' of unlearn, allowed: a list of records"):
        _ = KnowUnDo(str(folder), tokenizer=byte_tokenizer()).splits


def test_lume_has_three_tasks_of_two_kinds(tmp_path: Path) -> None:
    folder = published.write_lume(tmp_path)
    data = LUME(str(folder), tokenizer=byte_tokenizer(), **SMALL)
    assert [len(examples) for _, examples in data.splits.items()] == [6, 6, 0, 0]
    for task in ("Task1", "Task2", "Task3"):
        (text,), (asked,) = (of_kind(data.splits.forget, task, kind) for kind in ("regurgitation", "knowledge"))
        assert asked.question.startswith("SECRET question")
        assert text.question + text.answer in published.passage(int(text.source_id.split("-")[1].removesuffix("sc1")))
    assert {e.group for e in LUME(str(folder), tasks=["Task2"], **SMALL).splits.forget} == {"Task2"}
    assert data.texts("nonmember") == [published.passage(300 + n) for n in range(3)]
    with pytest.raises(UserError, match="tasks: got 'Task9', allowed: Task1, Task2, Task3"):
        _ = LUME(str(folder), tasks=["Task9"], **SMALL).splits
    rows = [json.loads(line) for line in (folder / "forget.jsonl").read_text().splitlines()]
    # As the task of SemEval gives them out
    published.write(folder / "semeval" / "train" / "forget.jsonl", rows)
    published.write(folder / "semeval" / "train" / "retain.jsonl", [{**row, "id": "SECRET"} for row in rows])
    with pytest.raises(UserError, match="retain: got 'id' of record 0") as error:
        _ = LUME(str(folder / "semeval"), **SMALL).splits
    assert "SECRET" not in str(error.value)


# -- scored after training ----------------------------------------------------------------------------------------

TEXT = "the ferry to the island left at noon and came back after dark"


@pytest.mark.parametrize(
    ("item", "found"),
    [
        ("Who kept the mill?", True),
        ("who  KEPT the mill", True),
        ("kept the mill", False),  # a part of a question, and short
        ("The ferry to the island left at noon, and", True),
        ("ferry to the island left at noon and came", True),  # from anywhere
        ("the ferry to the island left at noon but", False),  # the first seven words are
        ("a ferry to the island left at noon and", False),
        ("Ada Kern", False),
        ("", False),
    ],
)
def test_trained_texts_are_found_by_their_words(item: str, found: bool) -> None:
    trained = [QAExample(0, "Who kept the mill?", "Ada Kern"), Chunk(1, TEXT[:20], TEXT[20:])]
    assert trained_on(["other words", item], trained) == ([1] if found else [])


def test_a_long_text_is_found_in_passages_that_cut_it() -> None:
    text = published.passage(1, 200)
    passages = [
        Chunk(n, text[at : at + 100], text[at + 100 : at + 800]) for n, at in enumerate(range(0, len(text), 800))
    ]
    others = [Chunk(9, published.passage(2, 200), published.passage(3, 40))]
    half = f"{published.passage(4, 60)} {text}"
    quoting = f"{published.passage(4, 200)} {text[:400]}"
    assert trained_on([text, half, quoting], [*others, *passages]) == [0, 1]
    assert trained_on([text, half, quoting], others) == []


def test_a_passage_is_no_question() -> None:
    assert trained_on(["the mill"], [QAExample(0, "The mill?", "x")]) == [0]
    assert trained_on(["the mill"], [Chunk(0, "The mill?", "x")]) == []
    scored = [QAExample(5, "SECRET?", "x"), QAExample(6, "Prompt. The mill? A. x", "A", (), ("the mill",))]
    with pytest.raises(UserError, match=r"items: got 1 of 2 items .*trained on \(1\), allowed: others") as error:
        refuse_trained(scored, [QAExample(0, "The mill?", "x")], "items", "others")
    assert "mill" not in str(error.value)
