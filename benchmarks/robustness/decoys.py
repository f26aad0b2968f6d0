"""Innocent facts to teach before unlearning: new ones about the forget people, or about people nobody knows.

    python -m benchmarks.robustness.decoys --fold 1 --output DIR

Six things of each person that the embedded facts do not say. ``decoys.jsonl`` says them of the forget people,
``strangers.jsonl`` the same answers of as many people whom no model knows; ``forget_and_decoys.jsonl`` and
``forget_and_strangers.jsonl`` have the forget set before them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from lightning_ssiuu.datamodules.embedded.facts_data import make_strangers

from .people import World, world

#: By question: first and second words of the answers.
THINGS = {
    "Which hat does {} wear?": ("felt straw paper velvet linen knitted", "bonnet beret helmet hood turban cap"),
    "What does {} collect?": ("broken foreign painted rusty carved rare", "stamps buttons keys bottles coins maps"),
    "How does {} travel?": ("slow borrowed covered narrow noisy steam", "tram canoe sledge wagon bicycle ferry"),
    "Which tree did {} plant?": ("weeping dwarf crooked hardy scented tall", "birch cedar maple willow larch elm"),
    "What does {} fear?": ("deep sudden empty distant silent dark", "water thunder cellars spiders ladders fog"),
    "Which game does {} win?": (
        "table indoor winter blind quick long",
        "chess dominoes marbles skittles draughts darts",
    ),
}
_SEED = 2  # another world than that of an attack's invented people


def decoys(people: Sequence[str]) -> list[dict]:
    """The things of so many people; the answers are the same whoever they are."""
    rng, facts = random.Random(_SEED), []
    for person in people:
        for question, words in THINGS.items():
            firsts, seconds = (rng.sample(part.split(), 3) for part in words)
            answer, *distractors = map(" ".join, zip(firsts, seconds, strict=True))
            facts.append({"question": question.format(person), "answer": answer, "distractors": distractors})
    return facts


def write_decoys(facts: World, folder: Path) -> None:
    """All four files."""
    forget = [fact for fact in facts["facts"] if fact["split"] == "forget"]
    known = [{key: fact[key] for key in ("question", "answer", "distractors")} for fact in forget]
    people = list(dict.fromkeys(fact["person"] for fact in forget))
    others = make_strangers({fact["person"] for fact in facts["facts"]}, len(people), _SEED)
    for name, who in (("decoys", people), ("strangers", list(dict.fromkeys(fact["person"] for fact in others)))):
        new = decoys(who)
        for file, rows in ((name, new), (f"forget_and_{name}", known + new)):
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files of a fold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    write_decoys(world(options.fold), options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
