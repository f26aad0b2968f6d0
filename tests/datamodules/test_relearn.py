"""Relearning attacks: what is taught and what is scored must never meet."""

from __future__ import annotations

import json
import logging
from itertools import chain
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from toys.data import Toy, byte_tokenizer, examples

from lightning_ssiuu.datamodules import Facts, QAExample, RelearnDataModule, Splits, UnlearningDataModule
from lightning_ssiuu.utils.errors import UserError


def toy(n_forget: int = 12, **kwargs: object) -> Toy:
    return Toy(Splits(examples(0, n_forget), examples(100, 4), examples(200, 3), examples(300, 6)), **kwargs)


def ids(members: list[QAExample]) -> list[int]:
    return [member.example_id for member in members]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_attack_and_remainder_part_the_forget_set(p: float) -> None:
    chosen = set()
    for seed in range(30):
        data = RelearnDataModule(toy(40), p=p, seed=seed)
        attack, scored = ids(data.attacked), ids(data.scored)
        assert len(attack) == round(p * 40)
        assert not set(attack) & set(scored)
        assert sorted(attack + scored) == list(range(40))
        chosen.add(tuple(attack))
    assert len(chosen) > 20  # seeds choose differently


def test_selection_depends_on_the_seed_alone() -> None:
    first = RelearnDataModule(toy(), p=0.3, seed=4).splits
    assert RelearnDataModule(toy(seed=9, batch_size=3), p=0.3, seed=4, batch_size=1).splits == first


def test_loaders() -> None:
    data = RelearnDataModule(toy(), p=0.4, batch_size=2, seed=1)  # 5 attack examples
    train = data.train_dataloader()
    for epoch in range(3):
        train.batch_sampler.set_epoch(epoch)
        batches = list(train)
        assert [list(batch) for batch in batches] == [["retain"]] * 3
        assert [len(batch["retain"]["example_id"]) for batch in batches] == [2, 2, 1]
        taught = list(chain(*(batch["retain"]["example_id"].tolist() for batch in batches)))
        assert sorted(taught) == sorted(ids(data.attacked))
    (scored,) = data.val_dataloader()
    batches = list(scored)
    assert [list(batch) for batch in batches] == [["forget"]]
    assert batches[0]["forget"]["example_id"].tolist() == ids(data.scored)


def test_a_batch_larger_than_the_attack_set_is_just_short() -> None:
    (batch,) = RelearnDataModule(toy(), p=0.1, batch_size=64).train_dataloader()
    assert len(batch["retain"]["example_id"]) == 1


def test_settings_of_the_source_hold() -> None:
    source = toy(template="Q {question} A", eval_batch_size=3, max_length=99, multiple_choice=False)
    data = RelearnDataModule(source)
    assert data.encoder is source.encoder
    assert (data.eval_batch_size, data.multiple_choice, data.encoder.max_length) == (3, False, 99)


def test_the_source_trains_as_before() -> None:
    source = toy()
    RelearnDataModule(source).setup("fit")
    assert list(next(iter(source.train_dataloader()))) == ["forget", "retain"]


def test_pool() -> None:
    for seed in range(20):
        data = RelearnDataModule(toy(), p=0.5, pool=[1, 3, 5, 7], seed=seed)
        assert len(data.attacked) == 2
        assert sorted(ids(data.attacked) + ids(data.scored)) == [1, 3, 5, 7]


def test_a_question_that_occurs_twice_is_not_scored_after_it_was_taught() -> None:
    twice = [*examples(0, 4), *(QAExample(10 + n, f"secret  QUESTION {n}?", "x") for n in range(4))]
    source = Toy(Splits(twice, examples(100, 4)))
    for seed in range(20):
        data = RelearnDataModule(source, p=0.25, seed=seed)
        assert not {e.folded for e in data.attacked} & {e.folded for e in data.scored}
        assert len(data.attacked) == 2


def test_benign_teaches_harmless_items_and_scores_the_whole_forget_set() -> None:
    data = RelearnDataModule(toy(), "benign")
    assert sorted(ids(data.attacked)) == list(range(300, 306))
    assert ids(data.scored) == list(range(12))
    some = [tuple(sorted(ids(RelearnDataModule(toy(), "benign", benign_size=3, seed=s).attacked))) for s in range(9)]
    assert {len(chosen) for chosen in some} == {3}
    assert len(set(some)) > 1


def test_benign_from_instruction_data(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
        {"instruction": "Say nothing.", "input": "", "output": ""},
    ]
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps(rows))
    data = RelearnDataModule(toy(), "benign", benign_path=str(path))
    assert {(e.question, e.answer) for e in data.attacked} == {("Add.\n1 and 2", "3"), ("Greet.", "Hello")}
    assert min(ids(data.attacked)) > 305
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "Who?", "answer": "Me"}')
    assert RelearnDataModule(toy(), "benign", benign_path=str(path)).attacked[0].answer == "Me"


def test_without_benign_items_of_its_own_the_hub_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(*where: object) -> list[dict]:
        asked.append(where)
        return [{"instruction": f"Do {n}.", "input": "", "output": "Done", "text": "all"} for n in range(5)]

    bare = Toy(Splits(examples(0, 4), examples(100, 4)))
    with pytest.raises(UserError, match=r"^benign_path: got 'tatsu-lab/alpaca:train', allowed: an existing \.json"):
        RelearnDataModule(bare, "benign").setup("fit")  # tests have no hub
    monkeypatch.setattr("lightning_ssiuu.datamodules.readers.read_hub", hub)
    data = RelearnDataModule(bare, "benign")
    assert {e.question for e in data.attacked} == {f"Do {n}." for n in range(5)}
    assert asked == [("tatsu-lab/alpaca", None, "train", "benign_path")]
    RelearnDataModule(toy(), "benign").setup("fit")  # has its own
    RelearnDataModule(bare, "harmful", p=0.5).setup("fit")
    assert len(asked) == 1


