"""WorldFacts: what its tables promise, checked against the tables themselves."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from lightning_ssiuu.datamodules import WorldFacts
from lightning_ssiuu.datamodules.embedded import WORLD_FACTS
from lightning_ssiuu.datamodules.world_facts import relations, world_facts
from lightning_ssiuu.utils.errors import UserError


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    return json.loads(WORLD_FACTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def entities() -> dict[str, dict[str, list]]:
    return world_facts()


def every_question(entities: dict[str, dict[str, list]]) -> list[dict]:
    groups = [group for entity in entities.values() for kind in ("hop1_test", "hop2_test", "same_object")
              for group in entity[kind]]  # fmt: skip
    return [q for entity in entities.values() for q in entity["hop1_unlearn"]] + [q for g in groups for q in g]


def test_counts(world: dict[str, Any], entities: dict[str, dict[str, list]]) -> None:
    sizes = {name: len(relation["facts"]) for name, relation in world["relations"].items()}
    assert sum(sizes.values()) == sum(len(entity["hop1_unlearn"]) for entity in entities.values()) == 611
    assert list(sizes) == relations()
    assert min(sizes.values()) >= 8
    assert sum(bool(hops) for entity in entities.values() for hops in entity["hop2_test"]) >= 150


def test_tables_hold_each_subject_once() -> None:
    text = WORLD_FACTS.read_text(encoding="utf-8")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs)  # json would silently take the last
        return dict(pairs)

    world = json.loads(text, object_pairs_hook=unique)
    subjects = {subject for relation in world["relations"].values() for subject in relation["facts"]}
    assert len({subject.casefold() for subject in subjects}) == len(subjects)
    assert set(world["article"]) <= subjects
    texts = [*subjects, *(a for r in world["relations"].values() for a in r["facts"].values())]
    assert all(each == each.strip() and each.isascii() for each in texts)


def test_questions_are_unique_and_do_not_tell_the_answer(entities: dict[str, dict[str, list]]) -> None:
    base = [q for entity in entities.values() for q in entity["hop1_unlearn"]]
    reworded = [q for entity in entities.values() for group in entity["hop1_test"] for q in group]
    wordings = Counter(question["question"].casefold() for question in base + reworded)
    assert set(wordings.values()) == {1}
    for question in every_question(entities):
        (answer,) = question["answers"]
        assert not re.search(rf"\b{re.escape(answer)}\b", question["question"]), question["question"]
        assert "{" not in question["question"]


def test_every_fact_has_other_wordings(entities: dict[str, dict[str, list]]) -> None:
    for entity in entities.values():
        for base, reworded in zip(entity["hop1_unlearn"], entity["hop1_test"], strict=True):
            assert len(reworded) >= 1
            assert all(question["answers"] == base["answers"] for question in reworded)


def test_distractors_are_two_wrong_answers_of_the_same_kind(
    world: dict[str, Any], entities: dict[str, dict[str, list]]
) -> None:
    pools = [set(relation["facts"].values()) for relation in world["relations"].values()]
    for question in every_question(entities):
        options = [*question["answers"], *question["false_answer_options"]]
        assert len(options) == len({option.casefold() for option in options}) == 3
        assert any(set(options) <= pool for pool in pools)


def test_two_hop_answers_follow_from_the_tables(world: dict[str, Any], entities: dict[str, dict[str, list]]) -> None:
    """Found from the question's own words, not from how the question was made."""
    tables = {name: relation["facts"] for name, relation in world["relations"].items()}
    patterns = []
    for way in ("chains", "inverse_chains"):
        for first, second, text in world[way]:
            before, after = text.split("{}")
            patterns.append((re.compile(re.escape(before) + "(?:the )?(.+)" + re.escape(after)), first, second, way))
    seen: Counter[str] = Counter()
    for question in (q for entity in entities.values() for group in entity["hop2_test"] for q in group):
        found = [(m[1], *rest) for pattern, *rest in patterns if (m := pattern.fullmatch(question["question"]))]
        ((about, first, second, way),) = found
        if way == "chains":
            middle = {tables[first][about]}
        else:
            middle = {subject for subject, answer in tables[first].items() if answer == about}
        assert len(middle) == 1
        assert question["answers"] == [tables[second][middle.pop()]]
        seen[f"{first}, {second}"] += 1
    assert len(seen) == len(world["chains"]) + len(world["inverse_chains"])


