"""CIR: common directions, collapsed weight gradients by hand, layers that are as they were afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.losses import projector_by_hand
from toys.models import answer_model, distance, equal, part, random_model
from toys.runs import first_batch, first_gradients, toy_data, toy_model, toy_run
from transformers.pytorch_utils import Conv1D

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.objectives.cir import (
    CIR,
    CollapsedLinear,
    collapsed,
    common_directions,
    find_common_directions,
    linear_layers,
    without,
)
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.objectives.losses import gradient_ascent
from lightning_ssiuu.objectives.npo import NPO
from lightning_ssiuu.objectives.rmu import RMU
from lightning_ssiuu.regularizers import Regularizer

UNEQUAL = part([(3, 1), (5, 2), (2, 4)], seed=3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_SSIUU_CACHE", str(tmp_path / "cache"))


def rows(n: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(3.0, 0.1, width, dtype=torch.float64)
    mix = torch.randn(width, width, dtype=torch.float64, generator=generator)
    return torch.randn(n, width, dtype=torch.float64, generator=generator) * spread @ mix + 1.0


# ---- directions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("components", [1, 2, 4])
def test_common_directions_span_mean_and_principal_components(components: int) -> None:
    values = rows(50, 16)
    basis = common_directions(values, components)
    assert basis.shape == (components + 1, 16)
    torch.testing.assert_close(basis @ basis.T, torch.eye(components + 1, dtype=torch.float64))
    torch.testing.assert_close(basis.T @ basis, projector_by_hand(values, components), rtol=0, atol=1e-10)
    assert without(values.mean(0, keepdim=True), basis).abs().max() < 1e-10


def test_limits_of_common_directions() -> None:
    assert common_directions(rows(50, 16), 0).shape == (0, 16)
    assert common_directions(rows(50, 16), 999).shape == (5, 16)  # a quarter of the width, and the mean
    assert common_directions(torch.zeros(9, 16), 3).shape == (0, 16)
    twice = rows(1, 16).repeat(4, 1)
    assert common_directions(twice, 3).shape == (1, 16)  # one direction, however often it is there
    torch.testing.assert_close(common_directions(twice, 3)[0].abs(), (twice[0] / twice[0].norm()).abs())
    values = rows(3, 16)
    assert torch.equal(without(values, common_directions(values, 0)), values)


# ---- the layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_weight_gradient_by_hand(transposed: bool) -> None:
    x, weight, bias = rows(6, 8).view(2, 3, 8), rows(5, 8, seed=1), rows(1, 5, seed=2)[0]
    of_inputs, of_gradients = common_directions(rows(20, 8, seed=3), 2), common_directions(rows(20, 5, seed=4), 1)
    weight = (weight.T.contiguous() if transposed else weight).requires_grad_()
    x, bias, push = x.requires_grad_(), bias.requires_grad_(), rows(6, 5, seed=5).view(2, 3, 5)
    usual = torch.autograd.grad((x @ (weight if transposed else weight.T) + bias), [x, weight, bias], push)
    output = CollapsedLinear.apply(x, weight, bias, of_inputs, of_gradients, transposed)
    ours = torch.autograd.grad(output, [x, weight, bias], push)
    expected = torch.zeros(5, 8, dtype=torch.float64)
    for a, g in zip(x.detach().view(6, 8), push.view(6, 5), strict=True):
        for b in of_inputs:
            a = a - (a @ b) * b
        for b in of_gradients:
            g = g - (g @ b) * b
        expected += torch.outer(g, a)
    torch.testing.assert_close(ours[1], expected.T if transposed else expected, rtol=0, atol=1e-10)
    assert distance([ours[1]], [usual[1]]) > 0.1
    torch.testing.assert_close(ours[0], usual[0])
    torch.testing.assert_close(ours[2], usual[2])


def test_bfloat16_is_widened() -> None:
    layer = nn.Linear(8, 8).bfloat16()
    empty = torch.zeros(0, 8, dtype=torch.float64)
    CollapsedLinear.apply(torch.ones(3, 8).bfloat16(), layer.weight, layer.bias, empty, empty, False).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.bfloat16
    assert (layer.weight.grad == 3).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_layers_compute_the_same_and_are_as_before_afterwards(name: str) -> None:
    hf = random_model(name)
    names = linear_layers(hf, attention=True)
    assert len(names) == len(set(names))
    layers: list[Any] = [hf.get_submodule(n) for n in names]
    sizes = [(m.nx, m.nf) if isinstance(m, Conv1D) else (m.in_features, m.out_features) for m in layers]
    bases = {
        n: (common_directions(rows(9, i), 2), common_directions(rows(9, o, seed=1), 2))
        for n, (i, o) in zip(names, sizes, strict=True)
    }
    ids = torch.tensor([[5, 6, 7]])
    expected = hf(input_ids=ids).logits
    with collapsed(hf, bases):
        torch.testing.assert_close(hf(input_ids=ids).logits, expected, rtol=0, atol=1e-12)
    with pytest.raises(ZeroDivisionError), collapsed(hf, bases):
        _ = 1 / 0
    assert not any("forward" in vars(m) for m in hf.modules())


# ---- the objective -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [False, True])
def test_zero_components_are_the_backbone(attention: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"forget_weight": 0.5, "retain_weight": 2.0}
    none: dict[str, Any] = {"input_components": 0, "gradient_components": 0}
    ours = first_gradients(CIR(attention=attention, **none, **options), tmp_path / "a")
    theirs = first_gradients(GradientDifference(**options), tmp_path / "b")
    assert len(ours) == (14 if attention else 6)
    assert all(name.endswith("_proj.weight") for name in ours)
    assert distance(list(ours.values()), [theirs[name] for name in ours]) < 1e-14


def activations_by_hand(model: AnswerModel, parts: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and output gradients of −NLL, summed over sequences, example by example: the answers' input tokens."""
    names = linear_layers(model.hf)
    inputs: dict[str, list[Tensor]] = {n: [] for n in names}
    gradients: dict[str, list[Tensor]] = {n: [] for n in names}
    for one in parts:
        for ids, mask, labels in zip(one["input_ids"], one["attention_mask"], one["labels"], strict=True):
            n = int(mask.sum())
            seen: list[tuple[Tensor, Tensor]] = []
            handles = [
                model.hf.get_submodule(m).register_forward_hook(lambda _, args, out, s=seen: s.append((args[0], out)))
                for m in names
            ]
            logps = model.hf(input_ids=ids[None, :n]).logits[0].log_softmax(-1)
            for handle in handles:
                handle.remove()
            where = [k for k in range(n) if labels[k] != -100]
            loss = sum(logps[k - 1, ids[k]] for k in where) / len(where)
            pushed = torch.autograd.grad(loss, [out for _, out in seen])
            for m, (a, _), g in zip(names, seen, pushed, strict=True):
                inputs[m].append(a[0, : where[-1]].detach())
                gradients[m].append(g[0, : where[-1]])
    return {m: torch.cat(v) for m, v in inputs.items()}, {m: torch.cat(v) for m, v in gradients.items()}


