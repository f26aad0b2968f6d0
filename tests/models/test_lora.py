"""Adapters: what they compute, which parameters they leave frozen, and that attribution and regulariser see them."""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from toys.cli import DEFAULT, command
from toys.models import (
    EXPERTS,
    KNOWN,
    TOYS,
    UNRECORDED,
    adapted,
    answer_model,
    batch,
    distance,
    equal,
    norm,
    part,
    random_model,
)
from toys.regularizers import Reference, trained
from transformers.pytorch_utils import Conv1D

from lightning_ssiuu.attribution.activation_gradient import neuron_attribution
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import neuron_sites
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.models.lora import LoRA, adapted_layers, adapter_parameters, check_adapter_state
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.regularizers import AttributionRegularizer, NeuronAttributionRegularizer
from lightning_ssiuu.training.reference import without_adapters
from lightning_ssiuu.utils.errors import UserError


def merged_by_hand(name: str, model: Any) -> Any:
    """The same architecture without adapters, its weights the sums."""
    plain = random_model(name)
    for weight, a, b in matrices(model, plain):
        with torch.no_grad():
            weight += torch.einsum("or,ri->io" if name == "gpt2" else "or,ri->oi", b, a) * 2.0
    return plain


def matrices(model: Any, plain: Any, grad: bool = False) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each matrix of a plain model with its A and B, expert by expert; or the gradients of all three."""
    for name, layer in adapted_layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        own = plain.get_submodule(name.replace(".base_layer", ""))
        weight = getattr(own, getattr(layer, "parameter_name", "weight"))
        if grad:
            a, b, weight = a.grad, b.grad, weight.grad
        if weight.dim() == 2:
            yield weight, a, b
            continue
        n, r = len(weight), len(a) // len(weight)
        for e in range(n):  # A expert by expert, B rank by rank: rows e r, e r + 1, ... and columns e, n + e, ...
            yield weight[e], a[e * r : e * r + r], b[:, e::n]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": 0}, "lora.r"),
        ({"r": -3}, "lora.r"),
        ({"r": 1.5}, "lora.r"),
        ({"alpha": 0.0}, "lora.alpha"),
        ({"alpha": math.inf}, "lora.alpha"),
        ({"alpha": math.nan}, "lora.alpha"),
        ({"dropout": 1.0}, "lora.dropout"),
        ({"dropout": -0.1}, "lora.dropout"),
        ({"target_modules": []}, "lora.target_modules"),
    ],
)
def test_options_outside_their_ranges(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        LoRA(**options)
    assert caught.value.argument == named


@pytest.mark.parametrize("target", ["q_porj", "roj", "", "embed_tokens", "lm_head", "self_attn"])
def test_targets_that_are_no_projections(target: str) -> None:
    model = random_model()
    with pytest.raises(UserError, match=r"lora\.target_modules.*down_proj.*gate_proj.*k_proj"):
        LoRA(target_modules=["q_proj", target]).attach(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", TOYS)
def test_only_adapters_train_and_nothing_else_changes(name: str) -> None:
    model, original = (random_model(name, torch.float32) for _ in range(2))
    LoRA(r=2).attach(model)
    assert type(model) is type(original)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {n.replace(".weight", ".default.weight") for n in adapter_parameters(model)}
    head = original.get_output_embeddings()
    linear = {n for n, m in original.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    if name != UNRECORDED:
        assert linear >= {site.module_name for site in neuron_sites(original)}
        assert [(s.key, s.module_name, s.width) for s in neuron_sites(model)] == [
            (s.key, s.module_name, s.width) for s in neuron_sites(original)
        ]
    experts = {n for n, p in original.named_parameters() if p.dim() == 3}
    assert (name in EXPERTS) == bool(experts)
    reached = [n.replace(".base_layer", "") for n, _ in adapted_layers(model)]
    assert sorted(reached) == sorted([*linear, *(n.rpartition(".")[0] for n in experts)])
    rest = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if ".lora_" not in n}
    assert equal(rest.values(), original.parameters())
    assert list(rest) == [n for n, _ in original.named_parameters()]
    ids = part([(5, 3)])["input_ids"]
    assert torch.equal(model(ids).logits, original(ids).logits)


@pytest.mark.parametrize(("name", "share"), [("mixtral", 99), ("qwen3_moe", 97), ("qwen2_moe", 98), ("llama", None)])
def test_the_share_that_adapters_reach_is_said(name: str, share: int | None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        LoRA(r=2).attach(random_model(name, torch.float32))
    said = [record.getMessage() for record in caplog.records if "lora adapts" in record.getMessage()]
    assert [text.partition(" of the weights")[0] for text in said] == (
        [] if share is None else [f"{name}: lora adapts projections with {share} %"]
    )


def test_targets_may_be_ends_of_names_and_single_modules() -> None:
    model = random_model()
    LoRA(r=1, target_modules=["mlp.up_proj", "model.layers.1.self_attn.q_proj"]).attach(model)
    chosen = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    assert [name for name, _ in adapted_layers(model)] == chosen


def test_a_seed_gives_the_same_adapters_whatever_the_weights_are_in() -> None:
    drawn = []
    for dtype, quantization in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, "8bit")):
        torch.manual_seed(3)
        model = load_model("tiny", dtype, quantization)
        LoRA(r=2, dropout=0.25).attach(model)
        drawn.append(adapter_parameters(model))
        assert {p.dtype for p in drawn[-1].values()} == {torch.float32}
        assert {layer.lora_dropout["default"].p for _, layer in adapted_layers(model)} == {0.25}
    assert equal(drawn[0].values(), drawn[1].values())
    assert equal(drawn[0].values(), drawn[2].values())
    first = next(iter(drawn[0].values()))
    assert 0 < first.abs().max() <= 1 / math.sqrt(first.shape[1])
    assert not any(matrix.any() for name, matrix in drawn[0].items() if "lora_B" in name)
    torch.manual_seed(4)
    other = load_model("tiny")
    LoRA(r=2).attach(other)
    assert not equal(drawn[0].values(), adapter_parameters(other).values())


def test_a_model_without_storage() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(random_model().config)
    state = torch.get_rng_state()
    LoRA(r=2).attach(model)
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert {tuple(p.shape) for n, p in adapter_parameters(model).items() if "up_proj" in n} == {(2, 16), (24, 2)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "experts.down_proj"]}, {"q_proj": 2, "experts": 2}),
        ({"target_modules": ["gate_up_proj"]}, {"experts": 2}),
        ({"target_modules": ["model.layers.1.mlp.experts.down_proj"]}, {"experts": 1}),
        ({"target_modules": ["q_proj"], "dropout": 0.1}, {"q_proj": 2}),
    ],
)
def test_targets_may_be_experts(options: dict[str, Any], expected: dict[str, int]) -> None:
    LoRA(r=1, **options).attach(model := random_model("qwen3_moe"))
    assert Counter(name.rpartition(".")[2] for name, _ in adapted_layers(model)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, r"lora\.dropout: got 0\.1, allowed: 0 with adapters on experts"),
        (
            {},
            r"got None.*: \['k_proj', 'o_proj', 'q_proj', 'v_proj', 'experts.down_proj', 'experts.gate_up_proj'\]$",
        ),
        ({"target_modules": ["up_proj"]}, r"lora\.target_modules: got \['up_proj'\].*without also targeting gate_proj"),
        ({"target_modules": ["experts"]}, r"lora\.target_modules: got 'experts'.*'experts\.down_proj'"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_anything_is_loaded(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block has experts, one an ordinary feed-forward network, whose names peft takes for the experts'."""
    model = random_model("qwen3_moe", mlp_only_layers=[0])
    model.config.save_pretrained(tmp_path)
    monkeypatch.setattr("lightning_ssiuu.models.source.load_model", None)
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=message):
        SSIUU(checkpoint=str(tmp_path), lora=LoRA(r=1, **options)).configure_model()
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(UserError, match=message):
        LoRA(r=1, **options).attach(model)
    assert all(p.requires_grad for p in model.parameters())
    LoRA(r=1, target_modules=["q_proj", "gate_up_proj"]).check(str(tmp_path))
    assert torch.equal(state, torch.get_rng_state())


