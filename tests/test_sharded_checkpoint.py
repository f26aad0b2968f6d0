"""Runs on two processes that were interrupted in the middle of an epoch, and go on on as many or on another number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from model_toys import equal
from rank_jobs import train
from two_ranks import MOVED, results


@pytest.fixture
def own_group() -> Iterator[None]:
    """FSDP2 makes a process group for one process, too."""
    with patch.dict(os.environ):
        yield
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_file"])
@pytest.mark.parametrize("job", ["drawing", "severally", "adapted"])
def test_resumed_equals_uninterrupted_bit_for_bit(job: str, strategy: str) -> None:
    whole, again = (results()[1][name, strategy] for name in (job, f"{job} again"))
    for rank in range(2):
        assert again[rank]["steps"] == whole[rank]["steps"] == 5
        assert again[rank]["restored"] == 2
        assert equal(again[rank]["weights"], whole[rank]["weights"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_file"])
def test_one_process_resumed_on_two(strategy: str) -> None:
    expected = results()[1]["moved", "auto"]
    for result in (*results()[1]["moved", strategy], *results()[1]["moved from one", strategy]):
        for a, b in zip(result["weights"], expected["weights"], strict=True):
            assert (a - b).abs().max() < 1e-12
    assert {result["restored"] for result in results()[1]["moved from one", strategy]} == {2}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(("saved", "strategy"), [("ddp", "auto"), ("fsdp_file", "auto"), ("fsdp", "fsdp")])
def test_two_processes_resumed_on_one(saved: str, strategy: str, own_group: None) -> None:
    folder, known = results()
    assert (folder / f"moved-{saved}-step=2.ckpt").is_dir() == (saved == "fsdp")
    with pytest.warns(UserWarning, match="the checkpoint is of 2 ranks, this run has 1"):
        again = train(replace(MOVED, strategy=strategy, save=None, resume=f"moved-{saved}"), 1, folder)
    assert again["restored"] == 2
    for a, b in zip(again["weights"], known["moved", "auto"]["weights"], strict=True):
        assert (a - b).abs().max() < 1e-12


def test_shards_of_the_anchor_are_written_by_the_rank_that_has_them() -> None:
    folder, _ = results()
    saved = torch.load(folder / "moved-fsdp-step=2.ckpt" / "meta.pt", weights_only=True)
    anchor = saved["regularizer"]["anchor"]
    assert anchor
    assert all(tensor.numel() == 0 for tensor in anchor.values())
    written = dist.checkpoint.FileSystemReader(folder / "moved-fsdp-step=2.ckpt").read_metadata().state_dict_metadata
    for name in anchor:
        assert len(written[f"state_dict.regularizer.anchor.{name}"].chunks) == 2
    whole = torch.load(folder / "moved-fsdp_file-step=2.ckpt", weights_only=True)
    alone = torch.load(folder / "moved-auto-step=2.ckpt", weights_only=True)
    for name, tensor in alone["regularizer"]["anchor"].items():
        torch.testing.assert_close(whole["regularizer"]["anchor"][name], tensor, rtol=1e-9, atol=1e-30)


def test_random_states_are_every_ranks_own() -> None:
    folder, _ = results()
    first, second = torch.load(folder / "drawing-ddp-step=2.ckpt", weights_only=True)["random_states"]
    assert not torch.equal(first["cpu"], second["cpu"])
