"""RMU: both losses by hand, what trains, one forward pass, hooks that never stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys.models import RECORDED, answer_model, distance, part
from toys.runs import first_gradients, toy_model, toy_run

from lightning_ssiuu.models.answers import AnswerModel, Answers
from lightning_ssiuu.models.architectures import transformer_blocks
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives.rmu import RMU, hidden_mse, random_direction, reference_hidden
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.training.reference import LiveReference
from lightning_ssiuu.utils.errors import UserError

UNEQUAL = part([(3, 1), (5, 2), (2, 4)], seed=3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_SSIUU_CACHE", str(tmp_path / "cache"))


def rmu(**kwargs: Any) -> RMU:
    module = RMU(layer=1, **kwargs)
    module.adopt(answer_model(num_hidden_layers=3), None)  # type: ignore[arg-type]
    return module


def hidden_by_hand(model: AnswerModel, one: dict[str, Tensor], row: int, layer: int = 1) -> list[Tensor]:
    """Unpadded, one example: the block's output where each answer token is predicted from."""
    n = int(one["attention_mask"][row].sum())
    states = model.hf(input_ids=one["input_ids"][row : row + 1, :n], output_hidden_states=True).hidden_states
    return [states[layer + 1][0, k - 1] for k in range(n) if one["labels"][row, k] != -100]


def loss_by_hand(model: AnswerModel, one: dict[str, Tensor], target: Any) -> Tensor:
    """``target(row, token number)``: a vector."""
    total = torch.tensor(0.0, dtype=torch.float64)
    for row in range(len(one["input_ids"])):
        states = hidden_by_hand(model, one, row)
        per_token = [((h - target(row, t)) ** 2).sum() / len(h) for t, h in enumerate(states)]
        total = total + sum(per_token) / len(per_token)
    return total / len(one["input_ids"])


def trained(module: RMU) -> list[Any]:
    return [p for p in module.parameters() if p.requires_grad]


def test_forget_loss_and_gradient_by_hand() -> None:
    module = rmu(coefficient=5.0, seed=4)
    u = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = loss_by_hand(module.model, UNEQUAL, lambda row, t: 5.0 * u / (u @ u) ** 0.5)
    loss = module.forget_loss(UNEQUAL)
    assert abs(loss - expected) < 1e-12
    assert distance(torch.autograd.grad(loss, trained(module)), torch.autograd.grad(expected, trained(module))) < 1e-12


def test_retain_loss_and_gradient_by_hand() -> None:
    module, original = rmu(), answer_model(num_hidden_layers=3, seed=9)
    module._reference = LiveReference(original, module.references())
    with torch.no_grad():
        before = [hidden_by_hand(original, UNEQUAL, row) for row in range(3)]
    expected = loss_by_hand(module.model, UNEQUAL, lambda row, t: before[row][t])
    loss = module.retain_loss(UNEQUAL)
    assert abs(loss - expected) < 1e-12
    assert distance(torch.autograd.grad(loss, trained(module)), torch.autograd.grad(expected, trained(module))) < 1e-12


def test_nothing_to_do_where_the_hidden_states_are_the_target() -> None:
    answers = Answers(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2)
    c = 7.0 * random_direction(8, seed=0)
    assert hidden_mse(c.repeat(3, 1), c, answers) == 0
    # unequal lengths: the short sequence weighs as much as the long one
    off = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).unsqueeze(1)
    assert abs(hidden_mse(c + off, c, answers) - 0.5) < 1e-12


