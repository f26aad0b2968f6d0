"""Elicited unlearning: its steps against copies of the weights and Adam by hand, its halves, its limits."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from toys.adversarial import LENGTHS, AtStep, a_batch, gradient, nll, plus, trained, value_at
from toys.data import Toy
from toys.models import answer_model, bare_trainer, distance, equal, part, weights

from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives.elicited_unlearning import ElicitedUnlearning
from lightning_ssiuu.objectives.gradient_difference import GradientDifference

LR = 0.02


def at_step(module: ElicitedUnlearning, step: int) -> ElicitedUnlearning:
    module._trainer = AtStep(step)  # type: ignore[assignment]
    return module


def halves(module: ElicitedUnlearning, step: int) -> tuple[list[int], list[int]]:
    learned, rest = at_step(module, step).divided(part(LENGTHS))
    return learned.tolist(), rest.tolist()


def a_module(**options: Any) -> ElicitedUnlearning:
    given: dict[str, Any] = {"adversary_lr": LR, "fork_every_n_steps": 2, "floor": None, "seed": 5}
    return ElicitedUnlearning(GradientDifference(forget_weight=0.7, retain_weight=2.0), **(given | options))


class Adam:
    """By hand, with torch's defaults."""

    def __init__(self, like: list[Tensor]) -> None:
        self.at, self.first, self.second = ([torch.zeros_like(t) for t in like] for _ in range(3))
        self.n = 0

    def step(self, gradients: list[Tensor]) -> None:
        self.n += 1
        self.first = [0.9 * m + 0.1 * g for m, g in zip(self.first, gradients, strict=True)]
        self.second = [0.999 * v + 0.001 * g * g for v, g in zip(self.second, gradients, strict=True)]
        for at, m, v in zip(self.at, self.first, self.second, strict=True):
            at -= LR * (m / (1 - 0.9**self.n)) / ((v / (1 - 0.999**self.n)).sqrt() + 1e-8)


@pytest.mark.parametrize("floor", [False, True])
def test_its_steps(floor: bool) -> None:
    """Three steps, of which the last begins with a new adversary."""
    model, lr = answer_model(tie_word_embeddings=False), 0.1
    batches = [a_batch(seed) for seed in range(3)]
    module = a_module()
    level = None
    at = weights(model)
    expected = []
    for step, one in enumerate(batches):
        if step % 2 == 0:
            adversary = Adam(at)
        learned, rest = halves(module, step)
        assert learned
        assert len(rest) > 1
        u = module.strength()
        assert 0 < u < 1
        there = plus(at, adversary.at, u)
        if floor:
            values = {row: 100 * math.exp(-value_at(model, there, nll(one["forget"], [row]))) for row in rest}
            if level is None:  # between the two least probable ones of the first step
                level = sum(sorted(values.values())[:2]) / 2
            rest = [row for row in rest if values[row] >= level]
        ascent = gradient(model, there, nll(one["forget"], rest)) if rest else [torch.zeros_like(w) for w in at]
        learning = gradient(model, plus(at, adversary.at), nll(one["forget"], learned))
        update = plus([2.0 * k for k in gradient(model, at, nll(one["retain"], [0, 1]))], ascent, -0.7)
        adversary.step(learning)
        expected.append(update)
        at = plus(at, update, -lr)
    end, got = trained(a_module(floor=level), batches, copy.deepcopy(model), lr)
    for ours, reference in zip(got, expected, strict=True):
        assert distance(ours, reference) < 1e-9
    assert distance(weights(end), at) < 1e-10


def test_full_strength_is_the_adversary_itself() -> None:
    always, never = a_module(full_strength=1.0), a_module()
    assert [at_step(always, step).strength() for step in range(5)] == [1.0] * 5
    drawn = [at_step(never, step).strength() for step in range(200)]
    assert 0 < min(drawn) < 0.05
    assert 0.95 < max(drawn) < 1
    assert abs(sum(drawn) / 200 - 0.5) < 0.06
    some = [at_step(a_module(full_strength=0.3), step).strength() == 1.0 for step in range(300)]
    assert 60 < sum(some) < 120


def test_halves_last_as_long_as_the_adversary() -> None:
    module = a_module(fork_every_n_steps=5)
    seen = set()
    for fork in range(8):
        learned, rest = halves(module, 5 * fork)
        assert sorted(learned + rest) == [0, 1, 2, 3, 4]
        assert all(halves(module, 5 * fork + later) == (learned, rest) for later in range(1, 5))
        seen.add(tuple(learned))
    assert len(seen) > 4
    shares = [sum(len(halves(a_module(adversary_share=s, seed=n), 0)[0]) for n in range(60)) / 300 for s in (0.2, 0.8)]
    assert shares[0] < 0.3 < 0.7 < shares[1]


def test_without_an_adversary_it_is_the_backbone_on_half_of_each_batch() -> None:
    one, model = a_batch(0), answer_model(tie_word_embeddings=False)
    module = a_module(adversary_lr=0.0)
    _, rest = halves(module, 0)
    half = {"forget": {name: value[rest] for name, value in one["forget"].items()}, "retain": one["retain"]}
    reference = GradientDifference(forget_weight=0.7, retain_weight=2.0)
    expected, _ = trained(reference, [half, half], copy.deepcopy(model))
    got, _ = trained(a_module(adversary_lr=0.0), [one, one], copy.deepcopy(model))
    assert distance(weights(got), weights(expected)) < 1e-13


