"""8-bit and 4-bit weights: what they are, that adapters beside them train, and that attribution works through them."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import pytest
import torch
from torch import nn
from toys.models import adapted, batch, distance, equal, part, random_model
from toys.regularizers import trained

from lightning_ssiuu.attribution.activation_gradient import neuron_attribution
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import neuron_sites
from lightning_ssiuu.models.export import plain_state_dict
from lightning_ssiuu.models.loading import TINY, load_model
from lightning_ssiuu.models.lora import LoRA, adapter_parameters
from lightning_ssiuu.models.meta import blueprint
from lightning_ssiuu.models.quantization import check_reading, dequantized, is_quantized, quantized_share, was_conv1d
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.regularizers import AttributionRegularizer
from lightning_ssiuu.utils.errors import UserError

WIDTHS = ("8bit", "4bit")
Width = Literal["8bit", "4bit"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose projections are stored transposed and hold three kinds of neurons at once."""
    folder = tmp_path_factory.mktemp("gpt2")
    # Rows of whole 4-bit blocks: see check_reading.
    random_model("gpt2", torch.float32, tie_word_embeddings=True, n_embd=64).save_pretrained(folder)
    return str(folder)


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if is_quantized(module)}


# ---- how much of a model is reached ------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", WIDTHS)
@pytest.mark.parametrize(("name", "share"), [("mixtral", 14), ("qwen3_moe", 32), ("falcon", 0)])
def test_less_than_half_is_refused(name: str, share: int, quantization: Width, tmp_path: Path) -> None:
    """By hand for Mixtral, per block: attention 16 · (16 + 8 + 8 + 16) of those and 4 · 3 · 16 · 24 + 4 · 16."""
    random_model(name, torch.float32).save_pretrained(tmp_path)
    for load in (load_model, blueprint):
        with pytest.raises(UserError, match=f"quantization: got '{quantization}', .*reach {share} % of the weights"):
            load(str(tmp_path), torch.float32, quantization)


def test_a_share_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random_model("qwen2_moe", torch.float32).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        assert quantized_share(load_model(tmp_path, quantization="8bit")) == pytest.approx(0.55, abs=0.005)
        assert "qwen2_moe: quantization 8bit reaches 55 % of the weights" in caplog.text
        caplog.clear()
        assert quantized_share(load_model("tiny", quantization="8bit")) == 1.0
        assert "reaches" not in caplog.text
    assert quantized_share(load_model("tiny")) == 0.0


# ---- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", WIDTHS)
def test_projections_are_quantised_and_the_rest_is_not(quantization: Width, dtype: torch.dtype) -> None:
    model, original = load_model("tiny", dtype, quantization, torch.device("cpu")), load_model("tiny", dtype)
    layers = quantized_layers(model)
    assert set(layers) == {site.module_name for site in neuron_sites(original)}
    kind, stored = {
        "8bit": (bitsandbytes.nn.Linear8bitLt, torch.int8),
        "4bit": (bitsandbytes.nn.Linear4bit, torch.uint8),
    }[quantization]
    assert {type(layer) for layer in layers.values()} == {kind}
    assert {layer.weight.dtype for layer in layers.values()} == {stored}
    packed = {id(layer.weight) for layer in layers.values()}
    rest = {name: p for name, p in model.named_parameters() if id(p) not in packed}
    assert equal(rest.values(), [original.get_parameter(name) for name in rest])
    assert {p.dtype for p in rest.values()} == {dtype}
    assert not model.config.use_cache
    if quantization == "4bit":
        assert {layer.compute_dtype for layer in layers.values()} == {dtype}
        assert {(layer.weight.quant_type, layer.weight.quant_state.nested) for layer in layers.values()} == {
            ("nf4", True)
        }


@pytest.mark.parametrize("quantization", WIDTHS)
def test_dequantised_weights_are_near_the_original_and_what_the_layer_computes_with(
    quantization: Width, gpt2: str
) -> None:
    for checkpoint in ("tiny", gpt2):
        model, original = load_model(checkpoint, quantization=quantization).train(), load_model(checkpoint)
        for name, layer in list(quantized_layers(model).items())[:4]:
            plain, weight = dequantized(layer), original.get_parameter(f"{name}.weight")
            assert was_conv1d(layer) == (checkpoint == gpt2)
            assert plain.dtype == torch.float32
            assert plain.shape == weight.shape
            rows = weight.T if checkpoint == gpt2 else weight
            error = (plain.T if checkpoint == gpt2 else plain) - rows
            if quantization == "8bit":
                # Half a step of a 127-step scale per output, and the rounding of the weight to float16 before it.
                step = rows.abs().amax(1, keepdim=True) / 127
                assert (error.abs() <= 0.5 * step + rows.abs() * 2**-11 + 1e-6).all()
            else:
                assert 0.05 < error.norm() / rows.norm() < 0.12  # 16 levels of a normal distribution
            # Twice: after its first pass an 8-bit layer keeps its scales elsewhere.
            bias = 0 if layer.bias is None else layer.bias
            for _ in range(2):
                outputs = layer(torch.eye(rows.shape[1])) - bias
                assert torch.allclose(outputs, dequantized(layer) if checkpoint == gpt2 else plain.T, atol=1e-6)


