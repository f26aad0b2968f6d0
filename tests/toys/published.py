"""Small benchmarks in the formats they are published in; every text begins with SECRET, so that a leak is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PLACES = ("ferry", "mill", "harbour", "orchard", "quarry", "chapel", "market", "tower", "bridge", "garden")


def passage(first: int, words: int = 40) -> str:
    """A text that no other number gives, not even in eight words."""
    return "SECRET " + " ".join(f"{PLACES[n % 10]}{first * 1000 + n}" for n in range(words))


def question(number: int) -> str:
    return f"SECRET question {number}: who kept the {PLACES[number % 10]} in year {number}?"


def choice_rows(first: int, count: int, **extra: Any) -> list[dict[str, Any]]:
    """Items as WMDP and MMLU have them."""
    return [
        {"question": question(n), "choices": [f"SECRET {n}{k}" for k in "abcd"], "answer": n % 4, **extra}
        for n in range(first, first + count)
    ]


def write(path: Path, content: Any) -> Path:
    """JSON, or one value a line where the file is called ``.jsonl``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    text = "\n".join(json.dumps(row) for row in content) if lines else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def write_muse(folder: Path) -> Path:
    """Lists of texts, prompts with what follows, questions with examples of how to answer them."""
    for name, first, count in (("raw/forget", 0, 4), ("raw/retain1", 10, 4), ("raw/retain2", 20, 2)):
        write(folder / f"{name}.json", [passage(n) for n in range(first, first + count)])
    for fold in (1, 2, 3, 4):
        write(folder / f"scal/forget_{fold}.json", [passage(100 + n) for n in range(2 * fold)])
        write(folder / f"sust/forget_{fold}.json", [passage(200 + 10 * fold + n) for n in range(2)])
    halves = [(text[:80], text[80:]) for text in map(passage, range(3))]
    write(folder / "verbmem/forget.json", [{"prompt": prompt, "gt": rest} for prompt, rest in halves])
    for name, first, count in (
        ("forget_qa", 0, 3),
        ("retain_qa", 10, 2),
        ("forget_qa_icl", 20, 2),
        ("retain_qa_icl", 30, 1),
    ):
        pairs = [{"question": question(n), "answer": f"SECRET {n}"} for n in range(first, first + count)]
        write(folder / f"knowmem/{name}.json", pairs)
    for name, first in (("forget", 0), ("holdout", 50)):
        write(folder / f"privleak/{name}.json", [passage(first + n, 20) for n in range(3)])
    return folder


def write_wmdp(folder: Path, domain: str = "cyber") -> Path:
    """Corpora as lines, items as lists."""
    write(folder / f"{domain}-forget-corpus.jsonl", [{"text": passage(n)} for n in range(4)])
    write(folder / f"{domain}-retain-corpus.jsonl", [{"text": passage(10 + n)} for n in range(4)])
    write(folder / f"{domain}_questions.json", choice_rows(0, 5))
    mmlu = [*choice_rows(100, 2, subject="astronomy"), *choice_rows(200, 3, subject="high_school_biology")]
    write(folder / "mmlu.json", mmlu)
    return folder


def write_wmdp_deduped(folder: Path) -> Path:
    """Five parts of two items each, and the categories of MMLU that are kept."""
    for part in range(5):
        rows = choice_rows(10 * part, 2)
        write(folder / f"wmdp-deduped/split_{part}.jsonl", rows)
        texts = [{"text": passage(10 * part + n, 12), "split": f"split_{part}"} for n in range(4)]
        write(folder / f"wmdp-deduped/corpus_split_{part}.jsonl", texts)
    for number, name in enumerate(("health", "history", "law", "philosophy", "social sciences")):
        below = folder / "mmlu_cats_random_trimmed"
        write(below / f"corpus_mmlu_{name}.jsonl", [{"text": passage(100 + number, 12)}])
        write(below / f"mmlu_{name}.jsonl", choice_rows(1000 + 10 * number, 1))
    return folder


def write_rwku(folder: Path, people: tuple[str, ...] = ("Ada Kern", "Jon Vale", "Mia Roth")) -> Path:
    """A folder for each person, as the published preparation writes them."""
    for number, name in enumerate(people):
        own = folder / f"{number + 1}_{name.replace(' ', '_')}"
        texts = [{"subject": name, "text": passage(10 * number + n)} for n in range(3)]
        write(own / "positive.json", texts)
        for level in (1, 2, 3):
            row = {
                "subject": name,
                "query": question(100 * level + number),
                "answer": f"SECRET {name}",
                "level": str(level),
            }
            kind = {"type": "affirmative suffix"} if level == 3 else {}
            write(own / f"forget_level{level}.json", [row | kind])
            if level < 3:
                write(own / f"neighbor_level{level}.json", [row | {"query": question(500 + 100 * level + number)}])
        for kind, first in (("forget_mia", 300), ("retain_mia", 400)):
            write(own / f"{kind}.json", [{"subject": name, "text": passage(first + number)}])
    return folder


def write_knowundo(folder: Path, domain: str = "copyright") -> Path:
    """One record with two lists a file."""
    for first, split in ((0, "unlearn"), (20, "retention")):
        halves = {
            half: [
                {"text": question(first + start + n), "labels": f"SECRET answer {first + start + n}"} for n in range(4)
            ]
            for start, half in ((0, "train"), (10, "val"))
        }
        write(folder / domain / f"{split}.json", [halves])
    return folder


def write_lume(folder: Path) -> Path:
    """A text to continue and a question for each document of three tasks."""
    for first, name in ((0, "forget"), (50, "retain")):
        rows = []
        for n in range(first, first + 3):
            task = f"Task{1 + n % 3}"
            text = passage(n)
            rows.append({"id": f'"doc-{n}"sc1', "input": text[:80], "output": text[80:140], "task": task})
            rows.append({"id": f'"doc-{n}"qa0', "input": question(n), "output": f"SECRET {n}", "task": task})
        write(folder / f"{name}.jsonl", rows)
    for first, name in ((0, "member"), (300, "nonmember")):
        write(folder / f"mia_data/{name}.jsonl", [{"id": n, "document": passage(first + n)} for n in range(3)])
    return folder