def test_a_second_set_of_adapters_is_refused() -> None:
    with pytest.raises(UserError, match="adapters already"):
        LoRA().attach(adapted(random_model()))


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'pip install "lightning-ssiuu\[lora\]"'):
        LoRA().attach(random_model())


def test_a_bad_option_of_a_recipe_is_one_line() -> None:
    refused = command("fit", "--config", DEFAULT, "--model.init_args.lora", "{r: 0}")
    assert refused.status == 2
    assert refused.err.strip().endswith("lora.r: got 0, allowed: a whole number ≥ 1")


def test_a_checkpoint_of_other_adapters() -> None:
    model = adapted(random_model(), target_modules=["up_proj"])
    state = adapted(random_model(), target_modules=["down_proj"]).state_dict()
    check_adapter_state(model, model.state_dict())
    check_adapter_state(model, None)
    with pytest.raises(UserError, match=r"ckpt_path.*without 4 of 4 adapter matrices"):
        check_adapter_state(model, state)


# ---- what they compute -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KNOWN, *EXPERTS])
def test_outputs_and_attributions_are_those_of_the_summed_weights(name: str) -> None:
    model = adapted(random_model(name))
    plain, some = merged_by_hand(name, model), part([(4, 2), (2, 3)])
    ids = some["input_ids"]
    assert (model(ids).logits - plain(ids).logits).abs().max() < 1e-10
    assert (random_model(name)(ids).logits - plain(ids).logits).abs().max() > 0.1
    left, right = (neuron_attribution(AnswerModel(hf), [some], neuron_sites(hf)) for hf in (model, plain))
    for aggregate in ("maximum", "positive", "minimum"):
        a, b = getattr(left, aggregate), getattr(right, aggregate)
        assert b.abs().max() > 0
        assert distance([a], [b]) < 1e-10


