"""Two processes against one with the same global batch, in float64 with SGD: DDP and FSDP2, weights equal to 1e-12."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data_toys import byte_tokenizer
from model_toys import answer_model, equal
from rank_jobs import Job, save_models, train
from two_ranks import BROKEN, JOBS, ON_TWO, results

from lightning_ssiuu.evaluation import Evaluated


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
        for name in ("value", "level", "rouge_level"):
            assert result[name] == pytest.approx(expected[name], rel=1e-9)


def test_a_mistake_that_one_rank_alone_could_see_is_told_by_all() -> None:
    assert [result["mistake"] for result in results()[1][BROKEN.key]] == [
        "checkpoint: got 'broken', allowed: a whole one"
    ] * 2


def test_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    save_models(tmp_path)
    alone, one, two = (
        train(Job("workers", dropout=True, optimizer="adamw", data={"num_workers": n}), 1, tmp_path)["weights"]
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
        return Evaluated(model, tokenizer, part).generations

    together = generations([0, 1])
    assert together == [*generations([0]), *generations([1])]
    assert together[1].startswith(together[0])
    assert len(together[1]) > len(together[0])
