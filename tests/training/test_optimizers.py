"""AdamW in one kernel: the weights of torch's own loop, and what a user or a checkpoint says is kept; Muon; signSGD."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from toys.models import bare_trainer, equal, random_model, weights
from toys.training import FewFacts

from lightning_ssiuu import GradientDifference
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.training.optimizers import Muon, fused_where_possible, optimizer_of
from lightning_ssiuu.utils.errors import UserError

SHAPES = [(7, 5), (3,), (2, 3, 4)]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def stepped(optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[Tensor]:
    """The weights after so many steps on gradients that depend on their number alone."""
    weights = optimizer.param_groups[0]["params"]
    for number in range(first, first + steps):
        generator = torch.Generator().manual_seed(1 + number)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_the_weights_are_those_of_the_loop(kind: Any, dtype: torch.dtype, tolerance: float) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    loop = stepped(kind(parameters(dtype), foreach=False, **options), 20)
    fused = fused_where_possible(kind(parameters(dtype), **options))
    assert fused.param_groups[0]["fused"]
    for expected, found in zip(loop, stepped(fused, 20), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


class Own(AdamW):
    """A subclass, which may do anything in its step."""


@pytest.mark.parametrize(
    "made",
    [
        lambda p: AdamW(p, fused=False),
        lambda p: AdamW(p, foreach=True),
        lambda p: AdamW(p, foreach=False),
        lambda p: AdamW(p, differentiable=True),
        lambda p: SGD(p, 0.1),
        lambda p: Own(p),
        lambda p: AdamW([nn.Parameter(torch.empty(2, device="meta"))]),
    ],
    ids=["not fused", "lists", "loop", "differentiable", "SGD", "subclass", "meta"],
)
def test_what_was_chosen_stays(made: Any) -> None:
    optimizer = made(parameters(torch.float32))
    before = copy.deepcopy({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
    assert fused_where_possible(optimizer) is optimizer
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == before


def test_groups_that_come_later_are_fused() -> None:
    optimizer = fused_where_possible(AdamW(parameters(torch.float32)))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]


@pytest.mark.parametrize("began_fused", [False, True])
def test_a_run_goes_on_as_it_began(began_fused: bool) -> None:
    """Also one from before there was a choice: it does not change in the middle."""
    whole, first = (AdamW(parameters(torch.float32), lr=1e-2) for _ in range(2))
    if began_fused:
        fused_where_possible(whole), fused_where_possible(first)
    expected = stepped(whole, 6)
    stepped(first, 3)
    state = copy.deepcopy(first.state_dict())
    resumed = fused_where_possible(AdamW([nn.Parameter(p.detach().clone()) for p in first.param_groups[0]["params"]]))
    resumed.load_state_dict(state)
    assert equal(stepped(resumed, 3, first=3), expected)


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["weights", "adapters"])
def test_fit_takes_it_and_clips_under_mixed_precision(lora: LoRA | None, tmp_path: Path) -> None:
    """Lightning clips no gradients of an optimiser that unscales losses by itself."""
    trainer = bare_trainer(2, default_root_dir=tmp_path, precision="bf16-mixed", gradient_clip_val=0.5)
    module = GradientDifference(lora=lora)
    trainer.fit(module, FewFacts(4))
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is AdamW
    assert optimizer.param_groups[0]["fused"]
    assert all(state["step"] == 2 for state in optimizer.state.values())
    assert len(optimizer.state) == sum(p.requires_grad for p in module.parameters())


# ---- Muon ----------------------------------------------------------------------------------------------------------


def singular(update: Tensor) -> Tensor:
    return torch.linalg.svdvals(update.double())


def test_a_matrix_moves_by_its_momentum_with_equal_singular_values() -> None:
    """The direction is checked against the singular vectors of the momentum, by hand over three steps."""
    weight = nn.Parameter(torch.zeros(12, 5, dtype=torch.float64))
    optimizer, mean = Muon([weight], lr=0.1, momentum=0.8), torch.zeros(12, 5, dtype=torch.float64)
    for step in range(3):
        gradient = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        before, weight.grad = weight.detach().clone(), gradient
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        ahead = 0.2 * gradient + 0.8 * mean
        moved = (before - weight.detach()) / (0.1 * 0.2 * 12**0.5)
        values = singular(moved)
        assert 0.6 < values.min() <= values.max() < 1.3  # the iteration's own spread around one
        u, _, v = torch.linalg.svd(ahead, full_matrices=False)
        assert torch.cosine_similarity(moved.flatten(), (u @ v).flatten(), 0) > 0.97
        assert singular(ahead).max() / singular(ahead).min() > 1.5  # else there was nothing to make equal


def test_all_else_is_adamws() -> None:
    hf = random_model("llama", torch.float32, tie_word_embeddings=False)
    other = random_model("llama", torch.float32, tie_word_embeddings=False)
    muon = optimizer_of(hf, lambda p: Muon(p, lr=1e-2, weight_decay=0.1))
    plain = AdamW(other.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    same = [hf.get_input_embeddings().weight, hf.get_output_embeddings().weight]
    same += [p for p in hf.parameters() if p.ndim == 1]
    for step in range(3):
        for number, pair in enumerate(zip(hf.parameters(), other.parameters(), strict=True)):
            for p in pair:
                generator = torch.Generator().manual_seed(100 * step + number)
                p.grad = torch.randn(p.shape, generator=generator)
        muon.step(), plain.step()
    kept = {id(p) for p in same}
    n_matrices = 0
    for p, q in zip(hf.parameters(), other.parameters(), strict=True):
        if id(p) in kept:
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        else:
            n_matrices += 1
            assert (p - q).abs().max() > 1e-3
    assert n_matrices == 14  # seven in each of two blocks
    assert len(kept) == 7


def test_muon_goes_on_from_its_state() -> None:
    whole, first = (Muon(parameters(torch.float32), lr=1e-2) for _ in range(2))

    def step(optimizer: Muon, seed: int) -> list[Tensor]:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + p.numel()))
        optimizer.step()
        return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]

    for seed in range(4):
        expected = step(whole, seed)
    for seed in range(2):
        middle = step(first, seed)
    again = Muon([nn.Parameter(p) for p in middle], lr=1.0)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(2, 4):
        found = step(again, seed)
    assert equal(found, expected)
    assert [group["lr"] for group in again.param_groups] == [1e-2, 1e-2]


def test_the_learning_rate_of_both_parts_is_scheduled() -> None:
    optimizer = Muon(parameters(torch.float32), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    stepped_once = step_all(optimizer)
    schedule.step()
    assert equal(step_all(optimizer), stepped_once)


def step_all(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    chosen = [p for group in optimizer.param_groups for p in group["params"]]
    for p in chosen:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return [p.detach().clone() for p in chosen]


def test_cut_weights_are_refused() -> None:
    class Cut(nn.Parameter):
        def to_local(self) -> Tensor: ...

    with pytest.raises(UserError, match="optimizer: got 'Muon', allowed: AdamW or SGD where weights are cut"):
        Muon([Cut(torch.ones(2, 2))])


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["weights", "adapters"])
def test_fit_takes_muon(lora: LoRA | None, tmp_path: Path) -> None:
    trainer = bare_trainer(2, default_root_dir=tmp_path, gradient_clip_val=0.5)
    module = GradientDifference(lora=lora, optimizer=lambda p: Muon(p, lr=1e-3))
    module.configure_model()
    before = weights(module)
    trainer.fit(module, FewFacts(4))
    (optimizer,) = trainer.optimizers
    matrices, rest = optimizer.param_groups
    assert {p.ndim for p in matrices["params"]} == {2}
    embedding = module.model.hf.get_input_embeddings().weight
    assert any(p is embedding for p in rest["params"]) == (lora is None)
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert moved == [p.requires_grad for p in module.parameters()]


# ---- signSGD -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_without_memory_is_sign_sgd(dtype: torch.dtype) -> None:
    """What recipes/optimizer/signsgd.yaml is made of; gradients down to 1e-10 move a weight as large ones do."""
    chosen = parameters(dtype)
    before = [p.detach().clone() for p in chosen]
    optimizer = fused_where_possible(Adam(chosen, lr=1e-2, betas=(0.0, 0.0), eps=1e-15))
    for step in range(2):
        for p in chosen:
            generator = torch.Generator().manual_seed(step)
            p.grad = torch.randn(p.shape, generator=generator).to(dtype) * 10.0 ** (-10 * step)
            p.grad.view(-1)[0] = 0.0
            before = [b - 1e-2 * p.grad.sign() if p is q else b for b, q in zip(before, chosen, strict=True)]
        optimizer.step()
    for expected, found in zip(before, chosen, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
