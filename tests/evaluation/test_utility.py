"""``utility``: offline suites against loops, and the adapter of lm-eval against a stand-in for it."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from toys.cli import command, read_json
from toys.data import Toy
from toys.json_files import undocumented

from lightning_ssiuu import Facts
from lightning_ssiuu.datamodules import WorldFacts
from lightning_ssiuu.datamodules.embedded import FACTS
from lightning_ssiuu.evaluation.lm_eval import PAPER
from lightning_ssiuu.evaluation.utility import seen_questions, suite_of, suite_tasks
from lightning_ssiuu.models.export import save_pretrained
from lightning_ssiuu.models.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with noise on its weights: it can still do some of what it could."""
    torch.manual_seed(0)
    model = load_model("tiny")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * weight.std() * torch.randn_like(weight)
    folder = tmp_path_factory.mktemp("damaged") / "model"
    save_pretrained(model, load_tokenizer("tiny"), folder)
    return str(folder)


def by_hand(checkpoint: str) -> dict[str, float]:
    """Share of the harmless items answered in full, one greedy decoding at a time."""
    kinds = {"day": "days", "number": "numbers", "Count": "numbers", "letter": "letters", "plural": "plurals"}
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    right: dict[str, list[bool]] = {}
    for item in json.loads(FACTS.read_text(encoding="utf-8"))["benign"]:
        kind = next((name for word, name in kinds.items() if word in item["question"]), "opposites")
        ids = tokenizer(f"Question: {item['question']}\nAnswer:").input_ids
        answer = [*tokenizer(f" {item['answer']}").input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *answer]])).logits[0]
        right.setdefault(kind, []).append(logits[len(ids) - 1 : -1].argmax(-1).tolist() == answer)
    return {kind: 100 * sum(each) / len(each) for kind, each in right.items()}


def test_embedded_suite_equals_a_loop(damaged: str, tmp_path: Path) -> None:
    result = command("utility", "--model", damaged, "--output", tmp_path, "--batch_size", "5")
    assert result.status == 0, result.err
    content = read_json(tmp_path / "utility.json")
    assert not undocumented(tmp_path)
    expected = by_hand(damaged)
    assert len(set(expected.values())) > 2
    assert content["tasks"] == pytest.approx(expected)
    assert content["utility_score"] == pytest.approx(sum(expected.values()) / 5)
    assert content["suite"] == "embedded"
    assert sum(content["n_items"].values()) == 107
    assert content["provenance"]["data_sha256"] == Facts().content_sha256()
    assert f"{content['utility_score']:.1f}" in result.out
    again = command("utility", "--model", damaged, "--output", tmp_path)
    assert (again.status, "a directory without utility.json, or --overwrite" in again.err) == (2, True)
    limited = command("utility", "--model", "tiny", "--output", tmp_path, "--limit", "15", "--overwrite")
    assert limited.status == 0, limited.err
    assert read_json(tmp_path / "utility.json")["n_items"] == {
        "days": 14, "numbers": 15, "letters": 15, "plurals": 15, "opposites": 15,
    }  # fmt: skip
    assert read_json(tmp_path / "utility.json")["utility_score"] == 100