def test_the_first_step_by_hand(tmp_path: Path) -> None:
    ours = first_gradients(CIR(input_components=2, gradient_components=3, retain_weight=0.0), tmp_path)
    model, data = toy_model(), toy_data()
    data.setup("fit")
    dataset: Any = data.train_dataloader().dataset
    everything = data.train_dataloader().collate_fn([dataset["forget", i] for i in range(5)])["forget"]
    inputs, gradients = activations_by_hand(model, [everything])
    a, g = activations_by_hand(model, [one := first_batch()["forget"]])
    for name in linear_layers(model.hf):
        kept_in = torch.eye(inputs[name].shape[1]) - projector_by_hand(inputs[name], 2)
        kept_out = torch.eye(gradients[name].shape[1]) - projector_by_hand(gradients[name], 3)
        usual = g[name].T @ a[name] / len(one["input_ids"])  # the loss is a mean over sequences
        assert distance([ours[f"{name}.weight"]], [kept_out @ usual @ kept_in]) < 1e-8
        assert distance([ours[f"{name}.weight"]], [usual]) > 1e-2


def test_the_retain_gradient_is_left_whole(tmp_path: Path) -> None:
    ours = first_gradients(CIR(forget_weight=0.0), tmp_path / "a")
    theirs = first_gradients(GradientDifference(forget_weight=0.0), tmp_path / "b")
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())


def test_directions_do_not_depend_on_how_the_batches_are_cut() -> None:
    model = answer_model()

    def find(parts: list[Any]) -> dict[str, Tensor]:
        def loss(one: Any) -> Tensor:
            return gradient_ascent(model(one["input_ids"], one["attention_mask"], one["labels"]))

        bases = find_common_directions(model, loss, parts, linear_layers(model.hf), 2, 2)
        return {f"{n} {i}": basis.T @ basis for n, pair in bases.items() for i, basis in enumerate(pair)}

    two_and_one = [{name: value[rows] for name, value in UNEQUAL.items()} for rows in (slice(2), slice(2, 3))]
    whole, cut = find([UNEQUAL]), find(two_and_one)
    assert len(whole) == 12
    assert distance(list(cut.values()), list(whole.values())) < 1e-9
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_do_not_stay_when_the_loss_fails() -> None:
    model = answer_model()
    with pytest.raises(ZeroDivisionError):
        find_common_directions(model, lambda _: 1 / 0, [UNEQUAL], linear_layers(model.hf), 2, 2)  # type: ignore[arg-type,return-value]
    assert not any(m._forward_hooks for m in model.modules())


class Looking(Regularizer):
    """Keeps the gradient that a regulariser takes."""

    def collect(self, model: nn.Module, answers: Any, part: Any) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.seen = torch.autograd.grad(answers.logps.sum(), trained, retain_graph=True)

    def apply(self, model: nn.Module) -> dict[str, float]:
        return {}


def test_the_regulariser_sees_ordinary_gradients(tmp_path: Path) -> None:
    ours, theirs = Looking(), Looking()
    first_gradients(CIR(regularizer=ours), tmp_path / "a")
    plain = CIR(regularizer=theirs, input_components=0, gradient_components=0)
    first_gradients(plain, tmp_path / "b")
    assert equal(ours.seen, theirs.seen)


@pytest.mark.parametrize("make", [lambda: NPO(), lambda: RMU(layer=0)], ids=["NPO", "RMU"])
def test_other_backbones(make: Any, tmp_path: Path) -> None:
    backbone = make()
    gradients = first_gradients(CIR(backbone=backbone, input_components=2, gradient_components=2), tmp_path)
    assert len(gradients) == (3 if isinstance(backbone, RMU) else 6)  # what the loss reaches
    assert all(gradient.any() for gradient in gradients.values())


def test_how_often_directions_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def take(*_: Any) -> dict[str, Any]:
        taken.append(module.current_epoch)
        return {}

    monkeypatch.setattr("lightning_ssiuu.objectives.cir.find_common_directions", take)
    for every, expected in ((1, [0, 1, 2, 3]), (2, [0, 2])):
        taken.clear()
        module = CIR(every_n_epochs=every, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        toy_run(module, tmp_path, steps=12)
        assert taken == expected
