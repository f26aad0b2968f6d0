"""KLUE: which neurons are chosen, which weights are theirs, and that no other weight ever moves a bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys.models import answer_model, equal, part, random_model
from toys.runs import first_gradients, toy_model, toy_run
from transformers.pytorch_utils import Conv1D

from lightning_ssiuu.models.answers import AnswerModel, Answers
from lightning_ssiuu.models.architectures import ARCHITECTURES, transformer_blocks
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.objectives.klue import (
    KLUE,
    knowledge_neurons,
    mismatched_parts,
    neuron_weights,
    unforgotten_ascent,
)
from lightning_ssiuu.objectives.losses import gradient_ascent
from lightning_ssiuu.regularizers import AttributionRegularizer

UNEQUAL = part([(3, 1), (5, 2), (2, 4)], seed=3)
OPTIMIZERS: dict[str, Any] = {
    "decay": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}


# ---- which neurons -----------------------------------------------------------------------------------------------


def _keep(seen: list[Tensor], _module: Any, args: tuple[Tensor, ...]) -> None:
    seen.append(args[0])


def scores_by_hand(model: AnswerModel, parts: list[Any]) -> Tensor:
    """One example at a time: max over the answer's inputs of z · ∂P/∂z, z the down projection's input; their mean."""
    blocks: list[Any] = transformer_blocks(model.hf)
    total, count = None, 0
    for one in parts:
        for ids, mask, labels in zip(one["input_ids"], one["attention_mask"], one["labels"], strict=True):
            n = int(mask.sum())
            seen: list[Tensor] = []
            keep = partial(_keep, seen)
            handles = [block.mlp.down_proj.register_forward_pre_hook(keep) for block in blocks]
            logits = model.hf(input_ids=ids[None, :n]).logits[0]
            for handle in handles:
                handle.remove()
            where = [k for k in range(n) if labels[k] != -100]
            probability = torch.tensor(1.0, dtype=torch.float64)
            for k in where:
                probability = probability * logits[k - 1].exp()[ids[k]] / logits[k - 1].exp().sum()
            gradients = torch.autograd.grad(probability, seen)
            each = [(z * g)[0, : where[-1]].max(0).values for z, g in zip(seen, gradients, strict=True)]
            total = torch.cat(each) if total is None else total + torch.cat(each)
            count += 1
    assert total is not None
    return total.detach() / count


@pytest.mark.parametrize("alpha", [0.0, 10.0])
def test_the_chosen_are_the_best_by_hand(alpha: float) -> None:
    model = answer_model()
    scores = scores_by_hand(model, [UNEQUAL])
    if alpha:
        scores = scores - alpha * scores_by_hand(model, list(mismatched_parts([UNEQUAL], 2, seed=7)))
    best = set(sorted(range(48), key=lambda i: -scores[i])[:12])
    chosen = knowledge_neurons(model, [UNEQUAL], 0.25, alpha, 2, seed=7)
    assert set(torch.cat([chosen[0], chosen[1]]).nonzero().flatten().tolist()) == best
    assert all(p.grad is None for p in model.parameters())


def test_the_regularisation_changes_the_choice() -> None:
    model = answer_model()
    plain, regularised = (knowledge_neurons(model, [UNEQUAL], 0.25, a, 2, seed=7) for a in (0.0, 10.0))
    assert not equal(plain.values(), regularised.values())


def test_at_least_one_neuron_and_at_most_all() -> None:
    model = answer_model()
    assert sum(int(m.sum()) for m in knowledge_neurons(model, [UNEQUAL], 1e-6, 0, 1, 0).values()) == 1
    assert all(m.all() for m in knowledge_neurons(model, [UNEQUAL], 1.0, 10.0, 5, 0).values())


def pairs(parts: list[Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    found = []
    for one in parts:
        for ids, mask, labels in zip(one["input_ids"], one["attention_mask"], one["labels"], strict=True):
            inside = ids[mask.bool()].tolist()
            answer = labels[labels != -100].tolist()
            assert inside[len(inside) - len(answer) :] == answer
            found.append((tuple(inside[: len(inside) - len(answer)]), tuple(answer)))
    return found


def test_mismatched_questions() -> None:
    true = pairs([UNEQUAL])
    wrong = pairs(list(mismatched_parts([UNEQUAL], 2, seed=0)))
    assert len(set(wrong)) == len(wrong) == 6
    assert {q for q, _ in wrong} <= {q for q, _ in true}
    assert not set(wrong) & set(true)
    for _, answer in true:
        assert len([1 for _, a in wrong if a == answer]) == 2
    assert len(next(mismatched_parts([UNEQUAL], 1, seed=0))["input_ids"]) == 3
    assert len(pairs(list(mismatched_parts([UNEQUAL], 50, seed=0)))) == 6  # there are no more
    alike = {k: v[:1].repeat(2, 1) for k, v in UNEQUAL.items() if k != "example_id"}
    assert not list(mismatched_parts([alike], 5, seed=0))


# ---- which weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neo", "gpt_neox", "falcon", "starcoder2", "gptj"])
def test_a_neuron_s_weights_are_all_it_depends_on_and_all_it_moves(name: str) -> None:
    hf, neuron = random_model(name), 5
    seen: list[Tensor] = []
    blocks = transformer_blocks(hf)
    down: Any = blocks[0].get_submodule(ARCHITECTURES[name].modules["mlp_down"])
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.tensor([[5, 6, 7]])
    named = dict(hf.named_parameters())
    weights_of = {n: d for n, (layer, d) in neuron_weights(hf).items() if layer == 0}
    hf(input_ids=ids)
    with torch.no_grad():
        for n, dimension in weights_of.items():
            named[n].select(dimension, neuron).zero_()
    hf(input_ids=ids)
    hidden, changed = seen
    others = [i for i in range(hidden.shape[-1]) if i != neuron]
    assert torch.equal(hidden[..., others], changed[..., others])  # nobody else's rows
    assert not changed[..., neuron].any()
    weight = down.weight if isinstance(down, Conv1D) else down.weight.T
    assert not weight[neuron].any()
    assert weight[others].all()
    layers = {layer for layer, _ in neuron_weights(hf).values()}
    assert layers == {0, 1}


def test_gate_and_up_of_a_fused_projection_are_a_neuron_s_two_rows() -> None:
    module = KLUE()
    module.adopt(answer_model("phi3"), None)  # type: ignore[arg-type]
    module.neurons = {layer: torch.arange(24) == 5 for layer in range(2)}
    masks = {name: mask for (parameter, mask) in module._masked() for name, p in _named(module) if p is parameter}
    assert masks["model.layers.1.mlp.gate_up_proj.weight"].nonzero()[:, 0].tolist() == [5, 24 + 5]
    assert masks["model.layers.1.mlp.down_proj.weight"].nonzero()[:, -1].tolist() == [5]


def _named(module: KLUE) -> list[tuple[str, Tensor]]:
    return list(module.model.hf.named_parameters())


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_untouched_weights_keep_every_bit(optimizer: str, tmp_path: Path) -> None:
    model = toy_model()
    before = {n: p.detach().clone() for n, p in model.hf.named_parameters()}
    regularizer = AttributionRegularizer(0.5, "relative", target="length_normalised")
    module = KLUE(share=0.2, only_unforgotten=False, optimizer=OPTIMIZERS[optimizer], regularizer=regularizer)
    toy_run(module, tmp_path, steps=3, model=model, gradient_clip_val=0.5)
    of_neurons, n_moved = neuron_weights(model.hf), 0
    for name, parameter in model.hf.named_parameters():
        same = parameter == before[name]
        if name not in of_neurons:
            assert same.all()
            continue
        layer, dimension = of_neurons[name]
        rows = same.movedim(dimension, 0).reshape(same.shape[dimension], -1)
        assert rows[~module.neurons[layer]].all()
        n_moved += int((~rows[module.neurons[layer]]).sum())
    assert n_moved > 100


def test_share_one_is_gradient_difference_on_the_feed_forward_weights(tmp_path: Path) -> None:
    options: dict[str, Any] = {"forget_weight": 0.5, "retain_weight": 2.0}
    ours = first_gradients(KLUE(share=1.0, only_unforgotten=False, **options), tmp_path / "a")
    theirs = first_gradients(GradientDifference(**options), tmp_path / "b")
    assert all(".mlp." in name for name in ours)
    assert len(ours) == 6
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())


def test_masked_gradients(tmp_path: Path) -> None:
    module = KLUE(share=0.2, only_unforgotten=False)
    ours = first_gradients(module, tmp_path / "a")
    theirs = first_gradients(GradientDifference(), tmp_path / "b")
    for name, (layer, dimension) in neuron_weights(module.model.hf).items():
        expected = theirs[name].clone()
        for neuron in (~module.neurons[layer]).nonzero().flatten().tolist():
            expected.select(dimension, neuron).zero_()
        assert torch.equal(ours[name], expected)


# ---- the loss ----------------------------------------------------------------------------------------------------


def test_forgotten_answers_are_left_out() -> None:
    logits = torch.tensor([[3.0, 0, 0], [0, 2.0, 0], [0, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    # sequence 0 gets both tokens right, sequence 1 misses its only one
    answers = Answers(logits, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2)
    e = torch.tensor(1.0, dtype=torch.float64).exp()
    expected = ((e**3 / (e**3 + 2)).log() + (e**2 / (e**2 + 2)).log()) / 2 / 2
    loss = unforgotten_ascent(answers)
    assert abs(loss - expected) < 1e-12
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient[:2].all()
    assert not gradient[2].any()
    assert unforgotten_ascent(answers, only_unforgotten=False) == gradient_ascent(answers)


def test_one_wrong_token_is_enough() -> None:
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    answers = Answers(logits, torch.tensor([0, 1]), torch.tensor([0, 0]), 1)
    assert unforgotten_ascent(answers) == 0


# ---- runs --------------------------------------------------------------------------------------------------------
