"""What can only go wrong on a GPU: the same figures as on the CPU, narrow types, states that travel between devices.

``GPU_TEST_DEVICE=cpu pytest tests/test_gpu.py`` runs them on the CPU instead, to see that they run at all.
"""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toys.models import answer_model, bare_trainer, batch, distance, loader, weights
from toys.training import FewFacts, gpt2_with_dropout

from lightning_ssiuu import SSIUU, AttributionRegularizer, GradientDifference
from lightning_ssiuu.attribution.activation_gradient import neuron_attribution
from lightning_ssiuu.attribution.influence import influence_variation
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import neuron_sites
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives import objectives

DEVICE = torch.device(os.environ.get("GPU_TEST_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]
CPU = torch.device("cpu")


def regularizer(**kwargs: Any) -> AttributionRegularizer:
    return AttributionRegularizer(**{"weight": 0.5, "weight_mode": "relative", "target": "length_normalised"} | kwargs)


def moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: moved(inner, device) for name, inner in value.items()}
    return value.to(device)


def cpu(tensors: Any) -> list[torch.Tensor]:
    return [tensor.detach().cpu() for tensor in tensors]


def fit(module: Any, data: Any, device: torch.device, steps: int, **kwargs: Any) -> L.Trainer:
    trainer = bare_trainer(steps, accelerator=device.type, check_val_every_n_epoch=10**6, **kwargs)
    trainer.fit(module, data)
    return trainer


def trained(
    device: torch.device, dtype: torch.dtype, steps: int = 4, **kwargs: Any
) -> tuple[list[Any], dict[str, Any]]:
    """Weights and figures after a few SSIUU steps on a random model."""
    module = SSIUU(regularizer=regularizer(**kwargs), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    module.adopt(answer_model("llama", dtype), load_tokenizer("tiny"))
    trainer = fit(module, loader([batch(seed) for seed in range(steps)]), device, steps)
    return cpu(module.parameters()), {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("name", sorted(objectives()))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_losses_and_gradients_are_the_cpus(name: str, dtype: torch.dtype, tolerance: float) -> None:
    sides = []
    for device in (CPU, DEVICE):
        module = objectives()[name]()
        module.adopt(answer_model("llama", dtype), load_tokenizer("tiny"))
        module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
        module.to(device)
        loss = module.training_step(moved(batch(0), device), 0)
        loss.backward()
        sides.append((loss.item(), cpu(p.grad for p in module.parameters())))
    (expected, gradients), (found, there) = sides
    assert found == pytest.approx(expected, rel=tolerance)
    assert distance(there, gradients) < tolerance


@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize("anchor", ["previous", "original"])
def test_ssiuu_steps_are_the_cpus_in_float64(mode: str, anchor: str) -> None:
    options = {"weight_mode": mode, "anchor": anchor, "weight": 0.5 if mode == "relative" else 1000.0}
    expected, figures = trained(CPU, torch.float64, **options)
    found, there = trained(DEVICE, torch.float64, **options)
    assert figures["train/penalty_gradient_norm"] > 0
    assert distance(found, expected) < 1e-10
    for name, value in figures.items():
        assert there[name] == pytest.approx(value, rel=1e-8), name


def test_attributions_and_influence_are_the_cpus() -> None:
    parts = [batch(seed)["forget"] for seed in range(2)]
    sides = []
    for device in (CPU, DEVICE):
        before = answer_model("llama", torch.float64).to(device)
        after = copy.deepcopy(before)
        with torch.no_grad():
            for parameter in after.parameters():
                parameter.mul_(0.9)
        sites = neuron_sites(before.hf)
        sides.append(influence_variation(*(neuron_attribution(model, parts, sites) for model in (before, after))))
    expected, found = sides
    assert expected.d_minus.sum() > 0
    for name in ("d_plus", "d_minus"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-8, atol=1e-14)
    for name in ("maximum", "positive", "minimum"):
        torch.testing.assert_close(getattr(found.after, name), getattr(expected.after, name), rtol=1e-8, atol=1e-14)


def test_scores_are_the_cpus() -> None:
    data = FewFacts(multiple_choice=True)
    sides = []
    for device in (CPU, DEVICE):
        model = AnswerModel(load_model("tiny")).to(device)
        scores = ["probability", "multiple_choice", "all_tokens", "rouge_l"]
        sides.append(evaluate(model, data.tokenizer, data.val_dataloader(), scores))
    expected, found = sides
    assert expected["forget"]["rouge_l"] > 90
    for split, scores in expected.items():
        assert found[split] == pytest.approx(scores, abs=0.01)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_steps(precision: str) -> None:
    """Near the float32 run's losses and penalty; A stays in float32."""
    runs = {}
    for name in ("32-true", precision):
        module = SSIUU(regularizer=regularizer(), optimizer=lambda p: torch.optim.AdamW(p, lr=2e-4))
        before = weights(AnswerModel(load_model("tiny")))
        trainer = fit(module, FewFacts(), DEVICE, 3, precision=name)
        runs[name] = {key: float(value) for key, value in trainer.callback_metrics.items()}
        assert distance(cpu(module.parameters()), before) > 1e-4
    anchor = module.regularizer.state()["anchor"]  # type: ignore[union-attr]
    assert {tensor.dtype for tensor in anchor.values()} == {torch.float32}
    for name, value in runs["32-true"].items():
        assert math.isfinite(runs[precision][name])
        if "loss" in name:
            assert runs[precision][name] == pytest.approx(value, rel=0.2, abs=0.05), name


@pytest.mark.parametrize("width", ["8bit", "4bit"])
def test_adapters_on_quantised_weights_train(width: Any) -> None:
    pytest.importorskip("peft")

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        import bitsandbytes

        return bitsandbytes.optim.PagedAdamW8bit(parameters, lr=1e-3)

    module = SSIUU(regularizer=regularizer(), quantization=width, lora=LoRA(r=4), optimizer=optimizer)
    trainer = fit(module, FewFacts(), DEVICE, 4, precision="bf16-true")
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["train/penalty_gradient_norm"] > 0
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert any(p.abs().sum() > 0 for name, p in trainable.items() if "lora_B" in name)  # B starts at zero


def test_checkpointing_changes_no_gradient() -> None:
    sides = []
    for checkpointing in (False, True):
        module = GradientDifference(gradient_checkpointing=checkpointing, regularizer=regularizer())
        module.adopt(answer_model("llama", torch.float64).train(), load_tokenizer("tiny"))
        module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
        module.to(DEVICE)
        for seed in range(2):
            module.zero_grad()
            module.training_step(moved(batch(seed), DEVICE), 0).backward()
            module.on_before_optimizer_step(None)  # type: ignore[arg-type]
        sides.append(cpu(p.grad for p in module.parameters()))
    assert distance(sides[1], sides[0]) < 1e-10


def test_anchor_from_a_file_comes_back_to_the_device(tmp_path: Path) -> None:
    module = GradientDifference(regularizer=(whole := regularizer()))
    module.adopt(answer_model("llama", torch.float64), load_tokenizer("tiny"))
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    module.to(DEVICE)

    def step(seed: int) -> list[torch.Tensor]:
        module.zero_grad()
        module.training_step(moved(batch(seed), DEVICE), 0).backward()
        module.on_before_optimizer_step(None)  # type: ignore[arg-type]
        return cpu(p.grad for p in module.parameters())

    step(0)
    torch.save(whole.state(), tmp_path / "state.pt")
    expected = step(1)
    module.regularizer = regularizer()
    module.regularizer.load_state(torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True))
    assert distance(step(1), expected) < 1e-12
    module.regularizer = regularizer()  # without an anchor there is no penalty: the comparison can fail
    assert distance(step(1), expected) > 1e-3


def test_resumed_run_draws_the_same_dropout(tmp_path: Path) -> None:
    checkpoint = gpt2_with_dropout(tmp_path / "gpt2")

    def run(seed: int, resume: Path | None, keep: bool) -> list[torch.Tensor]:
        L.seed_everything(seed, verbose=False)
        module = SSIUU(
            regularizer=regularizer(), checkpoint=checkpoint, optimizer=lambda p: torch.optim.SGD(p, lr=0.05)
        )
        saving = [ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)] if keep else []
        # float64 and SGD: what a GPU adds up in another order is then far below what other dropout does
        trainer = bare_trainer(
            4,
            accelerator=DEVICE.type,
            precision="64-true",
            callbacks=saving,
            enable_checkpointing=keep,
            default_root_dir=tmp_path,
            check_val_every_n_epoch=10**6,
        )
        trainer.fit(module, datamodule=FewFacts(tokenizer=checkpoint), ckpt_path=resume)
        return cpu(module.parameters())

    whole = run(0, None, keep=True)
    assert distance(run(1, tmp_path / "step=2.ckpt", keep=False), whole) < 1e-10
    assert distance(run(1, None, keep=False), whole) > 1e-6
