"""The regulariser at neuron level against a slow reference: one example at a time, the token looked up in a loop."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from toys.models import (
    adapted,
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
from toys.neuron import WEIGHT, compared, watched
from toys.regularizers import Split, trained

from lightning_ssiuu.attribution.activation_gradient import neuron_attribution
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import neuron_sites
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.models.lora import LoRA, adapter_parameters
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.regularizers import AttributionRegularizer, NeuronAttributionRegularizer
from lightning_ssiuu.regularizers.neuron import _outputs
from lightning_ssiuu.utils.errors import UserError


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"accumulate": 2},
        {"tokens": "sum"},
        {"target": "length_normalised"},
        {"modules": ["layer0.mlp_up"], "inner": ["mlp.up_proj"], "layers": [0]},
        {"modules": ["layer1"], "layers": [1], "tokens": "sum", "accumulate": 2},
    ],
    ids=str,
)
def test_gradient_equals_the_formulas(case: dict[str, Any]) -> None:
    errors, shares = compared(**case)
    assert shares[0] == 0
    assert min(shares[1:]) > 0.01
    assert max(errors) < 1e-12


def test_gradient_is_that_of_the_attribution_by_finite_differences() -> None:
    """Moving one weight moves the pushed attributions, all but the activations held, as the gradient says."""
    model, first, second = answer_model(), part([(3, 2), (2, 1)], 0), part([(4, 1), (2, 3)], 1)
    regularizer = NeuronAttributionRegularizer(0.5)
    for some in (first, second):
        before = None if regularizer._anchor is None else regularizer._anchor * math.exp(regularizer._anchor_scale)
        regularizer.collect(model, model(some["input_ids"], some["attention_mask"], some["labels"]), some)
        model.zero_grad()
        regularizer.apply(model)
    now = regularizer._anchor * math.exp(regularizer._anchor_scale)
    pushes = torch.where(now < 0, now - before, 0.0).split([site.width for site in neuron_sites(model.hf)])
    modules = [site.module_name for site in neuron_sites(model.hf)]
    constants = []
    for row in range(2):
        logp, _, outputs, zeros = watched(model.hf, modules, second, row)
        gradients = torch.autograd.grad(logp.exp(), [zeros[name] for name in modules])
        last = max(k for k in range(second["labels"].shape[1]) if second["labels"][row, k] != -100)
        for name, gradient, push in zip(modules, gradients, pushes, strict=True):
            lowest = (outputs[name].detach() * gradient)[0, :last].argmin(0)
            constants.append((row, name, lowest, push * gradient[0, lowest, torch.arange(len(push))]))

    def held() -> float:
        outputs = [watched(model.hf, modules, second, row)[2] for row in range(2)]
        return sum(
            float((outputs[row][name][0, lowest, torch.arange(len(factor))].detach() * factor).sum())
            for row, name, lowest, factor in constants
        )

    layers = model.hf.model.layers
    for weight in (layers[0].mlp.gate_proj.weight, layers[1].self_attn.v_proj.weight, layers[0].input_layernorm.weight):
        place = int(weight.grad.abs().argmax())
        values = []
        for sign in (1, -2):
            weight.data.view(-1)[place] += sign * 1e-5
            values.append(held())
        weight.data.view(-1)[place] += 1e-5
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(weight.grad.view(-1)[place]), rel=1e-5)


def figures_of(model: AnswerModel, some: dict[str, Tensor], **options: Any) -> NeuronAttributionRegularizer:
    regularizer = NeuronAttributionRegularizer(1.0, **options)
    answers = model(some["input_ids"], some["attention_mask"], some["labels"])
    regularizer.collect(model, answers, some)
    regularizer.apply(model)
    return regularizer


def test_what_is_held_is_what_the_diagnosis_measures() -> None:
    for name in ("llama", "gpt2", "gpt_neox"):
        model, some = answer_model(name), part([(3, 2), (5, 1), (2, 4)])
        regularizer = figures_of(model, some)
        measured = neuron_attribution(model, [some], neuron_sites(model.hf)).minimum
        held = math.exp(regularizer._anchor_scale) * regularizer._anchor
        torch.testing.assert_close(held, measured, rtol=1e-10, atol=1e-18)


def test_the_sum_over_tokens_is_the_weights_attribution_row_by_row() -> None:
    model, some = answer_model(), part([(3, 2), (5, 1), (2, 4)])
    held = figures_of(model, some, tokens="sum", modules=["layer1.mlp_gate"])
    parameter_level = AttributionRegularizer(1.0, modules=["layer1.mlp_gate"])
    parameter_level.collect(model, model(some["input_ids"], some["attention_mask"], some["labels"]), some)
    parameter_level.apply(model)
    (rows,) = (parameter_level._anchor or {}).values()
    torch.testing.assert_close(held._anchor, rows.sum(1), rtol=1e-10, atol=1e-16)


def test_tiny_probabilities_do_not_underflow() -> None:
    model = answer_model(dtype=torch.float32)
    regularizer = NeuronAttributionRegularizer(10.0, weight_mode="relative")
    for seed in range(2):
        some = part([(3, 80), (2, 79)], seed)
        answers = model(some["input_ids"], some["attention_mask"], some["labels"])
        assert answers.logps.max() < -200
        regularizer.collect(model, answers, some)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        figures = regularizer.apply(model)
    assert figures["penalty_gradient_norm"] == pytest.approx(10 * figures["objective_gradient_norm"], rel=1e-5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert figures["negative_share"] > 50


# ---- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_recomputed_activations_change_nothing(accumulate: int) -> None:
    logs = []
    for checkpointing in (False, True):
        regularizer = NeuronAttributionRegularizer(WEIGHT)
        module = SSIUU(regularizer=regularizer, gradient_checkpointing=checkpointing)
        batches = [batch(n) for n in range(3 * accumulate)]
        logs.append(trained(module, answer_model(), batches, 3, accumulate_grad_batches=accumulate))
    assert max(distance(a, b) for a, b in zip(*logs, strict=True)) < 1e-12


def test_recomputed_activations_are_recomputed() -> None:
    model, some = answer_model(), part([(3, 2)])
    model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    count: list[int] = []
    model.hf.model.layers[0].mlp.register_forward_pre_hook(lambda *_: count.append(1))
    regularizer = figures_of(model, some)
    count.clear()
    regularizer.collect(model, model(some["input_ids"], some["attention_mask"], some["labels"]), some)
    assert len(count) == 1
    regularizer.apply(model)
    assert len(count) == 1 + 1 + 2  # forward again, and once for each backward pass
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_dropout_is_off_and_draws_nothing(precision: Any) -> None:
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    ends = []
    for regularizer in (None, NeuronAttributionRegularizer(0.1, weight_mode="relative")):
        torch.manual_seed(0)
        model = AnswerModel(random_model("gpt2", torch.float32, **dropout))
        module = GradientDifference(regularizer=regularizer)
        split = Split()
        trained(module, model, [batch(0), batch(1)], 2, callbacks=[split], precision=precision)
        ends.append((split.seen, torch.get_rng_state()))
    assert equal(ends[0][0][0], ends[1][0][0])
    assert torch.equal(ends[0][1], ends[1][1])
    held = figures_of(model.train(), batch(0)["forget"])
    assert equal([held._anchor], [figures_of(model.train(), batch(0)["forget"])._anchor])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_attributions_are_float32_in_narrow_precision(precision: Any) -> None:
    regularizer = NeuronAttributionRegularizer(0.3, weight_mode="relative")
    model = answer_model(dtype=torch.bfloat16 if precision == "bf16-true" else torch.float32)
    plain = figures_of(answer_model(dtype=torch.float32), batch(0)["forget"])
    trained(SSIUU(regularizer=regularizer), model, [batch(0)], 1, precision=precision)
    assert regularizer._anchor.dtype == torch.float32
    error = distance([regularizer._anchor], [plain._anchor])
    assert 1e-4 < error < 0.1  # in bfloat16 it was, under the Trainer's autocast


def test_weight_zero_is_the_backbone_bit_for_bit() -> None:
    results = []
    for regularizer in (None, NeuronAttributionRegularizer(0.0)):
        model = answer_model(dtype=torch.float32)
        trained(GradientDifference(regularizer=regularizer), model, [batch(n) for n in range(3)], 3)
        results.append(weights(model))
    assert equal(*results)


def test_apply_leaves_no_hooks_nor_modes_behind() -> None:
    model = answer_model().train()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    given = [torch.randn_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), given, strict=True):
        p.grad = g.clone()
    figures_of(model, part([(3, 2)]))
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(m.training for m in model.modules())
    assert equal([p.grad for p in model.parameters()], given)


class TrainedSplit(Split):
    """As the other, with weights that are not trained."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append([p.grad.clone() for p in pl_module.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_adapters_on_a_frozen_base_are_changed(quantization: Literal["8bit", "4bit"] | None) -> None:
    model = AnswerModel(load_model("tiny", quantization=quantization))
    LoRA(r=2).attach(model.hf)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".lora_" not in name}
    split = TrainedSplit()
    regularizer = NeuronAttributionRegularizer(0.5, weight_mode="relative", target="length_normalised")
    log = trained(SSIUU(regularizer=regularizer), model, [batch(n) for n in range(3)], 3, callbacks=[split])
    added = [b - a for a, b in zip(split.seen[2], log[2], strict=True)]
    assert norm(added) == pytest.approx(0.5 * norm(split.seen[2]), rel=1e-3)
    assert sum(bool(a.any()) for a in added) > len(added) / 2
    now = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    assert equal(now.values(), frozen.values())
    assert adapter_parameters(model.hf)


