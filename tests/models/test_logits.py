"""Logits in pieces: values, gradients and second gradients of the whole ones, and never the whole ones in memory."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.jobs import Job, run, save_models, train
from toys.models import VOCAB, answer_model, batch, part
from toys.single_pass import difference, gradients

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.logits import ChunkedLogits
from lightning_ssiuu.objectives import objectives

#: Room for so many rows of logits: one row a piece, and several.
ONE, SEVERAL = 4 * VOCAB, 4 * VOCAB * 16
SOME = part([(3, 9), (5, 2), (2, 12)])


def model_with(logit_bytes: int | None, **kwargs: Any) -> AnswerModel:
    model = answer_model(**kwargs)
    if logit_bytes is not None:
        model.logit_bytes = logit_bytes
    return model


def given(model: AnswerModel) -> Any:
    return model(SOME["input_ids"], SOME["attention_mask"], SOME["labels"])


@pytest.mark.parametrize("logit_bytes", [ONE, SEVERAL])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_values_and_gradients_are_those_of_whole_logits(logit_bytes: int, name: str, tied: bool) -> None:
    results = []
    for room in (None, logit_bytes):
        model = model_with(room, name=name, tie_word_embeddings=tied)
        answers = given(model)
        assert isinstance(answers.scores, ChunkedLogits) == (room is not None)
        (answers.mean_logps * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        seen = [answers.token_logps.detach(), answers.peaks, answers.logits.detach()]
        results.append((seen + [p.grad for p in model.parameters()], answers.token_correct))
    for whole, pieces in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-13)
    assert torch.equal(results[0][1], results[1][1])


def test_a_head_with_a_bias_and_frozen_parts() -> None:
    hidden = torch.randn(7, 5, dtype=torch.float64).requires_grad_()
    targets, slope = torch.arange(7), torch.randn(7, dtype=torch.float64)
    for frozen in ((), ("weight",), ("bias",), ("hidden",), ("hidden", "weight")):
        head = nn.Linear(5, 11, dtype=torch.float64)
        wanted: dict[str, Tensor] = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
        for name, tensor in wanted.items():
            tensor.requires_grad_(name not in frozen)
        inputs = [tensor for name, tensor in wanted.items() if name not in frozen]
        whole = -nn.functional.cross_entropy(head(hidden), targets, reduction="none")
        pieces = ChunkedLogits(hidden, head, targets, logit_bytes=4 * 11 * 16).token_logps
        for found, expected in zip(*(torch.autograd.grad(x @ slope, inputs) for x in (pieces, whole)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(lambda h: ChunkedLogits(h, head, targets, 1).token_logps, hidden.requires_grad_())


def test_a_second_derivative_is_refused() -> None:
    hidden, head = torch.randn(4, 5).requires_grad_(), nn.Linear(5, 11)
    logps = ChunkedLogits(hidden, head, torch.arange(4), 1).token_logps
    (gradient,) = torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_as_it_does_for_whole_logits(dtype: torch.dtype) -> None:
    """Products in bfloat16, log-probabilities in float32; gradients of several pieces are summed in float32."""
    results = []
    for room in (None, SEVERAL):
        model = model_with(room, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            answers = given(model)
        assert answers.token_logps.dtype == torch.float32
        answers.logps.sum().backward()
        results.append([answers.token_logps.detach(), *(p.grad for p in model.parameters())])
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for whole, pieces in zip(*results, strict=True):
        assert (pieces - whole).norm() <= tolerance * whole.norm()


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"tie_word_embeddings": False, "target": "length_normalised"},
        {"gradient_checkpointing": True, "accumulate": 2},
        {"objective": "NPO", "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_one_backward_pass_is_enough(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """``passes="one"`` refuses where a pass is not exact."""
    if case.get("objective") == "NPO":
        monkeypatch.setattr(objectives()["NPO"], "references", lambda self: {})
        monkeypatch.setattr(objectives()["NPO"], "original", lambda self, name, one: torch.zeros(len(one["labels"])))
    shape = {key: case[key] for key in ("tie_word_embeddings",) if key in case}
    options = {key: value for key, value in case.items() if key not in shape}
    some = [batch(n, [(3, 4), (5, 6), (2, 5)]) for n in range(2 * case.get("accumulate", 1))]
    runs = [
        gradients(model_with(room, **shape), passes, batches=some, **options)[0]
        for room, passes in ((ONE, "one"), (SEVERAL // 4, "one"), (None, "two"))
    ]
    assert difference(runs[0], runs[2]) < 1e-12
    assert difference(runs[1], runs[2]) < 1e-12
    assert all(g.count_nonzero() for g in runs[0][0])


def test_what_needs_whole_logits_gets_them() -> None:
    losses = []
    for room in (None, ONE):
        module = objectives()["CEU"]()
        module.adopt(model_with(room), None)
        loss = module.forget_loss(SOME)
        losses.append(torch.stack([loss.detach(), torch.autograd.grad(loss, module.model.hf.model.norm.weight)[0][0]]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)


class Scaled(nn.Linear):
    """Does more than a product."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 0.5 * super().forward(hidden)


def test_heads_that_do_more_have_whole_ones() -> None:
    model = model_with(ONE, tie_word_embeddings=False)
    model.hf.lm_head.__class__ = Scaled
    assert isinstance(given(model).scores, Tensor)
    assert isinstance(given(model_with(ONE, name="gemma2")).scores, Tensor)  # caps its logits


def test_few_logits_are_not_chunked() -> None:
    n = int((SOME["labels"][:, 1:] != -100).sum())
    assert isinstance(given(model_with(4 * VOCAB * n)).scores, Tensor)
    assert isinstance(given(model_with(4 * VOCAB * n - 1)).scores, ChunkedLogits)


def test_the_peak_is_a_fraction() -> None:
    """Of what the forward and backward pass of 512 answer tokens allocates over a vocabulary of 8,192, in float32."""
    vocabulary, n = 8192, 512
    hidden, head, targets = torch.randn(n, 16).requires_grad_(), nn.Linear(16, vocabulary, bias=False), torch.arange(n)

    def peak(make: Any) -> int:
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
            make().sum().backward()
        events = profiler.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), k, e.nbytes()) for k, e in enumerate(events) if e.name() == "[memory]")
        return max(accumulate(size for *_, size in changes))

    logits = 4 * vocabulary * n
    whole = peak(lambda: -nn.functional.cross_entropy(head(hidden), targets, reduction="none"))
    pieces = peak(lambda: ChunkedLogits(hidden, head, targets, logits - 1).token_logps)
    assert whole > 2 * logits
    assert pieces < logits / 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_models(tmp_path)
    penalty = {"weight": 1e4, "target": "length_normalised"}
    whole = train(Job("whole", regularizer=penalty, model="shallow"), 1, tmp_path)
    monkeypatch.setattr("lightning_ssiuu.models.answers.LOGIT_BYTES", ONE)  # the processes are forked
    pieces = run(2, [Job("pieces", strategy, regularizer=penalty, model="shallow")], tmp_path)
    for rank in next(iter(pieces.values())):
        for found, expected in zip(rank["weights"], whole["weights"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
