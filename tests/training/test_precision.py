"""Training in other types than float32, and optimisers whose states are in 8 bits; resumed runs keep every bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bitsandbytes
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toys.cli import SHORT, fit, read_json
from toys.models import equal, weights
from toys.training import FewFacts
from transformers import AutoModelForCausalLM

from lightning_ssiuu.callbacks import SavePretrained
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.models.lora import LoRA, adapter_parameters
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.regularizers import AttributionRegularizer
from lightning_ssiuu.utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's on checkpoints, bitsandbytes' on paging on a CPU


class Norms(L.Callback):
    """Keeps what the regulariser logs."""

    def __init__(self) -> None:
        self.penalties: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if "train/penalty_gradient_norm" in trainer.callback_metrics:
            self.penalties.append(float(trainer.callback_metrics["train/penalty_gradient_norm"]))


def run(
    folder: Path,
    steps: int,
    optimizer: Any = None,
    resume: Path | None = None,
    precision: Any = "32-true",
    **kwargs: Any,
) -> tuple[SSIUU, L.Trainer, Norms]:
    """A few steps on the embedded model; the first run keeps a checkpoint of every one."""
    L.seed_everything(0 if resume is None else 1, verbose=False)
    optimizer = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    regularizer = AttributionRegularizer(0.3, "relative", target="length_normalised")
    module, norms = SSIUU(optimizer=optimizer, regularizer=regularizer, **kwargs), Norms()
    keep = [] if resume else [ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        precision=precision,
        callbacks=[norms, SavePretrained(), *keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=resume is None,
        default_root_dir=folder,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=FewFacts(4, batch_size=2, retain_batch_size=2), ckpt_path=resume)
    assert trainer.global_step == steps
    return module, trainer, norms


def assert_sound(module: SSIUU, norms: Norms, kept: torch.dtype) -> None:
    assert all(p.isfinite().all() for p in module.parameters() if p.is_floating_point())
    assert module.regularizer is not None
    anchors = module.regularizer.state()["anchor"].values()
    assert {anchor.dtype for anchor in anchors} == {kept}
    assert any(anchor.any() for anchor in anchors)
    assert norms.penalties
    assert all(math.isfinite(value) and value > 0 for value in norms.penalties)


@pytest.mark.parametrize(
    ("precision", "stored", "anchor"),
    [
        ("bf16-mixed", torch.float32, torch.float32),
        ("bf16-true", torch.bfloat16, torch.float32),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_every_weight_trains_in_other_types(
    precision: str, stored: torch.dtype, anchor: torch.dtype, tmp_path: Path
) -> None:
    module, _, norms = run(tmp_path, 3, precision=precision)
    assert {p.dtype for p in module.parameters()} == {stored}
    assert_sound(module, norms, anchor)
    original = load_model("tiny", stored)
    # In bfloat16 the weights of norms, all near 1, are too coarse to move by a step of 1e-3.
    pairs = zip(original.parameters(), module.model.hf.parameters(), strict=True)
    assert not any(torch.equal(before, after) for before, after in pairs if before.dim() > 1)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert equal(saved.parameters(), module.model.hf.parameters())
    assert equal(load_model(tmp_path / "model", stored).parameters(), saved.parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_adapters_stay_in_32_bits(precision: str, tmp_path: Path) -> None:
    module, _, norms = run(tmp_path, 3, precision=precision, lora=LoRA(r=2))
    assert_sound(module, norms, torch.float32)
    hf, matrices = module.model.hf, adapter_parameters(module.model.hf)
    assert {p.dtype for p in matrices.values()} == {torch.float32}
    # Not only in a wide type: with bits in it that bfloat16 has not.
    assert not any(torch.equal(p, p.bfloat16().float()) for p in matrices.values())
    assert all(p.any() for p in matrices.values())
    frozen = {n.replace(".base_layer", ""): p for n, p in hf.named_parameters() if ".lora_" not in n}
    original = load_model("tiny", hf.dtype)
    assert hf.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert equal(frozen.values(), [original.get_parameter(name) for name in frozen])


def test_4bit_under_64_bit_floats_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantization"):
        run(tmp_path, 1, precision="64-true", lora=LoRA(r=2), quantization="4bit")


# The states of up to 4096 elements stay in 32 bits: here some do, some do not.
MLP = {"r": 12, "target_modules": ["up_proj", "down_proj"]}


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (bitsandbytes.optim.AdamW8bit, {}),
        (bitsandbytes.optim.PagedAdamW8bit, {"lora": LoRA(**MLP), "quantization": "4bit"}),
        (bitsandbytes.optim.PagedAdamW8bit, {"lora": LoRA(**MLP), "quantization": "8bit", "precision": "bf16-true"}),
        (bitsandbytes.optim.Lion8bit, {"lora": LoRA(**MLP, dropout=0.1)}),
    ],
    ids=["AdamW8bit", "PagedAdamW8bit-4bit", "PagedAdamW8bit-8bit-bf16", "Lion8bit-dropout"],
)
def test_8bit_optimisers_resume_to_the_same_bits(optimizer: Any, options: dict[str, Any], tmp_path: Path) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return optimizer(parameters, lr=1e-3, weight_decay=0.0)

    whole, trainer, _ = run(tmp_path, 3, make, **options)
    kinds = {state["state1"].dtype for state in trainer.optimizers[0].state.values()}
    assert kinds == {torch.uint8, torch.float32}
    again, _, _ = run(tmp_path, 3, make, tmp_path / "step=1.ckpt", **options)
    assert equal(weights(whole), weights(again))
    names = torch.load(tmp_path / "step=1.ckpt", weights_only=True)["state_dict"].keys()
    if "lora" in options:
        assert names == {name for name, p in whole.named_parameters() if p.requires_grad}
    else:
        assert names == whole.state_dict().keys()


def test_the_command_trains_under_mixed_precision(tmp_path: Path) -> None:
    runs = {}
    for precision in ("32-true", "bf16-mixed"):
        assert fit(tmp_path / precision, *SHORT, "--trainer.precision", precision).status == 0
        runs[precision] = read_json(tmp_path / precision / "metrics.json")
    narrow, wide = runs["bf16-mixed"], runs["32-true"]
    assert narrow["steps"] == wide["steps"] > 0
    for split, scores in wide["after"]["scores"].items():
        for name, value in scores.items():
            assert narrow["after"]["scores"][split][name] == pytest.approx(value, abs=3.0), (split, name)
    assert narrow["after"] != wide["after"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16-mixed" / "model", dtype="auto")
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
