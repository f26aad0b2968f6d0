"""What a strategy or a precision cannot do is refused by name, before anything is loaded."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, Precision, TransformerEnginePrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from toys.cli import RECIPES, SHORT, fit
from toys.models import bare_trainer

from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.regularizers import AttributionRegularizer
from lightning_ssiuu.training.strategies import SLOW_BF16, check_engine, check_strategy
from lightning_ssiuu.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("few_facts")

STATIC = ["--trainer.strategy", '{"class_path": "DDPStrategy", "dict_kwargs": {"static_graph": true}}']
RELATIVE = {"weight": 0.5, "weight_mode": "relative", "target": "length_normalised"}


def of(kind: type[Any], **attributes: Any) -> Any:
    """An object of a class that cannot be made on this machine, with as much of it as is asked for."""
    made = object.__new__(kind)
    vars(made).update(attributes)
    return made


class Unknown:
    """One that somebody wrote for other hardware."""


def trainer(strategy: Any = None, launcher: Any = None, precision: str = "32-true", **given: Any) -> Any:
    strategy = strategy or of(SingleDeviceStrategy)
    strategy._launcher = launcher
    plain = {"precision_plugin": Precision(), "accelerator": CPUAccelerator(), "accumulate_grad_batches": 1}
    return SimpleNamespace(strategy=strategy, precision=precision, **{**plain, **given})


def module(regularized: bool = False, **kwargs: Any) -> GradientDifference:
    return GradientDifference(regularizer=AttributionRegularizer() if regularized else None, **kwargs)


SUPPORTED = "auto, ddp, ModelParallelStrategy (FSDP2, recipes/scale/fsdp2.yaml) or a single device"
ALWAYS = {
    "spawn": (
        trainer(DDPStrategy(), of(_MultiProcessingLauncher, _start_method="spawn")),
        "trainer.strategy: got 'spawn', allowed: \"ddp\", whose processes run the command again; spawned or forked "
        "ones do not give their model back",
    ),
    "fsdp1": (
        trainer(of(FSDPStrategy)),
        f"trainer.strategy: got 'FSDPStrategy', allowed: {SUPPORTED}",
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
    "deepspeed": (
        trainer(of(DeepSpeedStrategy)),
        f"trainer.strategy: got 'DeepSpeedStrategy', allowed: {SUPPORTED}",
    ),
    "a user's": (trainer(of(Unknown)), f"trainer.strategy: got 'Unknown', allowed: {SUPPORTED}"),
}
HALF = "allowed: 32-true, bf16-mixed or bf16-true with a regularizer, whose gradient is too small for float16"
REGULARIZED = {
    "static graph": (
        trainer(DDPStrategy(static_graph=True)),
        "trainer.strategy.static_graph: got True, allowed: false with a regularizer, whose second backward pass a "
        "static graph does not know: the ranks' weights would drift apart",
    ),
    "16-mixed": (trainer(precision="16-mixed"), f"trainer.precision: got '16-mixed', {HALF}"),
    "16-true": (trainer(precision="16-true"), f"trainer.precision: got '16-true', {HALF}"),
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


@pytest.mark.parametrize("options", [{"derivative": "exact"}, {"anchor_batch": "same"}])
def test_what_runs_the_forget_parts_again_is_refused_with_cut_weights(options: Any) -> None:
    ((name, value),) = options.items()
    run = GradientDifference(regularizer=AttributionRegularizer(**options))
    check_strategy(trainer(DDPStrategy()), run)
    other = {"exact": "first_order", "same": "cached"}[value]
    text = f"regularizer.{name}: got {value!r}, allowed: {other} with weights cut over the ranks (FSDP2)"
    assert refusal(trainer(ModelParallelStrategy(2, 1)), run) == text


@pytest.mark.parametrize(
    "given",
    [
        trainer(),
        trainer(accumulate_grad_batches=4),
        trainer(precision="bf16-mixed"),
        trainer(precision="64-true"),
        trainer(DDPStrategy(gradient_as_bucket_view=True, find_unused_parameters=True), accumulate_grad_batches=2),
        trainer(ModelParallelStrategy(2, 1), precision="bf16-true"),
    ],
    ids=lambda given: type(given.strategy).__name__,
)
def test_allowed(given: Any) -> None:
    check_strategy(given, module(regularized=True))


def test_a_trainer_asks_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ssiuu.models.source.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="precision: got '16-true'"):
        bare_trainer(1, precision="16-true").fit(module(regularized=True), [0])


FSDP1 = "lightning.pytorch.strategies.FSDPStrategy"


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "fsdp", "xla", SimpleNamespace(class_path=FSDP1)], ids=str)
def test_an_engine_is_refused_by_name(strategy: Any) -> None:
    name = strategy if isinstance(strategy, str) else strategy.class_path
    with pytest.raises(UserError) as refused:
        check_engine({"strategy": strategy})
    assert str(refused.value) == f"trainer.strategy: got '{name}', allowed: {SUPPORTED}"


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        ("no_such.X", "no module no_such"),
        ("torch.optim.AdamX", "torch.optim has no AdamX"),
        ("dpp", "did you mean 'ddp'"),
        ("DDPStrategy", "a class as a mapping, {class_path: DDPStrategy}"),
    ],
)
def test_it_is_said_why_there_is_none(strategy: str, why: str) -> None:
    with pytest.raises(UserError, match=re.escape(why)):
        check_engine({"strategy": strategy})


@pytest.mark.parametrize("strategy", [None, "auto", "ddp", "DDP", "ddp_find_unused_parameters_true"])
def test_other_names_are_left_to_the_trainer(strategy: Any) -> None:
    check_engine({"strategy": strategy})
    check_engine({"strategy": SimpleNamespace(class_path="lightning.pytorch.strategies.ModelParallelStrategy")})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--trainer.strategy", "DeepSpeedStrategy"], f"DeepSpeedStrategy', allowed: {SUPPORTED}"),
        (
            ["--trainer.strategy", "deepspeed_stage_3"],
            f"strategy: got 'deepspeed_stage_3', allowed: {SUPPORTED}",
        ),
        (["--trainer.precision", "transformer-engine"], "error: trainer.precision: got 'transformer-engine', allowed"),
        (["--trainer.strategy", "ddp_spawn"], "error: trainer.strategy: got 'spawn', allowed: \"ddp\""),
        (STATIC, "error: trainer.strategy.static_graph: got True, allowed: false"),
    ],
)
def test_the_command_line_says_it_in_one_line(options: list[Any], text: str, tmp_path: Path) -> None:
    result = fit(tmp_path / "run", *SHORT, *options, recipe=RECIPES / "objective" / "ssiuu.yaml")
    assert result.status == 2
    assert text in result.err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("precision", "capability", "told"),
    [
        ("bf16-mixed", "AVX2", True),
        ("bf16-true", "AVX2", True),
        ("bf16-mixed", "AVX512", False),
        ("32-true", "AVX2", False),
    ],
)
def test_slow_arithmetic_is_told(
    precision: Any, capability: str, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        check_strategy(trainer(precision=precision), GradientDifference())
    lines = [record.getMessage() for record in caplog.records if SLOW_BF16 in record.getMessage()]
    assert lines == ([f"trainer.precision {precision}: {SLOW_BF16}."] if told else [])