def test_real_facts_without_those_that_were_unlearned(tmp_path: Path) -> None:
    assert suite_of(Toy()) == "world_facts"
    whole = suite_tasks("world_facts")
    assert sum(map(len, whole.values())) == 611
    data = WorldFacts()
    seen = seen_questions("world_facts", data)
    rest = suite_tasks("world_facts", seen)
    assert {item.folded for items in rest.values() for item in items} == {item.folded for item in data.splits.test}
    assert seen_questions("world_facts", Facts()) == seen_questions("embedded", data) == set()
    some = ("--suite", "world_facts", "--limit", "2")
    result = command("utility", "--model", "tiny", "--output", tmp_path, *some)
    assert result.status == 0, result.err
    content = read_json(tmp_path / "utility.json")
    assert list(content["tasks"]) == list(whole)
    assert set(content["n_items"].values()) == {2}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--limit", "0"), "limit: got 0"),
        (("--batch_size", "0"), "batch_size: got 0"),
        (("--tasks", "[]"), "tasks: got []"),
        (("--tasks", "[mmlu]", "--suite", "paper"), "tasks: got ['mmlu'], allowed: at least one task, and no suite"),
        (("--suite", "other"), "suite: got 'other'"),
        (("--model", "/no/such"), "model: got '/no/such'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, options: tuple[str, ...], named: str) -> None:
    result = command("utility", "--model", "tiny", "--output", tmp_path / "out", *options)
    assert result.status == 2
    assert named in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_needs_a_place_for_the_result() -> None:
    result = command("utility", "--model", "tiny")
    assert (result.status, "output: got None" in result.err) == (2, True)


# -- lm-eval ------------------------------------------------------------------------------------------------------

STAND_IN = {
    "__init__.py": """
        import importlib.machinery

        CALLS = []
        FIGURES = {
            "mmlu": {"acc,none": 0.25},
            "gsm8k": {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 1.0},
            "hellaswag": {"acc,none": 1.0, "acc_norm,none": 0.5, "acc_stderr,none": 0.0},
            "arc_challenge": {"acc,none": 1.0, "acc_norm,none": 0.0},
            "winogrande": {"acc,none": 1.0},
            "odd": {"alias": "odd", "bleu,none": 1.0},
            "own": {"acc,none": 0.125},
        }

        def simple_evaluate(model, tasks, limit, task_manager, **options):
            (name,) = tasks
            CALLS.append((name, limit, model.batch_size, options))
            if name == "offline":
                raise ConnectionError("no such host")
            if name == "defect":
                raise RuntimeError("a defect")
            leaves = [name] if name != "mmlu" else [f"mmlu_{n}" for n in range(57)]
            results = {leaf: {"acc,none": 0.0} for leaf in leaves}
            results[name] = FIGURES[name]
            counts = {leaf: {"original": 1000, "effective": limit} for leaf in leaves}
            return {"results": results, "n-samples": counts}
        """,
    "models/huggingface.py": """
        class HFLM:
            def __init__(self, pretrained, tokenizer, batch_size):
                assert pretrained.config.model_type == "llama" and tokenizer.eos_token
                self.batch_size = batch_size
        """,
    "tasks.py": """
        class TaskManager:
            def __init__(self, include_path):
                names = ["mmlu", "gsm8k", "hellaswag", "arc_challenge", "winogrande", "odd", "offline", "defect"]
                self.all_tasks = names + (["own"] if include_path else [])
        """,
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of the name ``lm_eval`` with what the adapter asks of it."""
    folder = tmp_path / "packages" / "lm_eval"
    (folder / "models").mkdir(parents=True)
    for name, text in STAND_IN.items():
        (folder / name).write_text(textwrap.dedent(text), encoding="utf-8")
    loaded = [name for name in sys.modules if name.split(".")[0] == "lm_eval"]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield tmp_path / "out"
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        del sys.modules[name]


def test_the_papers_suite(stand_in: Path) -> None:
    result = command("utility", "--model", "tiny", "--output", stand_in, "--suite", "paper", "--batch_size", "3")
    assert result.status == 0, result.err
    content = read_json(stand_in / "utility.json")
    expected = {"mmlu": 25.0, "gsm8k": 50.0, "hellaswag": 50.0, "arc_challenge": 0.0, "winogrande": 100.0}
    assert content["tasks"] == expected
    assert list(expected) == list(PAPER)
    assert content["utility_score"] == 45
    assert content["n_items"] == dict.fromkeys(expected, 500) | {"mmlu": 57 * 9}
    calls = sys.modules["lm_eval"].CALLS
    assert [call[:3] for call in calls] == [(name, 9 if name == "mmlu" else 500, 3) for name in expected]
    assert not any(options["apply_chat_template"] for *_, options in calls)


def test_tasks_by_name(stand_in: Path) -> None:
    options = ("--tasks", "[winogrande, own]", "--task_directory", stand_in, "--limit", "7", "--chat")
    result = command("utility", "--model", "tiny", "--output", stand_in, *options)
    assert result.status == 0, result.err
    content = read_json(stand_in / "utility.json")
    assert (content["suite"], content["tasks"]) == ("lm_eval", {"winogrande": 100.0, "own": 12.5})
    assert content["n_items"] == {"winogrande": 7, "own": 7}
    assert all(options["apply_chat_template"] for *_, options in sys.modules["lm_eval"].CALLS)


@pytest.mark.parametrize(
    ("task", "named"),
    [
        ("own", "tasks: got 'own', allowed: a task or group of lm-eval"),
        ("offline", "tasks: got 'offline', allowed: tasks whose data can be had: the hub cannot be reached"),
        ("odd", "tasks: got odd, which reports bleu,none, allowed: acc_norm,none, acc,none"),
    ],
)
def test_what_a_task_lacks_is_one_line(stand_in: Path, task: str, named: str) -> None:
    result = command("utility", "--model", "tiny", "--output", stand_in, "--tasks", f"[winogrande, {task}]")
    assert (result.status, named in result.err) == (2, True), result.err
    assert not (stand_in / "utility.json").exists()


def test_a_defect_is_not_taken_for_a_mistake(stand_in: Path) -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        command("utility", "--model", "tiny", "--output", stand_in, "--tasks", "[defect]")


@pytest.mark.parametrize("options", [("--suite", "paper"), ("--tasks", "[mmlu]")])
def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = command("utility", "--model", "tiny", "--output", tmp_path, *options)
    assert result.status == 2
    assert 'pip install "lightning-ssiuu[lm-eval]"' in result.err
    assert result.err.count("\n") == 1
