"""The attribution regulariser against a slow reference written from the formulas of arXiv 2509.22263, Eqs. 12 to 14."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from toys.models import (
    answer_model,
    bare_trainer,
    batch,
    distance,
    equal,
    loader,
    norm,
    part,
    random_model,
    weights,
)
from toys.regularizers import Reference, Split, trained

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.objectives.gradient_ascent import GradientAscent
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.regularizers import AttributionRegularizer
from lightning_ssiuu.utils.errors import UserError

WEIGHT = 1e4


def compared(
    accumulate: int = 1,
    clip: float | None = None,
    mode: str = "absolute",
    anchor: str = "previous",
    target: str = "sequence",
    modules: list[str] | None = None,
    names: str = "",
    objective: type = SSIUU,
    **kwargs: Any,
) -> tuple[list[float], list[float]]:
    """Train five steps; per step, error of the whole gradient, and the penalty's share of it in the reference."""
    # The random model's probabilities are small: λ is chosen so that the penalty is as large as the objective's part.
    weight = {"absolute": WEIGHT if target == "sequence" else 100.0, "relative": 0.7}[mode]
    steps, model = 5, answer_model(**kwargs)
    reference = Reference(model.hf, weight, mode, anchor, target, names, objective is GradientAscent)
    batches = [batch(n) for n in range(steps * accumulate)]
    module = objective(regularizer=AttributionRegularizer(weight, mode, anchor, target, modules))
    log = trained(module, model, batches, steps, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    errors, shares = [], []
    assert len(log) == steps
    for number, gradients in enumerate(log):
        penalty, total = reference.step(batches[number * accumulate : (number + 1) * accumulate], clip)
        errors.append(distance(gradients, total))
        shares.append(norm(penalty) / norm(total))
    return errors, shares


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("target", ["sequence", "length_normalised"])
@pytest.mark.parametrize("anchor", ["previous", "original"])
def test_gradient_equals_the_formulas(anchor: str, target: str, accumulate: int) -> None:
    errors, shares = compared(accumulate, anchor=anchor, target=target)
    assert max(errors) < 1e-10
    assert shares[0] == 0
    assert min(shares[1:]) > 0.01


@pytest.mark.parametrize(
    "case",
    [
        {"mode": "relative"},
        {"mode": "relative", "accumulate": 3, "anchor": "original"},
        {"tie_word_embeddings": False},
        {"clip": 0.1},
        {"clip": 0.1, "mode": "relative", "accumulate": 2},
        {"objective": GradientAscent},
        {"modules": ["mlp_up"], "names": "mlp.up_proj"},
        {"modules": ["layer1.attn_q"], "names": "layers.1.self_attn.q_proj", "mode": "relative"},
        {"name": "gpt2"},
        {"name": "gpt_neox", "mode": "relative"},
    ],
    ids=str,
)
def test_gradient_equals_the_formulas_in_other_settings(case: dict[str, Any]) -> None:
    errors, shares = compared(**case)
    assert max(errors) < 1e-10
    assert shares[0] == 0
    assert min(shares[1:]) > 1e-3


def test_chunks_of_parameters_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ssiuu.training.shards._CHUNK", 100)
    errors, _ = compared()
    assert max(errors) < 1e-10


def test_recomputed_activations_change_nothing() -> None:
    logs = []
    for checkpointing in (False, True):
        module = SSIUU(regularizer=AttributionRegularizer(WEIGHT), gradient_checkpointing=checkpointing)
        logs.append(trained(module, answer_model(), [batch(n) for n in range(3)], 3))
    assert max(distance(a, b) for a, b in zip(*logs, strict=True)) < 1e-12


@pytest.mark.parametrize("weight", [0.3, 2.0])
def test_relative_weight_is_the_ratio_of_norms(weight: float) -> None:
    split = Split()
    module = SSIUU(regularizer=AttributionRegularizer(weight, "relative"))
    log = trained(module, answer_model(), [batch(n) for n in range(4)], 4, callbacks=[split])
    assert equal(split.seen[0], log[0])
    for own, both in zip(split.seen[1:], log[1:], strict=True):
        added = [b - a for a, b in zip(own, both, strict=True)]
        assert norm(added) == pytest.approx(weight * norm(own), rel=1e-12)


def test_restriction_changes_the_chosen_weights_only() -> None:
    split, model = Split(), answer_model()
    module = SSIUU(regularizer=AttributionRegularizer(WEIGHT, modules=["layer0", "mlp_down"]))
    log = trained(module, model, [batch(n) for n in range(3)], 3, callbacks=[split])
    names = [name for name, _ in model.named_parameters()]
    changed = {n for n, a, b in zip(names, split.seen[2], log[2], strict=True) if not torch.equal(a, b)}
    # norms of block 0 are no neuron sites
    assert changed == {n for n in names if ("layers.0." in n and "_proj" in n) or "down_proj" in n}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weight_zero_is_the_backbone_bit_for_bit(accumulate: int) -> None:
    results = []
    for make in (GradientDifference, lambda: SSIUU(regularizer=AttributionRegularizer(weight=0.0))):
        model = answer_model(dtype=torch.float32)
        trained(make(), model, [batch(n) for n in range(6)], 6 // accumulate, accumulate_grad_batches=accumulate)
        results.append(weights(model))
    assert equal(*results)


def test_the_first_step_is_the_backbone_s_bit_for_bit() -> None:
    results = []
    for make in (GradientDifference, lambda: SSIUU(regularizer=AttributionRegularizer(weight=1e6))):
        model = answer_model(dtype=torch.float32)
        trained(make(), model, [batch(0)], 1)
        results.append(weights(model))
    assert equal(*results)


def test_collect_leaves_gradients_and_graph_alone() -> None:
    model, some = answer_model(), part([(3, 2)])
    given = [torch.randn_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), given, strict=True):
        p.grad = g
    answers = model(some["input_ids"], some["attention_mask"], some["labels"])
    AttributionRegularizer(1.0).collect(model, answers, some)
    assert all(p.grad is g for p, g in zip(model.parameters(), given, strict=True))
    answers.logps.sum().backward()


def test_collect_restores_gradients_after_an_exception() -> None:
    model, some = answer_model(), part([(3, 2)])
    given = [torch.randn_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), given, strict=True):
        p.grad = g
    answers = model(some["input_ids"], some["attention_mask"], some["labels"])

    def broken(_: Tensor) -> None:
        raise ZeroDivisionError

    answers.logits.register_hook(broken)
    with pytest.raises(ZeroDivisionError):
        AttributionRegularizer(1.0).collect(model, answers, some)
    assert all(p.grad is g for p, g in zip(model.parameters(), given, strict=True))


