"""RepSelect: the collapse by eigenvectors, the gradient with adapters that are really there, a straight way."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.losses import log_probability, mean, predictions
from toys.models import distance, equal, norm, weights
from toys.runs import first_gradients, toy_data, toy_model, toy_run

from lightning_ssiuu.objectives.cir import linear_layers
from lightning_ssiuu.objectives.repselect import RepSelect, soft_collapse


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


# ---- the collapse ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
@pytest.mark.parametrize("components", [1, 2, 4])
def test_leading_components_shrink_on_both_sides(shape: tuple[int, int], components: int) -> None:
    """By eigenvectors of G Gᵀ and Gᵀ G, one component after the other."""
    g = matrix(*shape)
    values, left = torch.linalg.eigh(g @ g.T)
    order = values.argsort(descending=True)[:components]
    sizes, expected = values[order].sqrt(), g.clone()
    for k, size in zip(order, sizes, strict=True):
        u = left[:, k]
        v = g.T @ u / size
        expected += (sizes[-1] ** 2 / size - size) * torch.outer(u, v)
    found = soft_collapse(g, g, components)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    if components > 1:
        assert distance([found], [g]) > 0.01


def test_directions_of_another_matrix() -> None:
    g, r = matrix(24, 16), matrix(24, 16, seed=1)
    u, s, vh = torch.linalg.svd(r)
    expected = g.clone()
    for k in range(3):
        expected = expected - (1 - s[2] / s[k]) * torch.outer(expected @ vh[k], vh[k])
    for k in range(3):
        expected = expected - (1 - s[2] / s[k]) * torch.outer(u[:, k], expected.T @ u[:, k])
    torch.testing.assert_close(soft_collapse(g, r, 3), expected, rtol=0, atol=1e-12)


def test_limits_of_the_collapse() -> None:
    g = matrix(24, 16)
    for components in (0, 1):  # the first is as large as the smallest of the first
        torch.testing.assert_close(soft_collapse(g, g, components), g, rtol=0, atol=1e-12)
    assert equal([soft_collapse(g, g, 999)], [soft_collapse(g, g, 4)])  # a quarter of the smaller side
    single = torch.outer(g[:, 0], g[0])
    torch.testing.assert_close(soft_collapse(single, single, 4), single, rtol=0, atol=1e-12)
    assert not soft_collapse(torch.zeros_like(g), torch.zeros_like(g), 4).any()


# ---- the gradient ----------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A feed-forward layer beside its low-rank adversary."""

    def __init__(self, layer: Any, transposed: bool, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        n_in, n_out = layer.weight.shape if transposed else layer.weight.T.shape
        self.a = nn.Parameter(((2 * torch.rand(rank, n_in, generator=generator) - 1) / math.sqrt(n_in)).double())
        self.b = nn.Parameter(torch.zeros(n_out, rank, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.a.T @ self.b.T


def nll(hf: nn.Module, part: dict[str, Tensor]) -> Tensor:
    return -mean([log_probability(tokens) / len(tokens) for tokens in predictions(hf, part)])


def parts(name: str, size: int) -> list[dict[str, Tensor]]:
    data = toy_data()
    data.setup("fit")
    loader = data.train_dataloader()
    dataset: Any = loader.dataset
    examples = [dataset[name, i] for i in range({"forget": 5, "retain": 7}[name])]
    return [loader.collate_fn(examples[i : i + size])[name] for i in range(0, len(examples), size)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("directions", ["forget", "retain"])
def test_the_direction_by_hand(name: str, directions: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"adversary_lr": 2.0, "adversary_rank": 3, "adversary_epochs": 2, "retain_weight": 0.0}
    module = RepSelect(
        components=3, adversary_batch_size=2, directions=directions, seed=4, forget_weight=0.5, **options
    )
    ours = first_gradients(module, tmp_path, model=toy_model(name))
    model: Any = toy_model(name)
    hf = copy.deepcopy(model.hf)
    names = [f"{layer}.weight" for layer in linear_layers(hf)]
    trained = [hf.get_parameter(n) for n in names]
    everything = parts("forget", 5)[0]
    start = torch.autograd.grad(nll(hf, parts("retain", 7)[0]), trained)
    at_start = torch.autograd.grad(-nll(hf, everything), trained)
    generator, adversaries = torch.Generator().manual_seed(4), []
    for n in (n for n, _ in list(hf.named_parameters()) if n in names):  # in the model's order
        path = n.removesuffix(".weight")
        adversaries.append(Adapted(hf.get_submodule(path), name == "gpt2", 3, generator))
        parent, _, child = path.rpartition(".")
        setattr(hf.get_submodule(parent), child, adversaries[-1])
    learning = [p for adversary in adversaries for p in (adversary.a, adversary.b)]
    before = nll(hf, everything).item()
    for _ in range(2):
        for part in parts("forget", 2):
            gradients = torch.autograd.grad(nll(hf, part), learning)
            with torch.no_grad():
                for p, g in zip(learning, gradients, strict=True):
                    p -= 2.0 * g
    assert nll(hf, everything).item() < before - 0.1
    gradients = torch.autograd.grad(-nll(hf, everything), trained)
    others = gradients if directions == "forget" else start
    expected = [soft_collapse(g, r, 3) for g, r in zip(gradients, others, strict=True)]
    scale = 0.5 / norm(expected)
    assert distance([ours[n] for n in names], [g * scale for g in expected]) < 1e-9
    assert distance([g / norm(gradients) for g in gradients], [g / norm(at_start) for g in at_start]) > 1e-2


def test_without_adversary_and_collapse_it_is_the_forget_gradient(tmp_path: Path) -> None:
    module = RepSelect(components=0, adversary_lr=0.0, retain_weight=0.0)
    ours = first_gradients(module, tmp_path)
    hf = toy_model().hf
    gradients = torch.autograd.grad(-nll(hf, parts("forget", 5)[0]), [hf.get_parameter(name) for name in ours])
    assert distance(list(ours.values()), [g / norm(gradients) for g in gradients]) < 1e-10
    assert set(ours) == {f"{layer}.weight" for layer in linear_layers(hf)}


# ---- the way -------------------------------------------------------------------------------------------------------


def test_the_way_is_straight_and_a_step_has_the_length_of_the_rate(tmp_path: Path) -> None:
    start = weights(toy_model())
    module = RepSelect(retain_weight=0.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    one = weights(toy_run(module, tmp_path / "a", steps=1).model)
    module = RepSelect(retain_weight=0.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    four = weights(toy_run(module, tmp_path / "b", steps=4).model)
    moved = [a - b for a, b in zip(one, start, strict=True)]
    assert abs(norm(moved) - 0.1) < 1e-12
    assert distance([a - b for a, b in zip(four, start, strict=True)], [4 * m for m in moved]) < 1e-12


def test_the_retain_gradient_is_added_at_the_models_own_weights(tmp_path: Path) -> None:
    with_retain = first_gradients(RepSelect(retain_weight=2.0), tmp_path / "a")
    without = first_gradients(RepSelect(retain_weight=0.0), tmp_path / "b")
    only = first_gradients(RepSelect(forget_weight=0.0, retain_weight=2.0), tmp_path / "c")
    added = [a - b for a, b in zip(with_retain.values(), without.values(), strict=True)]
    assert distance(added, list(only.values())) < 1e-10