def test_two_hop_questions_belong_to_their_first_hop(entities: dict[str, dict[str, list]]) -> None:
    hops = [hop["question"] for hop in entities["Japan"]["hop2_test"][0]]
    assert hops
    assert all("whose capital is Tokyo" in hop for hop in hops)
    assert entities["Japan"]["hop2_test"][1:] == [[], [], []]  # nothing chains from currency, continent, language
    assert entities["Io"]["hop2_test"][0][0]["answers"] == ["fifth"]
    munich = world_facts(["country"])["Munich"]
    assert munich["hop1_unlearn"][0]["question"] == "In which country is the city of Munich?"
    assert [hop["answers"] for hop in munich["hop2_test"][0]] == [["Berlin"], ["euro"], ["Europe"]]


def test_same_answer_questions_are_about_other_subjects(entities: dict[str, dict[str, list]]) -> None:
    bases = {q["question"]: q["answers"] for entity in entities.values() for q in entity["hop1_unlearn"]}
    for entity in entities.values():
        own = {question["question"] for question in entity["hop1_unlearn"]}
        for base, same in zip(entity["hop1_unlearn"], entity["same_object"], strict=True):
            assert all(bases[question["question"]] == base["answers"] for question in same)
            assert not own & {question["question"] for question in same}


def test_subjects_belong_to_one_set() -> None:
    splits = WorldFacts().splits
    subjects = {name: {e.group for e in examples} for name, examples in splits.items() if name != "benign"}
    assert not subjects["forget"] & subjects["retain"] | subjects["forget"] & subjects["test"]
    assert not subjects["retain"] & subjects["test"]
    n_subjects = sum(map(len, subjects.values()))
    assert len(subjects["forget"]) == round(0.1 * n_subjects)
    assert len(subjects["retain"]) == round(0.4 * n_subjects)
    assert sum(len(examples) for name, examples in splits.items() if name != "benign") == 611
    assert len(splits.benign) >= 100


def test_the_split_depends_on_its_seed_alone() -> None:
    first, other = WorldFacts(), WorldFacts(split_seed=1)
    assert first.content_sha256() == WorldFacts(seed=7).content_sha256() != other.content_sha256()
    options = {e.question: e.distractors for _, examples in first.splits.items() for e in examples}
    assert all(options[e.question] == e.distractors for _, examples in other.splits.items() for e in examples)


def test_probes_ask_about_the_forgotten_facts() -> None:
    data = WorldFacts(forget_fraction=0.3)
    by_subject = defaultdict(set)
    for cluster in data.clusters:
        by_subject[cluster.entity].add(cluster.base.question)
    forgotten = {example.question for example in data.splits.forget}
    for kind, least in (("hop1_test", 2 * len(forgotten)), ("hop2_test", 20), ("same_object", 20)):
        probes = data.probes("forget", kind)
        assert len(probes) >= least
        assert not forgotten & {probe.question for probe in probes}
        assert all(by_subject[probe.group] & forgotten for probe in probes)
    ids = [p.example_id for k in ("hop1_test", "hop2_test", "same_object") for p in data.probes("retain", k)]
    ids += [example.example_id for _, examples in data.splits.items() for example in examples]
    assert len(set(ids)) == len(ids)


def test_only_some_relations() -> None:
    splits = WorldFacts(relations=["symbol"]).splits
    questions = [e.question for name, examples in splits.items() if name != "benign" for e in examples]
    assert len(questions) == 46
    assert all("chemical symbol" in question for question in questions)


def test_the_tiny_tokenizer_takes_them() -> None:
    data = WorldFacts(batch_size=2)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()[0]))["forget"]
    assert len(batch["options"]["option_of"]) == 3 * len(batch["example_id"])


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"forget_fraction": 0.0}, "forget_fraction"),
        ({"forget_fraction": 1.0}, "forget_fraction"),
        ({"forget_fraction": 0.5, "retain_fraction": 0.6}, "retain_fraction"),
        ({"retain_fraction": 0.0}, "retain_fraction"),
        ({"forget_fraction": 0.01, "relations": ["young"]}, "forget_fraction"),
        ({"retain_fraction": 0.01, "relations": ["young"]}, "retain_fraction"),
        ({"relations": ["capitals"]}, "relations"),
        ({"split_seed": -1}, "split_seed"),
        ({"n_distractors": 3}, "n_distractors"),
    ],
)
def test_mistakes(arguments: dict, argument: str) -> None:
    with pytest.raises(UserError) as error:
        _ = WorldFacts(**arguments).splits
    assert error.value.argument == argument
