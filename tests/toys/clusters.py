"""Small files in FaithUn's published format; every text starts with SECRET, so that a leak is easy to find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def asked(text: str, answer: str) -> dict[str, Any]:
    """A question with two spellings of its answer and three wrong options."""
    return {
        "question": f"SECRET {text}?",
        "answers": [f"SECRET {answer}", f"SECRET the {answer}"],
        "false_answer_options": [f"SECRET not {answer} {n}" for n in range(3)],
    }


def entity(number: int, facts: int = 2, nested: bool = True) -> dict[str, list]:
    """An entity with some facts; other questions nested by fact, or in one flat list."""
    names = [f"{number}-{fact}" for fact in range(facts)]
    kinds = {
        "hop1_test": [[asked(f"reworded {name}", f"answer {name}")] for name in names],
        "hop2_test": [[asked(f"two hops {name}", f"further {name}")] for name in names],
        "same_object": [[asked(f"same {name}", f"answer {name}")] for name in names],
    }
    if not nested:
        # Reversed, so that nothing can be found by its position
        kinds = {kind: [question for group in reversed(groups) for question in group] for kind, groups in kinds.items()}
    return {"hop1_unlearn": [asked(f"base {name}", f"answer {name}") for name in names], **kinds}


def write_faithun(folder: Path, n_entities: int, nested: bool = True) -> Path:
    """A release with two facts per entity; even-numbered clusters are kept, the rest is forgotten but for the last."""
    (folder / "dataset" / "splits").mkdir(parents=True)
    entities = {f"Q{number}": entity(number, nested=nested) for number in range(n_entities)}
    (folder / "dataset" / "FaithUn_Dataset.json").write_text(json.dumps(entities), encoding="utf-8")
    n_clusters = 2 * n_entities
    splits = {
        "retaining": list(range(0, n_clusters, 2)),
        "forget": list(range(1, n_clusters - 1, 2)),
        "test": [n_clusters - 1],
    }
    for name, numbers in splits.items():
        lines = "\n".join(map(str, numbers)) + "\n"
        (folder / "dataset" / "splits" / f"{name}_set_split.txt").write_text(lines, encoding="utf-8")
    return folder
