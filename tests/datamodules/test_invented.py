"""Facts that nobody was ever taught: of the form of the forget set, and none of it."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from toys.cli import write_rows
from toys.data import Toy, examples

from lightning_ssiuu import Facts, WorldFacts
from lightning_ssiuu.datamodules import QAExample, Splits
from lightning_ssiuu.datamodules.embedded.facts_data import RELATIONS, pool
from lightning_ssiuu.datamodules.invented import control_of, invented, made_up
from lightning_ssiuu.utils.errors import UserError


def test_people_of_no_world() -> None:
    data = Facts(phrasing=1)
    control = control_of(data)
    assert control is not None
    made = control.data.splits.forget
    assert control.kind == "invented people"
    words = {word for _, known in data.splits.items() for example in known for word in example.group.split()}
    assert not {word for example in made for word in example.group.split()} & words
    assert Counter(example.group for example in made) == dict.fromkeys({example.group for example in made}, 6)
    for stranger, true, relation in zip(made, data.splits.forget, [*RELATIONS] * 6, strict=True):
        # The same relation in the same words at the same place, so that both attacks are chosen alike
        assert stranger.question.replace(stranger.group, "") == true.question.replace(true.group, "")
        assert {stranger.answer, *stranger.distractors} <= set(pool(relation))
    ids = [example.example_id for _, known in control.data.splits.items() for example in known]
    assert len(set(ids)) == len(ids)
    assert control.data.splits.retain == data.splits.retain
    assert control.data.content_sha256() != data.content_sha256()
    assert data.splits.forget[0].group.split()[0] in words  # left as it was


def test_subjects_of_the_same_kind() -> None:
    data = WorldFacts(forget_fraction=0.2)
    control = control_of(data)
    assert control is not None
    assert control.kind == "invented names"
    made, names = control.data.splits.forget, {}
    for stranger, true in zip(made, data.splits.forget, strict=True):
        assert true.group not in stranger.question
        assert stranger.group in stranger.question
        assert names.setdefault(true.group, stranger.group) == stranger.group
        assert stranger.answer in true.distractors
        assert set(stranger.distractors) <= {true.answer, *true.distractors}
        assert all(true.group not in wording for wording in stranger.paraphrases)
    assert len(set(names.values())) == len(names) > 20


def test_names_keep_their_shape_and_none_is_taken() -> None:
    assert made_up("the Bridge of Sighs").split()[0] == "the"
    assert [word.istitle() for word in made_up("the Bridge of Sighs").split()] == [False, True, False, True]
    assert made_up("helium").islower()
    assert made_up("helium") == made_up("helium") != made_up("helium", [made_up("helium")])


def test_questions_with_each_others_answers_are_worded_alike() -> None:
    facts = [QAExample(e.example_id, e.question, e.answer, e.distractors) for e in Facts().splits.forget]
    random.Random(0).shuffle(facts)
    kind, made = invented(facts)
    made = list(made)
    assert kind == "forget questions with each other's answers"
    assert [one.question for one in made] == [one.question for one in facts]
    assert sorted(one.answer for one in made) == sorted(one.answer for one in facts)
    pools = {answer: relation for relation in RELATIONS for answer in pool(relation)}
    for one, true in zip(made, facts, strict=True):
        assert one.answer != true.answer
        assert pools[one.answer] == pools[true.answer]
        assert set(one.distractors) <= set(pool(pools[one.answer]))


def test_what_is_answered_alike_has_no_control() -> None:
    alike = [QAExample(n, f"Is {n} odd?", "Yes") for n in range(4)]
    assert control_of(Toy(Splits(alike, examples(20, 4)))) is None
    assert control_of(Toy(), "none") is None


def test_what_does_not_fit_is_left_out() -> None:
    """Each alone has room for its own answer, and one of them not for the other's."""
    facts = [QAExample(0, "Who is A?", "D" * 24), QAExample(1, "Who is the one that they call C?", "B")]
    data = Toy(Splits(facts, [QAExample(9, "Who is E?", "F")]), max_length=60)
    assert all(map(data.encoder.fits, facts))
    control = control_of(data)
    assert control is not None
    assert [example.answer for example in control.data.splits.forget] == ["B"]


def test_a_file(tmp_path: Path) -> None:
    made = [{"question": f"Who is {n}?", "answer": f"One {n}"} for n in range(9)]
    file = tmp_path / "made.jsonl"
    write_rows(file, made)
    control = control_of(Toy(), str(file))
    assert control is not None
    assert [example.question for example in control.data.splits.forget] == [row["question"] for row in made[:5]]
    assert "given file" in control.kind
    write_rows(file, made[:4])
    with pytest.raises(UserError, match=r"^control: got 4 facts, allowed: a file of at least 5 facts"):
        control_of(Toy(), str(file))
    shared = Toy().splits.retain[0].question
    write_rows(file, [*made[:4], {"question": shared, "answer": "x"}])
    with pytest.raises(UserError, match=r"^control: got 1 questions that are also in forget") as error:
        control_of(Toy(), str(file))
    assert "SECRET" not in str(error.value)
    write_rows(file, [{"question": "a"}] * 5)
    with pytest.raises(UserError, match=r"^control: got 'answer', allowed: question"):
        control_of(Toy(), str(file))
    file.write_text(json.dumps([row | {"distractors": ["x", "y"]} for row in made]), encoding="utf-8")
    control = control_of(Toy(), str(file))
    assert control is not None
    assert control.data.splits.forget[4].distractors == ("x", "y")
    with pytest.raises(UserError, match=r"^control: got '/no/such"):
        control_of(Toy(), "/no/such.jsonl")