def test_mismatched_pairs_are_held_up_at_the_model_itself() -> None:
    one, model = a_batch(0), answer_model(tie_word_embeddings=False)
    module = at_step(a_module(), 0)
    _, rest = halves(module, 0)
    pairs = module.mismatched(one["forget"])
    assert pairs is not None
    assert len(pairs["input_ids"]) == len(rest)
    own = {tuple(label[label != -100].tolist()) for label in one["forget"]["labels"]}
    for row, place in enumerate(rest):
        n_prompt = LENGTHS[place][0]
        label = pairs["labels"][row]
        assert (label[:n_prompt] == -100).all()
        assert torch.equal(pairs["input_ids"][row, :n_prompt], one["forget"]["input_ids"][place, :n_prompt])
        answer = tuple(label[label != -100].tolist())
        assert answer != tuple(one["forget"]["labels"][place][one["forget"]["labels"][place] != -100].tolist())
        assert any(answer == whole[: len(answer)] for whole in own)
    assert pairs["input_ids"].shape[1] <= one["forget"]["input_ids"].shape[1]

    _, (without,) = trained(a_module(), [one], copy.deepcopy(model), lr=0.0)
    _, (got,) = trained(a_module(mismatched_weight=3.0), [one], copy.deepcopy(model), lr=0.0)
    held = gradient(model, weights(model), nll(pairs, list(range(len(rest)))))
    assert distance(got, plus(without, held, 3.0)) < 1e-10


def test_mismatched_pairs_are_held_no_higher_than_the_floor() -> None:
    one, model = a_batch(0), answer_model(tie_word_embeddings=False)
    _, rest = halves(at_step(a_module(), 0), 0)
    pairs = at_step(a_module(), 0).mismatched(one["forget"])
    assert pairs is not None
    each = [value_at(model, weights(model), nll(pairs, [row])) for row in range(len(rest))]
    level = 100 * math.exp(-(min(each) + max(each)) / 2)  # some lie above it, some below
    low = [row for row, value in enumerate(each) if value > -math.log(level / 100)]
    assert 0 < len(low) < len(rest)
    _, (without,) = trained(a_module(floor=level), [one], copy.deepcopy(model), lr=0.0)
    _, (got,) = trained(a_module(floor=level, mismatched_weight=3.0), [one], copy.deepcopy(model), lr=0.0)
    held = gradient(model, weights(model), nll(pairs, low))
    assert distance(got, plus(without, held, 3.0 * len(low) / len(rest))) < 1e-10


def test_a_single_row_has_nothing_to_exchange() -> None:
    batches = [{"forget": part([(3, 2)]), "retain": part([(4, 2)], 1)}]
    expected, _ = trained(a_module(), batches)
    got, _ = trained(a_module(mismatched_weight=3.0), batches)
    assert equal(weights(got), weights(expected))


def test_micro_batches_share_the_adversary() -> None:
    """What one batch of all rows gives, where the halves are equally large in both."""
    module = a_module()
    learned, rest = halves(module, 0)
    order = [rest[0], learned[0]], [rest[1], learned[1]]
    forget = part(LENGTHS)
    pieces = [{name: value[rows] for name, value in forget.items()} for rows in order]
    retain = [part([(4, 2)], 1), part([(3, 4)], 2)]
    joined = {name: torch.cat([piece[name] for piece in pieces]) for name in forget}
    small = [{"forget": f, "retain": r} for f, r in zip(pieces, retain, strict=True)]
    _, together = trained(a_module(), small * 2, lr=0.1, max_steps=2, accumulate_grad_batches=2)

    class Whole(ElicitedUnlearning):
        def retain_loss(self, batch: Any) -> Tensor:
            return sum(super(Whole, self).retain_loss(piece) for piece in retain) / 2

    whole = Whole(
        GradientDifference(forget_weight=0.7, retain_weight=2.0), LR, fork_every_n_steps=2, floor=None, seed=5
    )
    _, expected = trained(whole, [{"forget": joined, "retain": retain[0]}] * 2, lr=0.1)
    for ours, reference in zip(together, expected, strict=True):
        assert distance(ours, reference) < 1e-10


def test_adapters_alone_are_moved() -> None:
    model = answer_model()
    lora = LoRA(r=2)
    lora.attach(model.hf)
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    module = a_module(lora=lora)
    trained(module, [a_batch(0), a_batch(1)], model)
    assert module._offset.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert equal([p for p in model.parameters() if not p.requires_grad], frozen)


def test_a_resumed_run_has_the_same_adversary(tmp_path: Path) -> None:
    def module() -> ElicitedUnlearning:
        fresh = ElicitedUnlearning(
            adversary_lr=0.05,
            fork_every_n_steps=3,
            mismatched_weight=0.5,
            floor=0.3,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        )
        fresh.adopt(answer_model(vocab_size=260, max_position_embeddings=64).train(), Toy().tokenizer)
        return fresh

    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    whole = module()
    bare_trainer(5, callbacks=[keep], enable_checkpointing=True).fit(whole, Toy())
    for step in (2, 4):
        resumed = module()
        bare_trainer(5).fit(resumed, Toy(), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert equal(weights(resumed.model), weights(whole.model))
        assert all(torch.equal(resumed._offset[name], value) for name, value in whole._offset.items())
    assert any(float(value.abs().max()) > 0 for value in whole._offset.values())
