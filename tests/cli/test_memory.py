"""What ``--estimate-memory`` says: its parts in closed form, the whole beside what torch then allocates."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from rich.console import Console
from torch import nn
from toys.cli import DEFAULT, FAST, RECIPES, command, files
from toys.models import bare_trainer, random_model
from toys.training import FewFacts

from lightning_ssiuu import (
    AttributionRegularizer,
    ElicitedStop,
    ForgetThresholdStopping,
    GradientDifference,
    NeuronAttributionCallback,
)
from lightning_ssiuu.callbacks import WalkBack
from lightning_ssiuu.cli.memory import MemoryEstimate, estimate_memory, print_estimate
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives import UnlearningModule, objectives
from lightning_ssiuu.objectives.elicited_unlearning import ElicitedUnlearning
from lightning_ssiuu.objectives.npo import NPO
from lightning_ssiuu.objectives.selective_unlearning import SelectiveUnlearning
from lightning_ssiuu.utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("small")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "vocab_size": 1024,
        "tie_word_embeddings": True,
        "num_hidden_layers": 1,
    }
    random_model("llama", torch.float32, **sizes).save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def objective(checkpoint: str, weight: float | None = None, **kwargs: Any) -> GradientDifference:
    regularizer = None if weight is None else AttributionRegularizer(weight, "relative")
    return GradientDifference(checkpoint, regularizer=regularizer, **{"scores": ["multiple_choice"]} | kwargs)


def many_to_score(batch_size: int = 1) -> FewFacts:
    """Evaluation batches so large that scoring is the worst moment: only what outlives a step is beside it."""
    return FewFacts(n=20, batch_size=batch_size, eval_batch_size=64)


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def size(found: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in found)


def loaded(module: GradientDifference) -> GradientDifference:
    module.configure_model()
    return module


def at_scoring(module: GradientDifference, **kwargs: Any) -> MemoryEstimate:
    estimate = estimate_memory(module, many_to_score(), bare_trainer(2, **kwargs))
    assert estimate.phase == "scoring"
    return estimate


@pytest.mark.parametrize(
    ("optimizer", "copies", "weight", "anchors"), [(adamw, 2, 0.5, 1), (adamw, 2, 0.0, 0), (sgd, 0, None, 0)]
)
def test_parts_in_closed_form(
    checkpoint: str, optimizer: Callable[..., Any], copies: int, weight: float | None, anchors: int
) -> None:
    uses = at_scoring(objective(checkpoint, weight, optimizer=optimizer)).uses
    real = loaded(objective(checkpoint))
    parameters = list(real.parameters())
    counters = 4 * len(parameters) if copies else 0  # AdamW's step numbers
    assert uses["weights"] == size(tensors(real))
    assert uses["gradients"] == size(parameters)
    assert uses["optimizer"] == copies * size(parameters) + counters
    assert uses["attribution"] == anchors * size(parameters)
    assert uses["activations"] > 0


def test_adapters_alone_have_gradients_states_and_an_anchor(checkpoint: str) -> None:
    make = {"lora": LoRA(r=4), "optimizer": adamw}
    uses = at_scoring(objective(checkpoint, 0.5, **make)).uses
    real = loaded(objective(checkpoint, **make))
    trained = [p for p in real.parameters() if p.requires_grad]
    assert uses["weights"] == size(tensors(real))
    assert uses["gradients"] == uses["attribution"] == size(trained)
    assert uses["optimizer"] == 2 * size(trained) + 4 * len(trained)


@pytest.mark.parametrize(("quantization", "bits"), [("8bit", 8), ("4bit", 4)])
def test_quantised_weights(checkpoint: str, quantization: Any, bits: int) -> None:
    lora = LoRA(r=4)
    narrow = at_scoring(objective(checkpoint, lora=lora, quantization=quantization)).uses["weights"]
    wide = size(tensors(loaded(objective(checkpoint, lora=lora))))
    hf = loaded(objective(checkpoint)).model.hf
    layers = [m for name, m in hf.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    numbers, rows = sum(m.weight.numel() for m in layers), sum(m.out_features for m in layers)
    if bits == 8:
        assert wide - narrow == 3 * numbers - 4 * rows  # one byte instead of four, a scale for each row
    else:
        # Half a byte; a scale of one byte for 64 numbers, one of four for 256 of those; two tables and an offset.
        scales = sum(m.weight.numel() // 64 + 4 * -(-m.weight.numel() // 64 // 256) for m in layers)
        tables = len(layers) * 4 * (16 + 256 + 1)
        assert wide - narrow == pytest.approx(3.5 * numbers - scales - tables, abs=4 * len(layers))


def test_narrow_weights(checkpoint: str) -> None:
    narrow = at_scoring(objective(checkpoint), precision="bf16-true").uses
    real = loaded(objective(checkpoint))
    assert narrow["gradients"] == size(list(real.parameters())) // 2
    assert narrow["weights"] == pytest.approx(size(tensors(real)) / 2, rel=1e-3)  # rotary frequencies stay wide


def test_an_original_model_to_compare_with(checkpoint: str) -> None:
    def weights(module: UnlearningModule) -> int:
        return estimate_memory(module, many_to_score(), bare_trainer(2)).uses["weights"]

    once = size(tensors(loaded(objective(checkpoint))))
    plain, cached, second = (
        weights(module)
        for module in (
            objective(checkpoint),
            NPO(checkpoint=checkpoint, scores=["multiple_choice"]),
            NPO(checkpoint=checkpoint, scores=["multiple_choice"], reference="second_model"),
        )
    )
    assert plain == cached == pytest.approx(second - once, rel=1e-3)
    kl = estimate_memory(objective(checkpoint, retain="kl"), many_to_score(), bare_trainer(2))
    assert kl.by_phase["reference"] > once


@pytest.mark.parametrize("name", ["AltPO", "SelectiveUnlearning"])
def test_what_an_objective_takes_from_the_examples_is_not_needed(name: str, checkpoint: str) -> None:
    data = FewFacts(n=1, batch_size=1)
    estimate = estimate_memory(objectives()[name](checkpoint=checkpoint), data, bare_trainer(2))
    assert "unaware model" not in estimate.by_phase


def test_an_unaware_model_is_there_beside_the_trained_one(checkpoint: str) -> None:
    n_bytes = size(list(loaded(objective(checkpoint)).parameters()))
    module = SelectiveUnlearning(checkpoint=checkpoint, unaware=checkpoint)
    estimate = estimate_memory(
        ElicitedUnlearning(backbone=module, checkpoint=checkpoint), FewFacts(n=1, batch_size=1), bare_trainer(2)
    )
    assert 2 * n_bytes <= estimate.by_phase["unaware model"] < 3 * n_bytes


def test_a_look_with_an_adversary(checkpoint: str) -> None:
    module = objective(checkpoint, optimizer=adamw)
    n_bytes = size([p for p in loaded(objective(checkpoint)).parameters() if p.requires_grad])
    stop = ForgetThresholdStopping(elicited=ElicitedStop(batch_size=1))
    estimate = estimate_memory(module, FewFacts(n=1, batch_size=1), bare_trainer(2, callbacks=[stop]))
    # Weights, gradients and AdamW's two, of the run; a copy, gradients and AdamW's two for the adversary.
    assert 8 * n_bytes <= estimate.by_phase["elicited look"] < 9.5 * n_bytes


def test_the_way_back(checkpoint: str) -> None:
    n_bytes = size([p for p in loaded(objective(checkpoint)).parameters() if p.requires_grad])
    plain, walking, averaging = (
        estimate_memory(
            objective(checkpoint, optimizer=adamw),
            FewFacts(n=1, batch_size=1),
            bare_trainer(2, callbacks=[ForgetThresholdStopping(walk_back=walk)]),
        ).by_phase
        for walk in (None, WalkBack(), WalkBack(ema_decay=0.9))
    )
    assert walking["training step"] - plain["training step"] == n_bytes  # the weights before, which the host holds here
    assert averaging["training step"] - plain["training step"] == 2 * n_bytes
    # Two copies of the weights beside what the run holds: weights, gradients and AdamW's two.
    assert 6 * n_bytes <= walking["walking back"] < 7 * n_bytes
    assert 7 * n_bytes <= averaging["walking back"] < 8 * n_bytes


def test_sharding_divides_and_replicas_do_not(checkpoint: str) -> None:
    parameters = size(list(loaded(objective(checkpoint)).parameters()))
    replicas, shards = (
        estimate_memory(objective(checkpoint, 0.5, optimizer=adamw), many_to_score(2), bare_trainer(2, **on)).uses
        for on in (
            {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")},
            {"devices": 2, "strategy": ModelParallelStrategy(2, 1, process_group_backend="gloo")},
        )
    )
    copies = {"weights": 1, "gradients": 1, "optimizer": 2, "attribution": 1}
    for use, n in copies.items():
        assert replicas[use] == pytest.approx(n * parameters, rel=0.01)
        assert shards[use] == pytest.approx(n * parameters / 2, rel=0.01)
    assert replicas["buckets"] == pytest.approx(parameters, rel=0.01)  # no gradient_as_bucket_view here
    assert shards["buckets"] == 0
    assert not dist.is_initialized()


def test_a_strategy_for_several_devices_on_one(checkpoint: str) -> None:
    uses = at_scoring(objective(checkpoint), strategy=DDPStrategy(process_group_backend="gloo")).uses
    assert uses["gradients"] == size(list(loaded(objective(checkpoint)).parameters()))


def test_what_makes_a_step_smaller_or_larger(checkpoint: str) -> None:
    def step(accumulate: int = 1, weight: float | None = None, **kwargs: Any) -> int:
        trainer = bare_trainer(2, accumulate_grad_batches=accumulate)
        module = objective(checkpoint, weight, scores=["first_token"], **kwargs)
        return estimate_memory(module, FewFacts(batch_size=8), trainer).by_phase["training step"]

    assert step(gradient_checkpointing=True) < 0.9 * step()
    assert step(accumulate=2, weight=0.5) > step(weight=0.5)


@pytest.mark.parametrize(
    ("weight", "kwargs"),
    [
        (0.5, {}),
        (None, {"gradient_checkpointing": True, "lora": LoRA(r=4)}),
        (None, {"lora": LoRA(r=4, target_modules=["gate_up_proj", "experts.down_proj"])}),
    ],
    ids=["regularised", "adapters and checkpointing", "adapters on experts"],
)
def test_within_15_percent_of_what_is_allocated(
    checkpoint: str, tmp_path: Path, weight: Any, kwargs: Any, request: pytest.FixtureRequest
) -> None:
    if "experts" in request.node.callspec.id:
        checkpoint = str(tmp_path / "experts")
        sizes = {"hidden_size": 64, "vocab_size": 1024, "num_hidden_layers": 1}
        random_model("mixtral", torch.float32, **sizes).save_pretrained(checkpoint)
        load_tokenizer("tiny").save_pretrained(checkpoint)

    def make() -> tuple[Any, ...]:
        attribution = NeuronAttributionCallback(probe_examples=4, write=False)
        trainer = bare_trainer(2, callbacks=[attribution], default_root_dir=tmp_path)
        scores = ["first_token"]
        return objective(checkpoint, weight, optimizer=adamw, scores=scores, **kwargs), FewFacts(batch_size=8), trainer

    estimate = estimate_memory(*make())
    module, data, trainer = make()
    weights = size(tensors(loaded(module)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.fit(module, data)
    events = enumerate(profiler.profiler.kineto_results.events())
    changes = sorted((event.start_ns(), n, event.nbytes()) for n, event in events if event.name() == "[memory]")
    measured = weights + max(accumulate((change for *_, change in changes), initial=0))
    assert estimate.total == pytest.approx(measured, rel=0.15)


def test_nothing_is_left_behind(checkpoint: str) -> None:
    module, trainer = objective(checkpoint, 0.5), bare_trainer(2)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    estimate = estimate_memory(module, FewFacts(), trainer)
    assert torch.equal(state, torch.get_rng_state())
    assert not module.is_loaded
    assert trainer.global_step == 0
    assert module.regularizer.state()["anchor"] is None
    assert estimate_memory(module, FewFacts(), trainer).by_phase == estimate.by_phase


def test_the_table() -> None:
    uses = {"weights": 4_000_000, "gradients": 3_000_000, "buckets": 100, "activations": 500_000}
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        estimate = MemoryEstimate("cuda", 8, "training step", uses, {"training step": 7_500_100}, paged=2_000_000)
        print_estimate(estimate, console)
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]
    assert lines[0] == "Memory per device, 8 on cuda, at the worst moment (training step)"
    assert lines[1:5] == [
        "weights 4.0 MB",
        "gradients 3.0 MB",
        "activations and temporaries 0.5 MB",
        "total 7.5 MB",
    ]
    assert "Paged optimiser states, in the host's memory: 2.0 MB" in lines
    assert not any("libraries" in line for line in lines)


# ---- the command --------------------------------------------------------------------------------------------------


def forbid(*_: Any, **__: Any) -> None:
    raise AssertionError("weights were loaded")


def test_command_prints_and_neither_loads_nor_writes(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", forbid)
    few = ("--data.init_args.batch_size", "1", "--data.init_args.retain_batch_size", "1")
    few += ("--data.init_args.max_eval_examples", "8")
    small = (*FAST, *few, "--model.init_args.checkpoint", checkpoint)
    result = command("fit", "--config", DEFAULT, "--estimate-memory", *small)
    assert result.status == 0, result.err
    names = ["weights", "gradients", "optimiser states", "attribution (g, A)", "activations and temporaries", "total"]
    rows = [line.strip() for line in result.out.splitlines()]
    assert result.out.startswith("Memory per process, 1 on cpu, at the worst moment")
    assert all(any(row.startswith(name) and row.endswith("MB") for row in rows) for name in names)
    assert files(tmp_path) == set()


def test_command_beside_an_earlier_run(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}", encoding="utf-8")
    on_two = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.default_root_dir", tmp_path)
    small = (*FAST, "--attribution.probe_examples", "0", "--model.init_args.checkpoint", checkpoint)
    recipes = ("--config", DEFAULT, "--config", RECIPES / "scale/fsdp2.yaml")
    result = command("fit", *recipes, *on_two, "--estimate_memory", *small)
    assert result.status == 0, result.err
    assert result.out.startswith("Memory per process, 2 on cpu")
    assert files(tmp_path) == {"metrics.json"}


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        (("--model.init_args.checkpoint", "/no/such/model"), "checkpoint: got '/no/such/model'"),
        (("--model.init_args.optimizer.init_args.lr", "-1"), "model.optimizer"),
        (("--trainer.max_steps", "0"), "trainer.max_steps: got 0"),
    ],
)
def test_the_same_refusals_as_the_run(options: tuple[str, ...], argument: str, tmp_path: Path) -> None:
    given = ("fit", "--config", DEFAULT, "--trainer.default_root_dir", tmp_path / "run", *options)
    estimated, refused = command(*given, "--estimate-memory"), command(*given)
    assert estimated.status == refused.status == 2
    assert argument in estimated.err
    assert estimated.err.splitlines()[-1] == refused.err.splitlines()[-1]
    assert files(tmp_path) == set()


def test_what_a_run_would_find_out_later(checkpoint: str) -> None:
    with pytest.raises(UserError, match="scores: got 'nope', allowed: one of"):
        estimate_memory(objective(checkpoint, scores=["nope"]), FewFacts(), bare_trainer(2))
    module = objective(checkpoint)
    module.regularizer = AttributionRegularizer(modules=["nope"])
    with pytest.raises(UserError, match=r"regularizer\.modules: got 'nope'"):
        estimate_memory(module, FewFacts(), bare_trainer(2))


def test_only_fit_estimates() -> None:
    result = command("validate", "--config", DEFAULT, "--estimate-memory")
    assert result.status == 2
    assert "an option that does not exist" in result.err


# ---- what cannot be estimated -------------------------------------------------------------------------------------


class Unpredictable(GradientDifference):
    """Its tensors' shapes follow from values."""

    def forget_loss(self, batch: Any) -> torch.Tensor:
        return torch.unique(self.answers(batch).logits).sum()


def test_refusals(checkpoint: str) -> None:
    with pytest.raises(UserError, match="estimate_memory: got 'Unpredictable', allowed: one whose tensors' shapes"):
        estimate_memory(Unpredictable(checkpoint), FewFacts(), bare_trainer(2))
    assert not dist.is_initialized()
    sharded = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    quantised = objective(checkpoint, lora=LoRA(r=4), quantization="8bit")
    with pytest.raises(UserError, match="quantization: got '8bit', allowed: null under FSDP2"):
        estimate_memory(quantised, FewFacts(), bare_trainer(2, devices=2, strategy=sharded))
    ready = loaded(objective(checkpoint))
    with pytest.raises(ValueError, match="loaded already"):
        estimate_memory(ready, FewFacts(), bare_trainer(2))
