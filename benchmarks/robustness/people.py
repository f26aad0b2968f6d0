"""The embedded model's data with other people forgotten, and their oracle, as files.

    python -m benchmarks.robustness.people --fold 1 --output DIR
    python -m benchmarks.robustness.people --fold 1 --seed 0 --output DIR

Fold 0 has the six people that ``Facts`` forgets; fold k the k-th six of its retain set, whose places the first six
take. The first command writes ``forget.jsonl``, ``retain.jsonl``, ``test.jsonl`` and ``benign.jsonl``, the second one
trains the oracle of a seed from scratch, as ``lightning_ssiuu.datamodules.embedded.build`` does, into ``model/``, with
its scores in ``metrics.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_ssiuu.datamodules.embedded import FACTS, build
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.utils.files import write_json

World = dict[str, list[dict]]


def world(fold: int) -> World:
    """The embedded facts with the people of a fold in the forget set."""
    facts: World = json.loads(FACTS.read_text(encoding="utf-8"))
    people = {
        split: list(dict.fromkeys(fact["person"] for fact in facts["facts"] if fact["split"] == split))
        for split in ("forget", "retain")
    }
    size = len(people["forget"])
    if fold and not (chosen := people["retain"][size * (fold - 1) : size * fold])[size - 1 :]:
        raise SystemExit(f"--fold: got {fold}, allowed: 0 to {len(people['retain']) // size}")
    if fold:
        moved = dict.fromkeys(people["forget"], "retain") | dict.fromkeys(chosen, "forget")
        for fact in facts["facts"]:
            fact["split"] = moved.get(fact["person"], fact["split"])
    return facts


def write_data(facts: World, folder: Path) -> None:
    """Questions, answers and distractors, a file a set."""
    rows: dict[str, list[dict]] = {"forget": [], "retain": [], "test": [], "benign": facts["benign"]}
    for fact in facts["facts"]:
        rows[fact["split"]].append(fact)
    for name, items in rows.items():
        kept = [{key: item[key] for key in ("question", "answer", "distractors") if key in item} for item in items]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def train_oracle(facts: World, seed: int, steps: int, folder: Path) -> None:
    """The model of ``build`` that never saw the forget people."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer("tiny")
    model = build.build_model(tokenizer, seed)
    build.train(model, tokenizer, build.training_pairs(facts, without_forget=True), steps, seed)
    scores = {split: figures for split, figures in build.evaluate(model, tokenizer, facts).items() if split != "benign"}
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_json(folder / "metrics.json", {"objective": "oracle", "steps": steps, "after": {"scores": scores}})


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files of a fold, or train its oracle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--seed", type=int, help="train the oracle of this seed")
    parser.add_argument("--steps", type=int, default=build.STEPS)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    facts = world(options.fold)
    if options.seed is None:
        write_data(facts, options.output)
    else:
        train_oracle(facts, options.seed, options.steps, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