def test_frozen_parameters_stay_out() -> None:
    model = answer_model()
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    log = trained(SSIUU(regularizer=AttributionRegularizer(WEIGHT)), model, [batch(n) for n in range(3)], 3)
    assert equal(frozen, [p for p in model.parameters() if not p.requires_grad])
    assert len(log[0]) == sum(p.requires_grad for p in model.parameters())


# ---- warnings, errors, state -------------------------------------------------------------------------------------


def constant_answers(logp: float, model: AnswerModel) -> Any:
    from lightning_ssiuu.models.answers import Answers

    # Two tokens to choose from, the first with probability exp(logp).
    margin = logp - math.log(-math.expm1(logp))
    shift = 0 * next(model.parameters()).sum()
    logits = torch.stack([torch.tensor([margin, 0.0], dtype=torch.float64) + shift])
    return Answers(logits, torch.tensor([0]), torch.tensor([0]), 1)


@pytest.mark.parametrize(
    ("logp", "mode", "word"),
    [
        (-1e-3, "absolute", "saturated"),
        (-20.0, "absolute", "vanished"),
        (-20.0, "relative", None),
        (-1.0, "absolute", None),
    ],
)
def test_warnings_about_the_answers_probability(logp: float, mode: Any, word: str | None) -> None:
    model, regularizer = answer_model(), AttributionRegularizer(1.0, mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            regularizer.collect(model, constant_answers(logp, model), {})
    assert [word in str(w.message) for w in caught] == ([True] if word else [])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"weight": -1e-9}, "regularizer.weight"),
        ({"weight": math.nan}, "regularizer.weight"),
        ({"weight": math.inf}, "regularizer.weight"),
        ({"weight_mode": "both"}, "regularizer.weight_mode"),
        ({"anchor": "next"}, "regularizer.anchor"),
        ({"target": "token"}, "regularizer.target"),
        ({"modules": []}, "regularizer.modules"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        AttributionRegularizer(**arguments)
    assert caught.value.argument == named


@pytest.mark.parametrize(
    ("name", "modules"),
    [("llama", ["mlp"]), ("llama", ["layer2"]), ("llama", [""]), ("gpt2", ["attn_q"]), ("gpt_neox", ["layer0.attn_k"])],
)
def test_modules_that_do_not_exist_or_are_fused(name: str, modules: list[str]) -> None:
    module = SSIUU(regularizer=AttributionRegularizer(1.0, modules=modules))
    model = answer_model(name)
    before = weights(model)
    with pytest.raises(UserError, match=r"regularizer\.modules"):
        trained(module, model, [batch(0)], 1)
    assert equal(before, weights(model))


def test_an_architecture_without_known_sites_needs_no_modules() -> None:
    model = AnswerModel(random_model("granite"))
    trained(SSIUU(regularizer=AttributionRegularizer(1.0)), model, [batch(0), batch(1)], 2)
    with pytest.raises(UserError, match="granite"):
        trained(SSIUU(regularizer=AttributionRegularizer(1.0, modules=["mlp_up"])), model, [batch(0)], 1)


def test_resuming_takes_the_anchor_up(tmp_path: Any) -> None:
    batches = [batch(n) for n in range(6)]

    def module() -> SSIUU:
        module = SSIUU(regularizer=AttributionRegularizer(WEIGHT))
        module.optimizer = lambda params: torch.optim.AdamW(params, lr=1e-2)
        model = answer_model()
        model.train()
        module.adopt(model, None)
        return module

    whole = module()
    bare_trainer(max_epochs=2).fit(whole, loader(batches[:3]))
    first = module()
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(first, loader(batches[:3]))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = module()
    bare_trainer(max_epochs=2).fit(second, loader(batches[:3]), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert equal(weights(whole.model), weights(second.model))
    assert not equal(weights(first.model), weights(second.model))
