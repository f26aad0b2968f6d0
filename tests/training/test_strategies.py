"""What a strategy or a precision cannot do is refused by name; DeepSpeed's stages train what one process does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, Precision, TransformerEnginePrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from toys import jobs as rank_jobs
from toys.cli import RECIPES, SHORT, fit
from toys.data import byte_tokenizer
from toys.jobs import Job
from toys.models import bare_trainer, random_model

from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.regularizers import AttributionRegularizer
from lightning_ssiuu.training.strategies import check_installed, check_strategy
from lightning_ssiuu.utils.errors import UserError

STATIC = ["--trainer.strategy", '{"class_path": "DDPStrategy", "dict_kwargs": {"static_graph": true}}']
RELATIVE = {"weight": 0.5, "weight_mode": "relative", "target": "length_normalised"}


def of(kind: type[Any], **attributes: Any) -> Any:
    """An object of a class that cannot be made on this machine, with as much of it as is asked for."""
    made = object.__new__(kind)
    vars(made).update(attributes)
    return made


def trainer(strategy: Any = None, launcher: Any = None, precision: str = "32-true", **given: Any) -> Any:
    strategy = strategy or of(SingleDeviceStrategy)
    strategy._launcher = launcher
    plain = {"precision_plugin": Precision(), "accelerator": CPUAccelerator(), "accumulate_grad_batches": 1}
    return SimpleNamespace(strategy=strategy, precision=precision, **{**plain, **given})


def zero(stage: int | None = 2, config: dict[str, Any] | None = None, **options: Any) -> Any:
    parts = {} if stage is None else {"zero_optimization": {"stage": stage, **options}}
    return of(DeepSpeedStrategy, config=parts | (config or {}), _ddp_kwargs={})


def on_gpu(strategy: Any, **given: Any) -> Any:
    return trainer(strategy, accelerator=of(CUDAAccelerator), **given)


def module(regularized: bool = False, **kwargs: Any) -> GradientDifference:
    return GradientDifference(regularizer=AttributionRegularizer() if regularized else None, **kwargs)


def quantised() -> GradientDifference:
    return module(lora=LoRA(2), quantization="4bit")


ALWAYS = {
    "spawn": (
        trainer(DDPStrategy(), of(_MultiProcessingLauncher, _start_method="spawn")),
        "trainer.strategy: got 'spawn', allowed: \"ddp\", whose processes run the command again; spawned or forked "
        "ones do not give their model back",
    ),
    "fsdp1": (
        trainer(of(FSDPStrategy)),
        "trainer.strategy: got 'FSDPStrategy', allowed: ModelParallelStrategy (FSDP2, recipes/scale/fsdp2.yaml): "
        "FSDP1 melts a layer's weights into one",
    ),
    "bitsandbytes": (
        trainer(precision_plugin=of(BitsandbytesPrecision)),
        "trainer.plugins: got 'BitsandbytesPrecision', allowed: 32-true, bf16-mixed or bf16-true; narrower weights "
        "are model.quantization",
    ),
    "transformer-engine": (
        trainer(precision_plugin=of(TransformerEnginePrecision)),
        "trainer.plugins: got 'TransformerEnginePrecision', allowed: 32-true, bf16-mixed or bf16-true; narrower "
        "weights are model.quantization",
    ),
    "zero on a cpu": (
        trainer(zero()),
        "trainer.accelerator: got 'CPUAccelerator', allowed: a CUDA GPU under DeepSpeed; ddp and FSDP2 run on CPUs, "
        "too",
    ),
    "zero accumulates": (
        on_gpu(zero(), accumulate_grad_batches=2),
        "trainer.accumulate_grad_batches: got 2, allowed: 1 under DeepSpeed: Lightning and the engine would both "
        "divide the loss by it",
    ),
}
HALF = "allowed: 32-true, bf16-mixed or bf16-true with a regularizer, whose gradient is too small for float16"
OFFLOADED = "allowed: false with a regularizer: its gradient has not been seen to arrive in offloaded memory"
REGULARIZED = {
    "static graph": (
        trainer(DDPStrategy(static_graph=True)),
        "trainer.strategy.static_graph: got True, allowed: false with a regularizer, whose second backward pass a "
        "static graph does not know: the ranks' weights would drift apart",
    ),
    "16-mixed": (trainer(precision="16-mixed"), f"trainer.precision: got '16-mixed', {HALF}"),
    "16-true": (on_gpu(zero(), precision="16-true"), f"trainer.precision: got '16-true', {HALF}"),
    "fp16": (
        on_gpu(zero(config={"fp16": {"enabled": True}})),
        f"trainer.strategy.config.fp16.enabled: got True, {HALF}",
    ),
    "no zero": (
        on_gpu(zero(None)),
        "trainer.strategy.stage: got None, allowed: 1, 2 or 3 with a regularizer; without ZeRO, take strategy ddp",
    ),
    "offloaded optimiser": (
        on_gpu(zero(offload_optimizer={"device": "cpu"})),
        f"trainer.strategy.offload_optimizer: got True, {OFFLOADED}",
    ),
    "offloaded weights": (
        on_gpu(zero(3, offload_param={"device": "nvme"})),
        f"trainer.strategy.offload_parameters: got True, {OFFLOADED}",
    ),
}


def refusal(trainer: Any, module: GradientDifference) -> str:
    with pytest.raises(UserError) as refused:
        check_strategy(trainer, module)
    return str(refused.value)


@pytest.mark.parametrize("name", ALWAYS)
def test_refused_whatever_is_trained(name: str) -> None:
    given, text = ALWAYS[name]
    assert refusal(given, module()) == refusal(given, module(regularized=True)) == text


@pytest.mark.parametrize("name", REGULARIZED)
def test_refused_with_a_regularizer_alone(name: str) -> None:
    given, text = REGULARIZED[name]
    check_strategy(given, module())
    assert refusal(given, module(regularized=True)) == text


def test_quantised_weights_are_not_cut_by_stage_3() -> None:
    text = "model.quantization: got '4bit', allowed: null under ZeRO stage 3, which cannot cut quantised weights; "
    assert refusal(on_gpu(zero(3)), quantised()) == text + "stage 2 and ddp hold them whole"
    check_strategy(on_gpu(zero(2)), quantised())


@pytest.mark.parametrize(
    "given",
    [
        trainer(),
        trainer(accumulate_grad_batches=4),
        trainer(precision="bf16-mixed"),
        trainer(precision="64-true"),
        trainer(DDPStrategy(gradient_as_bucket_view=True, find_unused_parameters=True), accumulate_grad_batches=2),
        trainer(ModelParallelStrategy(2, 1), precision="bf16-true"),
        *(on_gpu(zero(stage)) for stage in (1, 2, 3)),
        on_gpu(zero(offload_optimizer={"device": "none"})),
    ],
    ids=lambda given: type(given.strategy).__name__,
)
def test_allowed(given: Any) -> None:
    check_strategy(given, module(regularized=True))


def test_a_trainer_asks_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ssiuu.objectives.base.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="precision: got '16-true'"):
        bare_trainer(1, precision="16-true").fit(module(regularized=True), [0])


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", SimpleNamespace(class_path="a.DeepSpeedStrategy")])
def test_an_engine_that_is_not_there(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ssiuu.training.strategies.find_spec", lambda _: None)
    with pytest.raises(UserError) as refused:
        check_installed({"strategy": strategy})
    assert str(refused.value).endswith('allowed: ddp or FSDP2, or pip install "lightning-ssiuu[deepspeed]" first')
    monkeypatch.setattr("lightning_ssiuu.training.strategies.find_spec", lambda _: object())
    check_installed({"strategy": strategy})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--config", RECIPES / "scale" / "deepspeed.yaml"], "error: trainer.strategy: got 'lightning.pytorch.strat"),
        (["--trainer.strategy", "deepspeed_stage_3"], "error: trainer.strategy: got 'deepspeed_stage_3', allowed: ddp"),
        (["--trainer.precision", "transformer-engine"], "error: trainer.precision: got 'transformer-engine', allowed"),
        (["--trainer.strategy", "ddp_spawn"], "error: trainer.strategy: got 'spawn', allowed: \"ddp\""),
        (STATIC, "error: trainer.strategy.static_graph: got True, allowed: false"),
    ],
)
def test_the_command_line_says_it_in_one_line(options: list[Any], text: str, tmp_path: Path) -> None:
    if "deepspeed" in str(options) and importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("deepspeed is there")
    result = fit(tmp_path / "run", *SHORT, *options, recipe=RECIPES / "objective" / "ssiuu.yaml")
    assert result.status == 2
    assert text in result.err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_deepspeed_trains_what_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own strategy, but for its insistence on a GPU."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed = pytest.importorskip("deepspeed")
    from lightning.pytorch.strategies import deepspeed as lightning_deepspeed

    class OnCPU(DeepSpeedStrategy):
        def setup_environment(self) -> None:
            super(DeepSpeedStrategy, self).setup_environment()

        def _get_process_group_backend(self) -> str:
            return "gloo"

        def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
            trained = [p for p in model.parameters() if p.requires_grad]
            made = {"model": model, "model_parameters": trained, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
            return deepspeed.initialize(config=self.config, dist_init_required=False, **made)[:2]

    stages = [f"zero{stage}" for stage in (1, 2, 3)]
    for stage, name in enumerate(stages, 1):
        StrategyRegistry.register(name, OnCPU, stage=stage, override=True)
    monkeypatch.setattr(lightning_deepspeed, "_validate_device_index_selection", lambda _: None)
    monkeypatch.setattr(rank_jobs, "_load_model", load_model)  # stage 3 has to see every module made
    tiny = {"vocab_size": 260, "tie_word_embeddings": True, "max_position_embeddings": 64}
    random_model("llama", torch.float32, **tiny).save_pretrained(tmp_path / "plain")
    byte_tokenizer().save_pretrained(tmp_path / "plain")

    def jobs(strategy: str) -> list[Job]:
        return [
            Job("plain", strategy, "GradientDifference"),
            Job("one pass", strategy, "GradientAscent", RELATIVE),
            Job("recomputed", strategy, "GradientAscent", RELATIVE, module={"gradient_checkpointing": True}),
            Job("clipped", strategy, "SSIUU", RELATIVE, trainer={"gradient_clip_val": 0.1}, optimizer="adamw"),
            Job("modules", strategy, "SSIUU", RELATIVE | {"modules": ["mlp_up"]}),
            Job("whole", strategy, "SSIUU", RELATIVE, steps=4, save="{strategy}-{step}"),
            Job("resumed", strategy, "SSIUU", RELATIVE, steps=4, resume=strategy),
        ]

    one = rank_jobs.run(1, jobs("auto"), tmp_path)
    two = rank_jobs.run(2, [job for stage in stages for job in jobs(stage)], tmp_path, timeout=600)
    for (name, _), results in two.items():
        expected = one["whole" if name == "resumed" else name, "auto"][0]
        for result in results:
            assert "mistake" not in result, result
            assert result["steps"] == expected["steps"]
            assert result["figures"] == pytest.approx(expected["figures"], rel=1e-5)
            for ours, theirs in zip(result["weights"], expected["weights"], strict=True):
                assert torch.linalg.vector_norm(ours - theirs) <= 1e-6 * torch.linalg.vector_norm(theirs)