def test_rows_that_this_cpu_would_misread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = bitsandbytes.functional.dequantize_4bit
    layer = bitsandbytes.nn.Linear4bit(96, 4, bias=False, quant_type="nf4").to("cpu")  # packs
    model = nn.ModuleDict({"up": layer})

    def by_rows(weight: Any, state: Any) -> torch.Tensor:
        plain = read(weight, state).clone()
        return plain if len(plain) == 1 else plain.roll(1)

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", by_rows)
    misread = "up, whose rows of 96 are no multiple of 64"
    with pytest.raises(UserError, match=f"4bit.*8bit or null for this model on this CPU: .* misreads {misread}"):
        check_reading(model)
    even = bitsandbytes.nn.Linear4bit(128, 4, bias=False, quant_type="nf4").to("cpu")
    check_reading(nn.ModuleDict({"up": even}))


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"quantization: got '4bit'.*64-bit"):
        load_model("tiny", torch.float64, "4bit")
    shutil.copytree(TINY, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for quantization in (None, "8bit", "4bit"):
        with pytest.raises(UserError, match=r"checkpoint: got .*quantised already: bitsandbytes"):
            load_model(tmp_path / "packed", quantization=quantization)
    (tmp_path / "bitsandbytes.py").write_text("raise OSError('libcudart.so is missing')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    with pytest.raises(UserError, match=r"got '8bit', allowed: null without a working bitsandbytes \(libcudart"):
        load_model("tiny", quantization="8bit")


# ---- training and looking through them ---------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", WIDTHS)
@pytest.mark.parametrize("which", ["tiny", "gpt2"])
def test_adapters_train_and_packed_weights_stay(which: str, quantization: Width, gpt2: str) -> None:
    torch.manual_seed(0)
    model = AnswerModel(load_model(gpt2 if which == "gpt2" else which, quantization=quantization))
    LoRA(r=2).attach(model.hf)
    start = [p.detach().clone() for p in adapter_parameters(model.hf).values()]
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".lora_" not in name}
    module = SSIUU(regularizer=AttributionRegularizer(0.3, "relative", target="length_normalised"))
    log = trained(module, model, [batch(n) for n in range(4)], 4)
    assert all(gradient.any() for gradient in log[-1])  # A has none in the first step
    assert not any(map(torch.equal, start, adapter_parameters(model.hf).values()))
    now = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    assert now.keys() == frozen.keys()
    assert equal(now.values(), frozen.values())


@pytest.mark.parametrize("quantization", WIDTHS)
@pytest.mark.parametrize("which", ["tiny", "gpt2"])
def test_attributions_are_those_of_the_plain_model(which: str, quantization: Width, gpt2: str) -> None:
    checkpoint = gpt2 if which == "gpt2" else which
    model = adapted(load_model(checkpoint, quantization=quantization), noise=0.02)
    plain = load_model(checkpoint)
    plain.load_state_dict(plain_state_dict(model))
    some = part([(4, 2), (2, 3)])
    pair = [neuron_attribution(AnswerModel(hf), [some], neuron_sites(hf)) for hf in (model, plain)]
    assert pair[1].minimum.abs().max() > 0
    # While scoring, 8-bit layers round their inputs to 8 bits as well.
    allowed = 1e-4 if quantization == "4bit" else 0.1
    for aggregate in ("maximum", "minimum"):
        assert distance([getattr(pair[0], aggregate)], [getattr(pair[1], aggregate)]) < allowed


@pytest.mark.parametrize("training", [True, False])
def test_an_8bit_layer_does_not_keep_its_input(training: bool) -> None:
    """And its gradient is the one of a plain layer with the same weight."""
    layer: Any = load_model("tiny", quantization="8bit").get_submodule("model.layers.0.mlp.up_proj").train(training)
    inputs = torch.randn(1, 3, layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
    outputs = layer(inputs)
    kept = outputs.grad_fn.A if training else outputs.grad_fn.tensors
    assert kept is None or kept == (None, None, None)
    for _ in range(2):  # the regulariser needs the graph twice
        (gradient,) = torch.autograd.grad(outputs.sum(), inputs, retain_graph=True)
        assert torch.allclose(gradient, dequantized(layer).sum(0).expand_as(gradient), atol=1e-5)


def test_scoring_does_not_repack_weights_that_still_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is done by bitsandbytes where it finds AVX512-BF16, and the repacked product has no backward pass."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = load_model("tiny", quantization="4bit").eval()
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    weight = layer.weight.clone()
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert torch.equal(layer.weight, weight)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
