"""FaithUn's format: clusters, their probes, the split files, and what a broken release says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toys.clusters import asked, entity, write_faithun

from lightning_ssiuu.datamodules import FaithUn, QAExample
from lightning_ssiuu.datamodules.clusters import parse_clusters
from lightning_ssiuu.utils.errors import UserError


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_faithun(tmp_path / "faithun", 4)


def test_splits_follow_the_index_files(release: Path) -> None:
    splits = FaithUn(str(release)).splits
    ids = {name: [example.example_id for example in examples] for name, examples in splits.items()}
    assert ids == {"forget": [1, 3, 5], "retain": [0, 2, 4, 6], "test": [7], "benign": []}
    assert splits.forget[1] == QAExample(
        3,
        "SECRET base 1-1?",
        "SECRET answer 1-1",
        ("SECRET not answer 1-1 0", "SECRET not answer 1-1 1"),
        ("SECRET reworded 1-1?",),
        "Q1",
    )


@pytest.mark.parametrize("nested", [True, False])
def test_probes_belong_to_the_facts_of_the_set(tmp_path: Path, nested: bool) -> None:
    data = FaithUn(str(write_faithun(tmp_path / "faithun", 4, nested=nested)))
    for kind, word, answer in (("hop1_test", "reworded", "answer"), ("same_object", "same", "answer")):
        probes = data.probes("forget", kind)
        assert [probe.question for probe in probes] == [f"SECRET {word} {n}-1?" for n in range(3)]
        assert [probe.answer for probe in probes] == [f"SECRET {answer} {n}-1" for n in range(3)]
        assert all(len(probe.distractors) == 2 for probe in probes)
    # In a flat list nothing says which fact a two-hop question starts from: all of the entity's are asked
    facts = ["1"] if nested else ["1", "0"]
    hops = [f"SECRET two hops {n}-{fact}?" for n in range(3) for fact in facts]
    assert [probe.question for probe in data.probes("forget", "hop2_test")] == hops
    every = [probe for kind in ("hop1_test", "hop2_test", "same_object") for split in ("forget", "retain", "test")
             for probe in data.probes(split, kind)]  # fmt: skip
    used = [example.example_id for _, examples in data.splits.items() for example in examples]
    if nested:
        assert len({probe.example_id for probe in every} | set(used)) == len(every) + len(used)
    with pytest.raises(UserError, match="kind: got 'hop3'"):
        data.probes("forget", "hop3")
    with pytest.raises(UserError, match="split: got 'benign'"):
        data.probes("benign", "hop1_test")


def test_probes_can_be_evaluated(release: Path) -> None:
    data = FaithUn(str(release), batch_size=1, tokenizer="tiny")
    batch = next(iter(data.eval_dataloader("forget", data.probes("forget", "hop2_test"))))["forget"]
    assert batch["input_ids"].shape[0] == 3
    assert len(batch["options"]["option_of"]) == 9


def test_what_is_forgotten_is_no_same_answer_question() -> None:
    first, second = entity(0), entity(1)
    second["same_object"][1] = [dict(first["hop1_unlearn"][1]), asked("kept", "answer 1-1")]

    class Given(FaithUn):
        def load_clusters(self) -> Any:
            return parse_clusters({"a": first, "b": second}, "path"), {"forget": [1, 3], "retain": [0], "test": [2]}

    questions = [probe.question for probe in Given("nowhere").probes("forget", "same_object")]
    assert questions == ["SECRET same 0-1?", "SECRET kept?"]


def test_a_spelling_of_the_answer_is_no_wrong_option() -> None:
    question = {"question": "Where?", "answers": "Here", "false_answer_options": ["here", "There", "There"]}
    (cluster,) = parse_clusters({"Q1": {"hop1_unlearn": [question]}}, "path")
    assert (cluster.base.answers, cluster.base.wrong) == (("Here",), ("There",))


@pytest.mark.parametrize("n_distractors", [0, 1, 3])
def test_number_of_options(release: Path, n_distractors: int) -> None:
    splits = FaithUn(str(release), n_distractors=n_distractors).splits
    assert {len(example.distractors) for example in splits.forget} == {n_distractors}


@pytest.mark.parametrize(
    ("entities", "told"),
    [
        ([], "no object of entities"),
        ({"SECRET": []}, "no object of entities"),
        ({"SECRET": {}}, "no list entity 0, hop1_unlearn"),
        ({"SECRET": {"hop1_unlearn": {}}}, "no list entity 0, hop1_unlearn"),
        ({"SECRET": {"hop1_unlearn": ["SECRET"]}}, "no object in entity 0, hop1_unlearn 0"),
        ({"SECRET": {"hop1_unlearn": [{"question": "SECRET"}]}}, "no 'answers' in entity 0, hop1_unlearn 0"),
        ({"SECRET": {"hop1_unlearn": [asked("a", "b") | {"answers": []}]}}, "no answer in entity 0"),
        ({"SECRET": {"hop1_unlearn": [asked("a", "b") | {"answers": [7]}]}}, "something else than text in entity 0"),
        ({"a": entity(0), "b": entity(1) | {"hop2_test": [{}]}}, "no 'question' in entity 1, hop2_test 0"),
    ],
)
def test_another_format(release: Path, entities: Any, told: str) -> None:
    (release / "dataset" / "FaithUn_Dataset.json").write_text(json.dumps(entities))
    with pytest.raises(UserError, match=told) as error:
        _ = FaithUn(str(release)).splits
    assert error.value.argument == "file"
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "argument", "told"),
    [
        ({"path": "/no/such"}, "path", "existing directory"),
        ({"path": "nowhere"}, "path", "existing directory"),
        ({"file": "gone.json"}, "file", "allowed: FaithUn_Dataset.json, forget_set_split.txt"),
        ({"forget": "gone.txt"}, "forget", "allowed: FaithUn_Dataset.json"),
        ({"retain": "forget_set_split.txt"}, "retain", "got 3 clusters that are also in forget"),
        ({"n_distractors": -1}, "n_distractors", "at least 0"),
    ],
)
def test_mistakes(release: Path, arguments: dict, argument: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        _ = FaithUn(**({"path": str(release)} | arguments)).splits
    assert error.value.argument == argument


@pytest.mark.parametrize(("lines", "number"), [("1\n8\n", 2), ("1\n\nx\n", 3), ("-1\n", 1)])
def test_a_split_file_holds_cluster_numbers(release: Path, lines: str, number: int) -> None:
    (release / "dataset" / "splits" / "forget_set_split.txt").write_text(lines)
    with pytest.raises(UserError, match=f"forget: got line {number} of .*allowed: one number from 0 to 7 a line"):
        _ = FaithUn(str(release)).splits


def test_broken_json_and_no_test_set(release: Path) -> None:
    assert not FaithUn(str(release), test=None).splits.test
    (release / "dataset" / "FaithUn_Dataset.json").write_text('{"SECRET":\n')
    with pytest.raises(UserError, match=r"file: got .*valid JSON: it breaks in line 2"):
        _ = FaithUn(str(release)).splits


def test_hub_ids(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(name: str, repo_type: str, allow_patterns: list[str]) -> str:
        assert repo_type == "dataset"
        if name != "some/one":
            raise ConnectionError("SECRET")
        return str(release)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(FaithUn("some/one").splits.forget) == 3
    with pytest.raises(UserError, match=r"path: got 'no/one'.*ConnectionError"):
        _ = FaithUn("no/one").splits
