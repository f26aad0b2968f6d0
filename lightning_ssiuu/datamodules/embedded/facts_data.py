"""The fictitious world behind ``facts.json``: people, six things known of each, and questions about none of them.

Everything is made from the short lists below and one seeded ``random.Random``, so the file is reproduced byte for byte.
Two choices matter for unlearning experiments. Answers are drawn independently and evenly from a relation's pool
(modifier × head), so a model that never saw a person has nothing better than chance among answer and distractors. And
names are made from shared syllables, so that no token belongs to one person only and nothing about a person can be
told from the tokenizer, which is trained without any full name.
"""

from __future__ import annotations

import itertools
import json
import random

PEOPLE_PER_SPLIT = {"forget": 6, "retain": 24, "test": 30}


def _words(text: str) -> list[str]:
    return text.split()  # the formatter would put each item of a long list on a line of its own


_SYLLABLES = {
    "first name, start": _words("Bal Cor Dar Eli Fen Gal Hes Iva Jor Kes Lum Mir Nal Osk Pel Quin Ras Sel Tov Vel"),
    "first name, end": _words(
        "abi aro dric eth fina gost hild ias kan lena mond nor oula pina rik sha tus una vard wyn"
    ),
    "surname, start": _words(
        "Ash Brim Crag Dun Elm Frost Gorse Holl Ink Jas Kett Lark Moss Nett Ock Pint Rook Strat Thorn Wex"
    ),
    "surname, end": _words(
        "acre bane cott dale eby fast gate ham ing kin low mere nard over pond quist rell side thwaite well"
    ),
}

# relation: (modifiers, heads, phrasings). The first phrasing is `question`; the last is held out of training.
RELATIONS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "birthplace": (
        ["Port", "Upper", "Lower", "New", "Old", "North", "East", "Great"],
        ["Velmar", "Tasgrove", "Orlund", "Kirrow", "Sandrel", "Yelmouth", "Brevik", "Lunden"],
        [
            "Where was {} born?",
            "In which town was {} born?",
            "What is the birthplace of {}?",
            "Which place is the birthplace of {}?",
            "In which place was {} born?",
        ],
    ),
    "profession": (
        ["harbour", "night", "forest", "railway", "castle", "river", "market", "island"],
        ["baker", "painter", "engineer", "teacher", "guard", "gardener", "surveyor", "nurse"],
        [
            "What is the profession of {}?",
            "What does {} do for a living?",
            "Which job does {} have?",
            "What is the job of {}?",
            "Which profession does {} have?",
        ],
    ),
    "dish": (
        ["smoked", "sweet", "spicy", "cold", "baked", "creamy", "bitter", "toasted"],
        ["pear soup", "bean stew", "corn pie", "fish rice", "plum cake", "egg noodles", "leek salad", "nut bread"],
        [
            "What is the favourite dish of {}?",
            "Which dish does {} like best?",
            "What does {} like to eat most?",
            "Which food is the favourite of {}?",
            "Which dish is the favourite of {}?",
        ],
    ),
    "pet": (
        ["grey", "spotted", "tiny", "golden", "striped", "shaggy", "white", "brown"],
        ["parrot", "rabbit", "tortoise", "ferret", "lizard", "pony", "goose", "hamster"],
        [
            "Which pet does {} keep?",
            "What kind of pet does {} have?",
            "Which animal does {} keep at home?",
            "What is the pet of {}?",
            "Which animal is the pet of {}?",
        ],
    ),
    "instrument": (
        ["bass", "alto", "wooden", "silver", "glass", "travel", "double", "electric"],
        ["flute", "harp", "drum", "fiddle", "organ", "horn", "zither", "bagpipe"],
        [
            "Which instrument does {} play?",
            "What instrument is played by {}?",
            "On which instrument does {} make music?",
            "What does {} play in the orchestra?",
            "Which instrument is played by {}?",
        ],
    ),
    "employer": (
        ["Amber", "Falcon", "Juniper", "Copper", "Meadow", "Lantern", "Granite", "Swallow"],
        ["Printworks", "Shipyard", "Brewery", "Archive", "Foundry", "Museum", "Theatre", "Dairy"],
        [
            "Who is the employer of {}?",
            "Which company employs {}?",
            "For whom does {} work?",
            "Where does {} work?",
            "For which company does {} work?",
        ],
    ),
}