@pytest.mark.parametrize("name", ["llama", *EXPERTS])
def test_gradients_are_those_of_the_summed_weights(name: str) -> None:
    """W' = W + 2 B A: dA is 2 Bᵀ dW', dB is 2 dW' Aᵀ, for every expert on its own."""
    model, ids = adapted(random_model(name)), part([(4, 2), (2, 3)])["input_ids"]
    plain = merged_by_hand(name, model)
    for each in (model, plain):
        (each(ids).logits.log_softmax(-1)[..., 3] + each(ids.flip(1)).logits.log_softmax(-1)[..., 5]).sum().backward()
    known = list(zip(matrices(model, plain), matrices(model, plain, grad=True), strict=True))
    for (_, a, b), (weight, da, db) in known:
        assert distance([da, db], [2 * b.T @ weight, 2 * weight @ a.T]) < 1e-10 or not weight.any()
    assert sum(bool(weight.any()) for _, (weight, _, _) in known) > len(known) / 2  # the others got no token
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", ["llama", *EXPERTS])
def test_without_adapters_and_after_them_it_is_the_original(name: str) -> None:
    model, original, ids = adapted(random_model(name)), random_model(name), part([(4, 2), (2, 3)])["input_ids"]
    expected = original(ids).logits
    assert not torch.equal(model(ids).logits, expected)
    with without_adapters(model):
        assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(model(ids).logits, expected)
    LoRA.detach(model)
    assert torch.equal(model(ids).logits, expected)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert all(p.requires_grad for p in model.parameters())
    LoRA(r=1).attach(model)


def reference(model: AnswerModel, *args: Any, names: str = "") -> Reference:
    """The regulariser's formulas, written out, over the parameters that train."""
    slow = Reference(model.hf, *args)
    slow.named = {name: p for name, p in slow.named.items() if p.requires_grad}
    slow.regularized = [name for name in slow.named if names in name]
    return slow


@pytest.mark.parametrize(
    ("name", "modules", "names"),
    [
        ("llama", None, ""),
        ("llama", ["mlp_up"], "up_proj"),
        ("gpt2", ["layer1.mlp_down"], "h.1.mlp.c_proj"),
        ("mixtral", None, ""),
    ],
)
def test_the_regulariser_acts_on_adapters_as_its_formulas_say(name: str, modules: Any, names: str) -> None:
    model = AnswerModel(adapted(random_model(name)))
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    slow = reference(model, 0.7, "relative", "previous", "length_normalised", names=names)
    batches = [batch(n) for n in range(6)]
    module = SSIUU(regularizer=AttributionRegularizer(0.7, "relative", "previous", "length_normalised", modules))
    log = trained(module, model, batches, 3, accumulate_grad_batches=2)
    for number, gradients in enumerate(log):
        penalty, total = slow.step(batches[2 * number : 2 * number + 2])
        assert distance(gradients, total) < (1e-7 if name == "mixtral" else 1e-10)  # a router computes in 32 bits
        assert number == 0 or norm(penalty) > 0.1 * norm(total)
    assert equal(frozen, [p for p in model.parameters() if not p.requires_grad])


def test_a_regulariser_for_modules_without_adapters() -> None:
    model = AnswerModel(adapted(random_model(), target_modules=["q_proj"]))
    module = SSIUU(regularizer=AttributionRegularizer(0.7, modules=["mlp_up"]))
    with pytest.raises(UserError, match=r"regularizer\.modules"):
        trained(module, model, [batch(0)], 1)


@pytest.mark.parametrize("regularizer", [AttributionRegularizer, NeuronAttributionRegularizer])
@pytest.mark.parametrize(("name", "dropout"), [("llama", 0.0), ("llama", 0.3), ("mixtral", 0.0)])
def test_recomputed_activations_change_nothing(name: str, dropout: float, regularizer: Any) -> None:
    """Embeddings are frozen, the extra gradient needs a second backward pass, steps are accumulated."""
    logs: list[list[list[Tensor]]] = []
    for checkpointing in (False, True):
        model = answer_model(name)
        adapted(model.hf, dropout=dropout)
        penalty = regularizer(weight=0.7, weight_mode="relative", target="length_normalised")
        module = SSIUU(regularizer=penalty, gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        logs.append(trained(module, model, [batch(n) for n in range(6)], 3, accumulate_grad_batches=2))
        assert model.hf.is_gradient_checkpointing is checkpointing
    assert all(norm([gradient]) > 0 for gradient in logs[0][2])
    assert max(distance(a, b) for a, b in zip(*logs, strict=True)) < 1e-10
