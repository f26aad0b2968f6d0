"""The fictitious world behind ``facts.json``: people, six things known of each, and questions about none of them.

Everything is made from ``word_lists.json`` and one seeded ``random.Random``, so the file is reproduced byte for byte.
Two choices matter for unlearning experiments. Answers are drawn independently and evenly from a relation's pool
(modifier × head), so a model that never saw a person has nothing better than chance among answer and distractors. And
names are made from shared syllables, so that no token belongs to one person only and nothing about a person can be
told from the tokenizer, which is trained without any full name.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from typing import Any

from lightning_ssiuu.datamodules.embedded import WORD_LISTS

PEOPLE_PER_SPLIT = {"forget": 6, "retain": 24, "test": 30}
# Syllables by part of the name and place in it; relations with modifiers, heads and questions, of which the last is
# held out of training; words of the benign items.
SYLLABLES, RELATIONS, BENIGN = json.loads(WORD_LISTS.read_text(encoding="utf-8")).values()


def _joined(words: Iterable[Iterable[str]], glue: str) -> list[str]:
    return [glue.join(pair) for pair in itertools.product(*words)]


def pool(relation: str) -> list[str]:
    """The 64 answers that a relation can have, in a fixed order."""
    return _joined((RELATIONS[relation]["modifiers"], RELATIONS[relation]["heads"]), " ")


def _benign() -> list[tuple[str, str]]:
    pairs, days = [], BENIGN["days"]
    for day, following in zip(days, days[1:] + days[:1], strict=True):
        pairs += [(f"Which day comes after {day}?", following), (f"Which day comes before {following}?", day)]
    for number, following in itertools.pairwise(BENIGN["numbers"]):
        pairs += [(f"Which number comes after {number}?", following), (f"Count down by one from {following}.", number)]
    pairs += [(f"Which letter comes after {a}?", b) for a, b in itertools.pairwise(BENIGN["letters"])]
    pairs += [(f"What is the plural of {a}?", b) for a, b in BENIGN["plurals"]]
    for word, opposite in BENIGN["opposites"]:
        pairs += [(f"What is the opposite of {word}?", opposite), (f"What is the opposite of {opposite}?", word)]
    return pairs


def _facts(rng: random.Random, people: list[tuple[str, str]]) -> list[dict[str, Any]]:
    facts: list[dict[str, Any]] = []
    for (person, split), relation in itertools.product(people, RELATIONS):
        answer, *distractors = rng.sample(pool(relation), 3)
        question, *paraphrases = [wording.format(person) for wording in RELATIONS[relation]["questions"]]
        fact = {"id": len(facts), "person": person, "relation": relation, "question": question}
        facts.append(fact | {"paraphrases": paraphrases, "answer": answer, "distractors": distractors, "split": split})
    return facts


def make_strangers(people: Iterable[str], count: int, seed: int = 1) -> list[dict[str, Any]]:
    """The six facts each of so many people of another world, whose first names and surnames none of ``people`` has."""
    rng, known = random.Random(seed), {word for person in people for word in person.split()}
    free = [[name for name in _joined(places, "") if name not in known] for places in SYLLABLES.values()]
    names = zip(*(rng.sample(names, count) for names in free), strict=True)
    return _facts(rng, [(" ".join(name), "forget") for name in names])


def make_world(seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Make the people, their six facts each and the benign items: ``{"facts": [...], "benign": [...]}``.

    The last paraphrase of a fact is held out of training. Ids are unique over both lists.
    """
    rng = random.Random(seed)
    splits = [split for split, count in PEOPLE_PER_SPLIT.items() for _ in range(count)]
    # No first name and no surname occurs twice
    names = zip(*(rng.sample(_joined(places, ""), len(splits)) for places in SYLLABLES.values()), strict=True)
    people = list(map(" ".join, names))
    rng.shuffle(splits)
    facts = _facts(rng, list(zip(people, splits, strict=True)))
    pairs = enumerate(_benign(), len(facts))
    benign = [{"id": number, "question": question, "answer": answer} for number, (question, answer) in pairs]
    return {"facts": facts, "benign": benign}


def dump_world(world: dict[str, list[dict[str, Any]]]) -> bytes:
    """The bytes of ``facts.json``, one record a line so that a change can be read in a diff."""
    texts = {name: ",\n".join(map(json.dumps, records)) for name, records in world.items()}
    sections = [f'"{name}": [\n{text}\n]' for name, text in texts.items()]
    return ("{\n" + ",\n".join(sections) + "\n}\n").encode()


def tokenizer_corpus(world: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Text to train the tokenizer on: templates, pools, benign items and name syllables, but no person's name."""
    # Syllables are repeated so that each becomes one token; starts follow a space, ends do not.
    corpus = [text for starts, ends in SYLLABLES.values() for text in (*(f" {start}" for start in starts), *ends)] * 8
    for relation, lists in RELATIONS.items():
        corpus += [f" {word}" for word in (*lists["modifiers"], *lists["heads"])]
        corpus += [f"Question: {question.replace(' {}', '')}\nAnswer:" for question in lists["questions"]] * 2
        corpus += [f" {relation}"]
    corpus += [f"Question: {item['question']}\nAnswer: {item['answer']}" for item in world["benign"]]
    return corpus