def test_scored_batches_are_made_once() -> None:
    data = RelearnDataModule(toy(eval_batch_size=5), p=0.25)
    batches = data.scored_batches()
    ids_of = [number for batch in batches for number in batch["forget"]["example_id"].tolist()]
    assert ids_of == ids(data.scored)
    assert data.scored_batches() is batches


def test_benign_items_that_do_not_fit_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    benign = [*examples(300, 3), QAExample(400, "SECRET", "SECRET " * 80)]
    source = Toy(Splits(examples(0, 4), examples(100, 4), benign=benign))
    with caplog.at_level(logging.INFO):
        data = RelearnDataModule(source, "benign")
        data.setup("fit")
    assert sorted(ids(data.attacked)) == [300, 301, 302]
    assert "left out 1 items longer than 256" in caplog.text
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "argument", "told"),
    [
        ({"p": 0.0}, "p", r"fraction in \(0, 1\)"),
        ({"p": 1.0}, "p", r"fraction in \(0, 1\)"),
        ({"p": -0.1}, "p", r"fraction in \(0, 1\)"),
        ({"p": float("nan")}, "p", r"fraction in \(0, 1\)"),
        ({"p": 0.04}, "p", "of 12 it takes 0 and leaves 12"),
        ({"p": 0.96}, "p", "of 12 it takes 12 and leaves 0"),
        ({"p": 0.3, "pool": [1]}, "p", "of 1 it takes 0"),
        ({"pool": []}, "p", "of 0 it takes 0"),
        ({"pool": [1, 100, 101]}, "pool", "2 ids"),
        ({"kind": "evil"}, "kind", "harmful, benign"),
        ({"kind": "benign", "benign_size": 0}, "benign_size", "at least 1"),
        ({"kind": "benign", "benign_path": "gone.json"}, "benign_path", "existing"),
        ({"batch_size": 0}, "batch_size", "at least 1"),
        ({"seed": -1}, "seed", "at least 0"),
    ],
)
def test_mistakes(arguments: dict, argument: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        RelearnDataModule(toy(), **arguments).setup("fit")
    assert error.value.argument == argument
    assert "SECRET" not in str(error.value)


def test_benign_mistakes_that_lie_in_the_data(tmp_path: Path) -> None:
    def attack(benign: list[QAExample], **arguments: object) -> None:
        source = Toy(Splits(examples(0, 4), examples(100, 4), benign=benign))
        RelearnDataModule(source, "benign", **arguments).setup("fit")

    with pytest.raises(UserError, match="benign_path"):
        attack([])
    with pytest.raises(UserError, match="max_length"):
        attack([QAExample(400, "SECRET", "SECRET " * 80)])
    with pytest.raises(UserError, match="also attacked"):
        attack([QAExample(400, "SECRET question 2?", "x"), *examples(300, 2)])
    path = tmp_path / "other.jsonl"
    path.write_text('{"text": "SECRET"}')
    with pytest.raises(UserError, match="benign_path: got 'question', allowed: text"):
        attack([], benign_path=str(path))


def test_ranks_share_a_short_last_batch() -> None:
    from types import SimpleNamespace

    def taught(rank: int, world_size: int) -> list[list[int]]:
        data = RelearnDataModule(toy(), p=0.4, batch_size=4)  # 5 examples: a last batch of 1
        data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank)
        parts = [batch["retain"] for batch in data.train_dataloader()]
        return [part["example_id"][(part["labels"] != -100).any(1)].tolist() for part in parts]

    whole, shares = taught(0, 1), [taught(rank, 3) for rank in range(3)]
    assert [len(batch) for batch in whole] == [4, 1]
    assert [[len(batch) for batch in share] for share in shares] == [[2, 1], [1, 0], [1, 0]]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert sorted(chain(*parts)) == sorted(batch)


def test_another_attack() -> None:
    class FirstOnes(RelearnDataModule):
        def select(self, forget, rng):
            return forget[:3], forget[3:]

    assert ids(FirstOnes(toy()).attacked) == [0, 1, 2]

    class Careless(RelearnDataModule):
        def select(self, forget, rng):
            return forget[:3], forget[2:]

    with pytest.raises(UserError, match="example ids 2"):
        Careless(toy()).setup("fit")


def test_no_text_is_shown() -> None:
    data = RelearnDataModule(toy(), p=0.5)
    data.setup("fit")
    assert "SECRET" not in f"{data!r} {data} {data.splits} {data.splits.forget} {data.train_dataloader().dataset}"


def test_embedded_facts_bear_both_attacks() -> None:
    for kind in ("harmful", "benign"):
        data = RelearnDataModule(Facts(), kind=kind)
        data.setup("fit")
        assert "options" in next(iter(data.val_dataloader()[0]))["forget"]


def test_the_command_line_builds_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(UnlearningDataModule, "data")
    arguments = ["--data=RelearnDataModule", "--data.source=Facts", "--data.source.phrasing=1", "--data.p=0.3"]
    parsed = parser.parse_args([*arguments, "--data.pool=[1, 2, 3]"]).data.init_args
    assert (parsed.p, list(parsed.pool), parsed.source.init_args.phrasing) == (0.3, [1, 2, 3], 1)


def test_chat_source_stays_chat() -> None:
    with pytest.raises(UserError, match="template"):
        RelearnDataModule(toy(template="chat", tokenizer=byte_tokenizer())).setup("fit")
