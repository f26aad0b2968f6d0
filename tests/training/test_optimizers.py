"""AdamW in one kernel: the weights of torch's own loop, and what a user or a checkpoint says is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from toys.models import bare_trainer, equal
from toys.training import FewFacts

from lightning_ssiuu import GradientDifference
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.training.optimizers import fused_where_possible

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
