"""Which examples form which batch: on any number of ranks, over epochs, and where evaluation ends."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
import torch

from lightning_ssiuu.datamodules.encoding import Key
from lightning_ssiuu.datamodules.sampling import EvalSampler, PairSampler, share


def batches_of(sampler: PairSampler, epoch: int) -> list[list[Key]]:
    """Its rank's batches of an epoch."""
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("n_forget", "n_retain"), [(4, 9), (11, 5), (8, 8), (13, 40)])
def test_shards_make_up_the_batch_of_one_rank(world_size: int, n_forget: int, n_retain: int) -> None:
    sizes, batch_sizes = {"forget": n_forget, "retain": n_retain}, {"forget": 4, "retain": 4}
    alone = PairSampler(sizes, batch_sizes, seed=3)
    shards = [PairSampler(sizes, batch_sizes, 3, rank, world_size) for rank in range(world_size)]
    for epoch in range(3):
        for whole, *parts in zip(batches_of(alone, epoch), *(batches_of(s, epoch) for s in shards), strict=True):
            assert Counter(chain(*parts)) == Counter(whole)
            assert len({len(part) for part in parts}) == 1
            # not only the same items: interleaving the shards gives the very order
            forget = [[key for key in part if key[0] == "forget"] for part in parts]
            assert list(chain(*zip(*forget, strict=True))) == [key for key in whole if key[0] == "forget"]


def test_every_example_comes_up_equally_often_and_no_batch_is_short() -> None:
    sampler = PairSampler({"forget": 5, "retain": 7}, {"forget": 2, "retain": 4}, seed=0)
    assert len(sampler) == 3  # ceil(5 / 2)
    seen = Counter()
    for epoch in range(35):  # 35 epochs * 3 batches: 210 forget draws = 42 passes, 420 retain draws = 60 passes
        for batch in batches_of(sampler, epoch):
            assert Counter(part for part, _ in batch) == {"forget": 2, "retain": 4}
            seen.update(batch)
    assert seen == {("forget", i): 42 for i in range(5)} | {("retain", i): 60 for i in range(7)}


def test_one_pass_over_the_retain_set_ends_before_the_next_begins() -> None:
    sampler = PairSampler({"forget": 4, "retain": 10}, {"forget": 2, "retain": 2}, seed=1)
    stream = [key for epoch in range(5) for batch in batches_of(sampler, epoch) for key in batch if key[0] == "retain"]
    assert all(len(set(stream[start : start + 10])) == 10 for start in (0, 10))


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list:
        sampler = PairSampler({"forget": 8, "retain": 8}, {"forget": 4, "retain": 4}, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    first = order(0, 2)
    torch.manual_seed(2)
    assert order(0, 2) == first
    assert order(0, 1) != first != order(1, 2)
    batch = first[0]
    assert [i for part, i in batch if part == "forget"] != [i for part, i in batch if part == "retain"]


def test_going_on_within_an_epoch() -> None:
    sampler = PairSampler({"forget": 9, "retain": 9}, {"forget": 2, "retain": 2}, seed=0)
    whole = batches_of(sampler, 4)
    sampler.set_epoch(4)
    sampler.start = 3
    assert list(sampler) == whole[3:]
    assert len(sampler) == 5
    sampler.set_epoch(4)  # Lightning repeats itself after loading a checkpoint
    assert sampler.start == 3
    sampler.set_epoch(5)
    assert sampler.start == 0


def test_unfilled_epochs_are_single_permutations() -> None:
    sampler = PairSampler({"retain": 5}, {"retain": 2}, seed=0, fill=False)
    for epoch in range(4):
        batches = batches_of(sampler, epoch)
        assert [len(batch) for batch in batches] == [2, 2, 1]
        assert sorted(index for _, index in chain(*batches)) == list(range(5))


def test_a_rank_without_an_example_takes_one_that_has_no_answer_to_learn() -> None:
    batch = {"forget": [4], "retain": [3, 2, 5]}
    assert share(batch, 0, 2) == [("forget", 4), ("retain", 3), ("retain", 5)]
    assert share(batch, 1, 2) == [("forget", ~4), ("retain", 2)]


def test_evaluation_batches_by_hand() -> None:
    assert [[index for _, index in batch] for batch in EvalSampler("test", 5, 2)] == [[0], [1, 2], [3, 4]]
    assert list(EvalSampler("test", 5, 2, rank=1, world_size=2)) == [[("test", 1)], [("test", 3)]]


@pytest.mark.parametrize("size", range(4, 23))
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_sees_every_example_once_in_equally_many_batches(
    size: int, batch_size: int, world_size: int
) -> None:
    shards = [list(EvalSampler("test", size, batch_size, rank, world_size)) for rank in range(world_size)]
    assert sorted(index for shard in shards for batch in shard for _, index in batch) == list(range(size))
    assert len({len(shard) for shard in shards}) == 1
    assert all(batch for shard in shards for batch in shard)
    assert max(len(batch) for shard in shards for batch in shard) <= max(batch_size, 2)
    for rank, shard in enumerate(shards):
        assert [index for batch in shard for _, index in batch] == list(range(rank, size, world_size))