def test_frozen_sites_before_every_adapter_are_no_obstacle() -> None:
    model = AnswerModel(adapted(random_model(), noise=0.02))
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name and "layers.1" in name)
    split = TrainedSplit()
    regularizer = NeuronAttributionRegularizer(0.5, weight_mode="relative")
    trained(SSIUU(regularizer=regularizer), model, [batch(n) for n in range(2)], 2, callbacks=[split])
    module = SSIUU(regularizer=AttributionRegularizer(1.0, modules=["layer0.attn_q"]))
    with pytest.raises(UserError, match="NeuronAttributionRegularizer"):
        trained(module, model, [batch(0)], 1)


def test_resuming_takes_anchor_and_schedule_up(tmp_path: Any) -> None:
    batches = [batch(n) for n in range(3)]

    def module() -> SSIUU:
        options: Any = {"weight_mode": "relative", "weight_schedule": "adaptive", "schedule_steps": 3}
        module = SSIUU(regularizer=NeuronAttributionRegularizer(0.5, **options))
        module.optimizer = lambda params: torch.optim.AdamW(params, lr=1e-2)
        module.adopt(answer_model().train(), None)
        return module

    whole, first, second = module(), module(), module()
    bare_trainer(max_epochs=2).fit(whole, loader(batches))
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(first, loader(batches))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    bare_trainer(max_epochs=2).fit(second, loader(batches), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert equal(weights(whole.model), weights(second.model))
    assert not equal(weights(first.model), weights(second.model))


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AttributionRegularizer, NeuronAttributionRegularizer])
@pytest.mark.parametrize("modules", [["mlp"], ["layer2"]])
def test_modules_that_name_nothing_are_refused_before_the_first_step(kind: Any, modules: list[str]) -> None:
    model, count = answer_model(), []
    model.register_forward_hook(lambda *_: count.append(1))
    with pytest.raises(UserError, match=r"regularizer\.modules"):
        trained(SSIUU(regularizer=kind(1.0, modules=modules)), model, [batch(0)], 1)
    assert not count