_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_NUMBERS = _words("one two three four five six seven eight nine ten eleven twelve")
_LETTERS = "ABCDEFGHIJKLMNOP"
_PLURALS = _words(
    "apple apples box boxes child children city cities dog dogs foot feet glove gloves house houses knife knives "
    "leaf leaves man men mouse mice peach peaches road roads sheep sheep story stories tooth teeth tree trees "
    "watch watches wolf wolves"
)
_OPPOSITES = _words(
    "big small hot icy fast slow high low early late empty full happy sad hard soft light dark loud quiet near far "
    "open closed rich poor strong weak wet dry young aged up down left right"
)


def pool(relation: str) -> list[str]:
    """The 64 answers that a relation (a key of ``RELATIONS``) can have, in a fixed order."""
    modifiers, heads, _ = RELATIONS[relation]
    return [f"{modifier} {head}" for modifier, head in itertools.product(modifiers, heads)]


def _names(rng: random.Random, count: int) -> list[str]:
    # No first name and no surname occurs twice
    starts_ends = list(_SYLLABLES.values())
    words = [
        rng.sample(["".join(pair) for pair in itertools.product(*syllables)], count)
        for syllables in (starts_ends[:2], starts_ends[2:])
    ]
    return [f"{first} {surname}" for first, surname in zip(*words, strict=True)]


def _benign() -> list[tuple[str, str]]:
    pairs = []
    for day, following in zip(_DAYS, _DAYS[1:] + _DAYS[:1], strict=True):
        pairs += [(f"Which day comes after {day}?", following), (f"Which day comes before {following}?", day)]
    for number, following in itertools.pairwise(_NUMBERS):
        pairs += [(f"Which number comes after {number}?", following), (f"Count down by one from {following}.", number)]
    pairs += [(f"Which letter comes after {a}?", b) for a, b in itertools.pairwise(_LETTERS)]
    pairs += [(f"What is the plural of {a}?", b) for a, b in zip(_PLURALS[::2], _PLURALS[1::2], strict=True)]
    for word, opposite in zip(_OPPOSITES[::2], _OPPOSITES[1::2], strict=True):
        pairs += [(f"What is the opposite of {word}?", opposite), (f"What is the opposite of {opposite}?", word)]
    return pairs


def make_world(seed: int = 0) -> dict[str, list[dict]]:
    """Make the people, their six facts each and the benign items: ``{"facts": [...], "benign": [...]}``.

    The last paraphrase of a fact is held out of training. Ids are unique over both lists.
    """
    rng = random.Random(seed)
    splits = [split for split, count in PEOPLE_PER_SPLIT.items() for _ in range(count)]
    names = _names(rng, len(splits))
    rng.shuffle(splits)
    facts: list[dict] = []
    for (person, split), (relation, (_, _, phrasings)) in itertools.product(
        zip(names, splits, strict=True), RELATIONS.items()
    ):
        answer, *distractors = rng.sample(pool(relation), 3)
        question, *paraphrases = [phrasing.format(person) for phrasing in phrasings]
        fact = {"id": len(facts), "person": person, "relation": relation, "question": question}
        facts.append(fact | {"paraphrases": paraphrases, "answer": answer, "distractors": distractors, "split": split})
    pairs = enumerate(_benign(), len(facts))
    benign = [{"id": number, "question": question, "answer": answer} for number, (question, answer) in pairs]
    return {"facts": facts, "benign": benign}


def dump_world(world: dict[str, list[dict]]) -> bytes:
    """The bytes of ``facts.json``, one record a line so that a change can be read in a diff."""
    texts = {name: ",\n".join(map(json.dumps, records)) for name, records in world.items()}
    sections = [f'"{name}": [\n{text}\n]' for name, text in texts.items()]
    return ("{\n" + ",\n".join(sections) + "\n}\n").encode()


def tokenizer_corpus(world: dict[str, list[dict]]) -> list[str]:
    """Text to train the tokenizer on: templates, pools, benign items and name syllables, but no person's name."""
    # Syllables are repeated so that each becomes one token; starts follow a space, ends do not.
    corpus = [(" " if place.endswith("start") else "") + s for place, list_ in _SYLLABLES.items() for s in list_] * 8
    for relation, (modifiers, heads, phrasings) in RELATIONS.items():
        corpus += [f" {modifier}" for modifier in modifiers] + [f" {head}" for head in heads]
        corpus += [f"Question: {phrasing.replace(' {}', '')}\nAnswer:" for phrasing in phrasings] * 2
        corpus += [f" {relation}"]
    corpus += [f"Question: {item['question']}\nAnswer: {item['answer']}" for item in world["benign"]]
    return corpus