def test_the_direction_is_the_seed_s_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = random_direction(16, seed=3)
        state = torch.get_rng_state()
        torch.manual_seed(2)
        assert torch.equal(first, random_direction(16, seed=3))
        assert not torch.equal(first, random_direction(16, seed=4))
        torch.manual_seed(1)
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("layers_to_train", [1, 3, None])
def test_what_trains_has_a_gradient_and_all_else_is_frozen(name: str, layers_to_train: int | None) -> None:
    module = RMU(layer=0, layers_to_train=layers_to_train)
    tied = {} if name == "gpt2" else {"tie_word_embeddings": False}
    module.adopt(answer_model(name, **tied), None)  # type: ignore[arg-type]
    module.forget_loss(UNEQUAL).backward()
    has_gradient = {n for n, p in module.named_parameters() if p.grad is not None}
    assert has_gradient == {n for n, p in module.named_parameters() if p.requires_grad}
    embedding = module.model.hf.get_input_embeddings().weight
    assert embedding.requires_grad == (layers_to_train is None)
    inside = {id(p) for p in transformer_blocks(module.model.hf)[0].parameters()}
    assert all(p.requires_grad for p in module.parameters() if id(p) in inside)


@pytest.mark.parametrize(
    ("n_blocks", "layer", "count", "expected"),
    [(8, None, 2, {6, 7}), (8, 5, 3, {3, 4, 5}), (8, 1, 3, {0, 1}), (7, None, 1, {3}), (2, None, None, {0, 1})],
)
def test_which_blocks_train(n_blocks: int, layer: int | None, count: int | None, expected: set[int]) -> None:
    module = RMU(layer=layer, layers_to_train=count)
    module.adopt(answer_model(num_hidden_layers=n_blocks), None)  # type: ignore[arg-type]
    blocks = transformer_blocks(module.model.hf)
    assert {i for i, b in enumerate(blocks) if all(p.requires_grad for p in b.parameters())} == expected
    assert module.block == max(expected)  # the paper's 7 where there is one, else the middle


def hooks(model: AnswerModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_hooks_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    module = rmu()
    before = hooks(module.model)
    module.forget_loss(UNEQUAL)
    assert hooks(module.model) == before
    monkeypatch.setattr(transformer_blocks(module.model.hf)[2], "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.forget_loss(UNEQUAL)
    assert hooks(module.model) == before


@pytest.mark.parametrize("wrapped", [False, True])
def test_one_forward_pass_per_part_and_step(wrapped: bool, tmp_path: Path) -> None:
    model, passes = toy_model(), []
    module = SSIUU(backbone=RMU(reference="second_model")) if wrapped else RMU(reference="second_model")
    model.register_forward_hook(lambda it, *_: passes.append((it is model, it.training)))
    toy_run(module, tmp_path, steps=2, model=model)
    # forget, retain; the second model is a copy, hook and all
    assert passes.count((True, True)) == 2 * 2
    assert passes.count((False, False)) == 2


def test_the_retain_loss_is_zero_at_the_start(tmp_path: Path) -> None:
    both = first_gradients(RMU(retain_weight=100.0), tmp_path)
    alone = first_gradients(RMU(retain_weight=0.0), tmp_path)
    assert distance(list(both.values()), list(alone.values())) < 1e-12  # the values were kept in other batches


def test_stored_values_of_another_layer_are_not_taken() -> None:
    names = []
    for layer in (0, 1):
        module = RMU(layer=layer)
        module.adopt(answer_model(), None)  # type: ignore[arg-type]
        names += list(module.references())
    assert len(set(names)) == 2
    assert not RMU(retain_weight=0.0).references()
    values, counts = reference_hidden(1)(answer_model(), UNEQUAL)
    assert values.shape == (7, 16)
    assert counts is not None
    assert counts.tolist() == [1, 2, 4]


def test_adapters_of_the_chosen_blocks_train(tmp_path: Path) -> None:
    model = toy_model(num_hidden_layers=3)
    module = RMU(layer=1, layers_to_train=1, lora=LoRA(r=2), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    module.lora.attach(model.hf)  # type: ignore[union-attr]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    toy_run(module, tmp_path, steps=2, model=model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("layers.1." in n and "lora" in n for n in moved)


@pytest.mark.parametrize("layer", [-1, 2])
def test_no_such_block(layer: int) -> None:
    with pytest.raises(UserError, match="layer"):
        RMU(layer=layer).adopt(answer_model(), None)  # type: ignore[arg-type]