def test_nothing_trained_is_refused_naming_the_neuron_level() -> None:
    model = answer_model().requires_grad_(False)
    with pytest.raises(UserError, match="allowed: NeuronAttributionRegularizer"):
        AttributionRegularizer(1.0)._parameters(model)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"weight": -1e-9}, "regularizer.weight"),
        ({"tokens": "mean"}, "regularizer.tokens"),
        ({"anchor": "next"}, "regularizer.anchor"),
        ({"modules": []}, "regularizer.modules"),
        ({"weight_schedule": "cosine"}, "regularizer.weight_schedule"),
        ({"schedule_steps": 0}, "regularizer.schedule_steps"),
        ({"weight_schedule": "adaptive"}, "regularizer.weight_mode"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        NeuronAttributionRegularizer(**arguments)
    assert caught.value.argument == named


def test_an_anchor_of_other_neurons_is_refused() -> None:
    model, some = answer_model(), part([(3, 2)])
    regularizer = NeuronAttributionRegularizer(1.0, modules=["mlp_up"])
    regularizer.load_state(figures_of(model, some).state())
    regularizer.collect(model, model(some["input_ids"], some["attention_mask"], some["labels"]), some)
    with pytest.raises(UserError, match=r"regularizer\.modules"):
        regularizer.apply(model)


def test_what_a_block_adds_in_place_is_no_part_of_an_output() -> None:
    hf, ids = random_model("falcon"), part([(3, 2)])["input_ids"]
    seen: dict[str, Tensor] = {}
    sites = [site for site in neuron_sites(hf) if site.kind in ("attn_o", "mlp_down")]
    handles = [
        hf.get_submodule(site.module_name).register_forward_hook(
            lambda _m, _a, output, name=site.module_name: seen.__setitem__(name, output.detach().clone())
        )
        for site in sites
    ]
    expected = hf(ids).logits
    for handle in handles:
        handle.remove()
    with _outputs(hf, sites) as outputs:
        logits = hf(ids).logits
    assert torch.equal(logits, expected)
    assert outputs.keys() == seen.keys()
    assert all(torch.equal(outputs[name], value) for name, value in seen.items())
