"""Large sets: the same batches, digests and mistakes, with nothing held in memory and nothing left on the disk."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import popen_spawn_posix
from multiprocessing.context import set_spawning_popen
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from toys.data import Toy, byte_tokenizer, examples

from lightning_ssiuu.datamodules import CustomData, QAExample, RelearnDataModule, Splits, UnlearningDataModule, spooled
from lightning_ssiuu.datamodules.encoding import Encoder
from lightning_ssiuu.datamodules.largest import evaluation_batch, training_batch
from lightning_ssiuu.datamodules.readers import read_records
from lightning_ssiuu.datamodules.spooled import Spooled, kept
from lightning_ssiuu.utils.errors import UserError


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Three examples are a large set; gives the directory that the private files take their place in."""
    monkeypatch.setattr(spooled, "IN_MEMORY", 3)
    monkeypatch.setenv("LIGHTNING_SSIUU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder: Path) -> list[str]:
    """Files of a forget, retain and test set with distractors."""
    files = []
    for name, some in (("forget", examples(0, 5, 2)), ("retain", examples(10, 7, 2)), ("test", examples(20, 4, 2))):
        rows = ({"question": e.question, "answer": e.answer, "wrong": e.distractors} for e in some)
        files.append(str(folder / f"{name}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def custom(folder: Path, **options: object) -> CustomData:
    return CustomData(*write(folder), tokenizer=byte_tokenizer(), distractors_column="wrong", batch_size=2, **options)


def content(data: UnlearningDataModule) -> list[object]:
    """All that a data module gives: examples, batches of two epochs and of evaluation, and digests."""
    loader = data.train_dataloader()
    batches = list(loader)
    loader.batch_sampler.set_epoch(1)
    batches += list(loader)
    batches += [batch for loader in data.val_dataloader() for batch in loader]
    batches += [training_batch(data, lambda size: size.tokens, 1, 9, None)]
    batches += [evaluation_batch(data, "retain", lambda size: size.labels, n) for n in (None, 3)]
    parts = [{name: tensor.tolist() for name, tensor in flat(part)} for batch in batches for part in batch.values()]
    return [*map(list, dict(data.splits.items()).values()), parts, data.splits.sha256(), data.content_sha256()]


def flat(part: dict) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in part.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in value.items())
        else:
            yield name, value


@pytest.mark.parametrize("options", [{}, {"train_on": "all"}, {"num_workers": 1}, {"max_eval_examples": 4}])
def test_a_large_set_gives_what_a_small_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    small = custom(tmp_path, **options)
    expected = content(small)
    assert isinstance(small.splits.forget, list)
    monkeypatch.setattr(spooled, "IN_MEMORY", 3)
    data = custom(tmp_path, **options)
    assert content(data) == expected
    assert isinstance(data.splits.forget, Spooled)
    assert all(isinstance(encoded, Spooled) for encoded in data._encoded.values())


def test_digests_are_those_of_the_whole_text() -> None:
    splits = Splits(examples(0, 2), [QAExample(5, "Ä?", "b")])
    added = ("history", "rephrased", "source_id")  # which earlier versions' examples did not have
    record = {
        name: [{field: value for field, value in vars(example).items() if field not in added} for example in some]
        for name, some in splits.items()
    }
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert splits.sha256() == hashlib.sha256(text.encode()).hexdigest()
    renamed = [replace(example, source_id="SECRET") for example in splits.forget]
    assert Splits(renamed, splits.retain).sha256() == splits.sha256()
    talked = [replace(example, history=(("user", "Hello?"), ("assistant", "Hello."))) for example in splits.forget]
    assert Splits(talked, splits.retain).sha256() != splits.sha256()


def test_no_text_is_left_on_the_disk(large: Path, tmp_path: Path) -> None:
    data = custom(tmp_path)
    data.setup("fit")
    assert isinstance(data.splits.forget, Spooled)
    assert large.is_dir()
    assert not list(large.rglob("*"))  # while it is in use, too


def test_an_attack_on_a_large_set(large: Path, tmp_path: Path) -> None:
    attack = RelearnDataModule(custom(tmp_path), p=0.2, batch_size=1)
    assert isinstance(attack.scored, Spooled)
    assert [len(attack.attacked), len(attack.scored)] == [1, 4]
    assert RelearnDataModule(custom(tmp_path, max_eval_examples=2), p=0.2).n_scored("forget") == 2


def test_as_many_examples_are_scored_as_were_asked_for() -> None:
    splits = Splits(examples(0, 40), examples(100, 9), examples(200, 6))
    seen = []
    for seed in (0, 7):
        data = Toy(splits, seed=seed, max_eval_examples=8)
        seen.append([[i for batch in loader for i in next(iter(batch.values()))["example_id"].tolist()]
                     for loader in data.val_dataloader()])  # fmt: skip
    forget, retain, test = seen[0]
    assert seen[1] == seen[0]
    assert [len(set(forget)), len(set(retain)), test] == [8, 8, list(range(200, 206))]
    assert forget == sorted(forget)
    assert forget[-1] > 8  # not the first ones
    assert [data.n_scored(name) for name in ("forget", "test")] == [8, 6]
    given = data.eval_dataloader("forget", splits.forget)
    assert sum(len(batch["forget"]["example_id"]) for batch in given) == 40
    with pytest.raises(UserError, match="devices: got 7, allowed: at most 6"):
        data.check_share(7)
    with pytest.raises(UserError, match="max_eval_examples: got 0"):
        Toy(splits, max_eval_examples=0)


def test_a_template_is_tried_on_the_asked_examples_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Toy(Splits(examples(0, 40), examples(100, 9)))
    data.setup("fit")
    asked: list[int] = []
    encode = Encoder.encode

    def counted(self: Encoder, some: Sequence[QAExample], options: bool = False) -> Sequence:
        asked.append(len(some))
        return encode(self, some, options)

    monkeypatch.setattr(Encoder, "encode", counted)
    data.with_template("{question}").eval_dataloader("forget", data.splits.forget[:3])
    assert asked == [3]


def test_nothing_is_tokenised_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Toy()
    before = data.content_sha256()
    data.setup("fit")
    asked: list[str] = []
    of = Encoder.of
    monkeypatch.setattr(Encoder, "of", lambda self, one, *more: asked.append(one.question) or of(self, one, *more))
    assert data.content_sha256() == before
    assert asked == [example.question for example in data.splits.benign]


# -- the sequence itself ----------------------------------------------------------------------------------------


def test_a_spooled_sequence_is_a_sequence() -> None:
    items = [("a" * n, n) for n in range(20)]
    kept_away = Spooled(iter(items))
    assert list(kept_away) == items
    assert [kept_away[0], kept_away[-1]] == [items[0], items[-1]]
    assert kept_away[3:17:5] == items[3:17:5]
    part = kept_away[5:]
    assert isinstance(part, Spooled)
    assert list(part[2:4]) == items[7:9]
    assert list(part[9:3]) == []
    assert list(Spooled([])) == []
    with pytest.raises(IndexError):
        kept_away[20]


def test_what_is_kept_is_a_new_list_or_spooled(large: Path) -> None:
    few, many = [1, 2, 3], [1, 2, 3, 4]
    assert kept(few) == few
    assert kept(few) is not few
    assert isinstance(kept(many), Spooled)
    assert list(kept(iter(many))) == many
    assert kept(away := kept(many)) is away


def test_other_processes_read_the_same_file() -> None:
    numbers = Spooled(range(100))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(sum(numbers)))
    process.start()
    assert queue.get() == 4950
    process.join()


def test_a_spawned_process_gets_the_file() -> None:
    numbers = Spooled(range(100))

    class Popen:
        DupFd, duplicate_for_child = popen_spawn_posix._DupFd, staticmethod(os.dup)

    set_spawning_popen(Popen)
    try:
        sent = ForkingPickler.dumps(numbers[90:])
    finally:
        set_spawning_popen(None)
    got = pickle.loads(sent)
    assert os.fstat(got._file.fileno()).st_ino == os.fstat(numbers._file.fileno()).st_ino
    assert list(got) == list(range(90, 100))


def test_pickled_elsewhere_it_is_its_items(large: Path, tmp_path: Path) -> None:
    """As often as one likes, also once the file is gone."""
    data = custom(tmp_path)
    expected = content(data)
    pickled = pickle.dumps(data)
    del data
    gc.collect()
    for _ in range(2):
        assert content(pickle.loads(pickled)) == expected


def test_copies_are_the_same_sequence(large: Path, tmp_path: Path) -> None:
    data = custom(tmp_path)
    data.setup()
    other = copy.deepcopy(data)
    assert other.splits.forget is data.splits.forget
    assert copy.copy(data.splits.forget) is data.splits.forget


def test_sets_of_any_size_go_together(large: Path) -> None:
    few, many = [1, 2], kept(range(9))
    assert list(many + few) == [*range(9), 1, 2]
    assert list(few + many) == [1, 2, *range(9)]
    assert list(many + many) == [*range(9)] * 2
    assert isinstance(many + few, Spooled)


def test_memory_does_not_grow_with_the_set(large: Path, tmp_path: Path) -> None:
    """1,000 and 3,000 examples of 2 kB each."""
    peaks = []
    for count in (1000, 3000):
        for name, first in (("forget", 0), ("retain", count)):
            with (tmp_path / f"{name}.jsonl").open("w") as file:
                for number in range(first, first + (count if name == "forget" else 5)):
                    file.write(json.dumps({"question": f"Q {number}" + "?" * 2000, "answer": "a"}) + "\n")
        tracemalloc.start()
        data = CustomData(*(str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")))
        assert len(data.splits.forget) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 200 * 2000  # 2,000 more examples: less than a tenth of their text


def test_a_full_disk_is_a_users_error(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large.write_text("no directory")
    with pytest.raises(UserError, match=r"LIGHTNING_SSIUU_CACHE: got .*cache"):
        kept(range(9))


# -- records one by one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_lines_are_read_as_they_are_asked_for(tmp_path: Path, name: str) -> None:
    """What is wrong further on is told when it is reached, so nothing beyond was read."""
    good = '{"q": "a"}\n' if "json" in name else "q\n" + "a\n"
    filler = '{"q": "b"}\n' if "json" in name else "b\n"
    (tmp_path / name).write_bytes((good + filler * 100_000).encode() + b"\xff\n")
    records = read_records(str(tmp_path / name), "forget")
    assert [next(records), next(records)] == [{"q": "a"}, {"q": "b"}]
    with pytest.raises(UserError, match="UTF-8"):
        list(records)
