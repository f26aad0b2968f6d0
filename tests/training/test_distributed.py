"""Two processes against one with the same global batch, in float64 with SGD: DDP and FSDP2, weights equal to 1e-12.

And runs on two processes that were interrupted. One file, as both look at the same runs (toys/two_ranks.py), done once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from toys.data import byte_tokenizer
from toys.jobs import Job, save_models, train
from toys.models import answer_model, equal
from toys.two_ranks import BROKEN, JOBS, MOVED, ON_TWO, results

from lightning_ssiuu.evaluation.predictions import Predictions


@pytest.mark.parametrize("job", ON_TWO, ids=lambda job: ", ".join(job.key))
def test_two_ranks_equal_one(job: Job) -> None:
    expected = results()[1][job.name, "auto"]
    for result in results()[1][job.key]:
        assert result["steps"] == expected["steps"]
        assert result["n_optimised"] == expected["n_optimised"]  # tied weights once
        for a, b in zip(result["weights"], expected["weights"], strict=True):
            assert (a - b).abs().max() < 1e-12
        assert result["figures"] == pytest.approx(expected["figures"], rel=1e-6)


@pytest.mark.parametrize("job", [job for job in JOBS if "weight" in (job.regularizer or {})], ids=lambda job: job.name)
def test_the_penalty_is_at_work(job: Job) -> None:
    assert results()[1][job.key]["figures"]["train/penalty_gradient_norm"] > 1e-4  # the weights agree to 1e-12


@pytest.mark.parametrize("strategy", ["ddp_views", "fsdp"])
def test_everything_measured_agrees(strategy: str) -> None:
    expected = results()[1]["looked at", "auto"]
    assert 0 < len(expected["flagged"]) < len(expected["d_minus"]) / 2
    for result in results()[1]["looked at", strategy]:
        for name in ("d_plus", "d_minus"):
            torch.testing.assert_close(result[name], expected[name], rtol=1e-9, atol=1e-17)
        assert result["flagged"] == expected["flagged"]
        assert result["scores"] == pytest.approx(expected["scores"], rel=1e-9)
        for name in ("value", "level", "elicited", "rouge_level"):
            assert result[name] == pytest.approx(expected[name], rel=1e-9)


def test_a_mistake_that_one_rank_alone_could_see_is_told_by_all() -> None:
    assert [result["mistake"] for result in results()[1][BROKEN.key]] == [
        "checkpoint: got 'broken', allowed: a whole one"
    ] * 2


def test_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    save_models(tmp_path)
    alone, one, two = (
        train(Job("workers", model="dropout", optimizer="adamw", data={"num_workers": n}), 1, tmp_path)["weights"]
        for n in range(3)
    )
    assert equal(alone, one)
    assert equal(alone, two)


def test_a_generated_text_does_not_depend_on_the_batch() -> None:
    model, tokenizer = answer_model(vocab_size=260, max_position_embeddings=64), byte_tokenizer()
    answers = [("a", 1), ("abcdefgh", 8)]
    rows = [torch.tensor(tokenizer("the question?" + answer).input_ids) for answer, _ in answers]
    labels = [
        torch.cat([torch.full((len(row) - n,), -100), row[-n:]]) for row, (_, n) in zip(rows, answers, strict=True)
    ]

    def generations(chosen: list[int]) -> list[str]:
        padded = torch.nn.utils.rnn.pad_sequence
        part = {
            "input_ids": padded([rows[i] for i in chosen], batch_first=True),
            "labels": padded([labels[i] for i in chosen], batch_first=True, padding_value=-100),
        }
        return Predictions(model, tokenizer, part).generations

    together = generations([0, 1])
    assert together == [*generations([0]), *generations([1])]
    assert together[1].startswith(together[0])
    assert len(together[1]) > len(together[0])


# ---- interrupted in the middle of an epoch, and taken up on as many processes or on another number ----------------


@pytest.fixture
def own_group() -> Iterator[None]:
    """FSDP2 makes a process group for one process, too."""
    with patch.dict(os.environ):
        yield
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_file"])
@pytest.mark.parametrize("job", ["drawing", "severally", "adapted", "adapted experts"])
def test_resumed_equals_uninterrupted_bit_for_bit(job: str, strategy: str) -> None:
    whole, again = (results()[1][name, strategy] for name in (job, f"{job} again"))
    for rank in range(2):
        assert again[rank]["steps"] == whole[rank]["steps"] == 4
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
