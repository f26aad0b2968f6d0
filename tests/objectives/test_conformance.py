"""What every objective has to do, whoever wrote it: all that the registry finds are put through the same."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from toys.data import Toy, byte_tokenizer
from toys.models import bare_trainer, equal, random_model, weights
from toys.support import ANY_VALUE, BAD_OPTIONS, FEATURES, REFUSES, SCRIPT, refusal, with_support

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.models.lora import LoRA, adapter_parameters
from lightning_ssiuu.models.quantization import is_quantized
from lightning_ssiuu.objectives import UnlearningModule, objectives
from lightning_ssiuu.regularizers import AttributionRegularizer
from lightning_ssiuu.utils.errors import UserError

NAMES = sorted(objectives())
every_objective = pytest.mark.parametrize("name", NAMES)
#: One block is enough here; what spans several is tested where it is computed.
SMALL = {"vocab_size": 260, "tie_word_embeddings": True, "num_hidden_layers": 1}
PENALTY = {"weight": 1.0, "weight_mode": "relative", "target": "length_normalised"}


class Twice:
    """The training loader, every batch two times in a row."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.dataset, self.collate_fn = loader, loader.dataset, loader.collate_fn

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield batch
            yield batch

    def __len__(self) -> int:
        return 2 * len(self.loader)


class Data(Toy):
    """Six forget examples in batches of four, so that a step looks across the seam of two epochs."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__(batch_size=4)
        self.twice = twice

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        return Twice(loader) if self.twice else loader


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_SSIUU_CACHE", str(tmp_path / "cache"))


def made(name: str, **kwargs: Any) -> UnlearningModule:
    options = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5)} | kwargs
    return objectives()[name](**options)


@cache
def wrapped(dtype: torch.dtype, rank: int | None, wide: str | None, quantization: Any) -> AnswerModel:
    """What modules get copies of: a toy, or what lies in a folder, with adapters where a rank is given."""
    hf = random_model("llama", dtype, **SMALL) if wide is None else load_model(wide, quantization=quantization)
    if rank is not None:
        torch.manual_seed(3)
        LoRA(r=rank).attach(hf)
    return AnswerModel(hf)


def adopted(module: UnlearningModule, dtype: torch.dtype = torch.float64, wide: str | None = None) -> UnlearningModule:
    rank = None if module.lora is None else module.lora.r
    module.adopt(copy.deepcopy(wrapped(dtype, rank, wide, module.quantization)), byte_tokenizer())
    return module


SCORED = {"limit_val_batches": 1.0}  # at the end of every epoch, a third of a run's time


def trained(module: UnlearningModule, steps: int = 2, resume: Any = None, twice: bool = False, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    options = {"limit_val_batches": 0} | ({"accumulate_grad_batches": 2} if twice else {})
    trainer = bare_trainer(steps, **(options | kwargs))
    trainer.fit(module, Data(twice), ckpt_path=resume)
    assert trainer.global_step == steps
    return module


@cache
def first(name: str) -> UnlearningModule:
    """Trained for two steps with nothing but defaults."""
    return trained(adopted(made(name)), **SCORED)


def plain(name: str) -> list[torch.Tensor]:
    """Its weights."""
    return weights(first(name))


def taking(option: str) -> Any:
    """For all objectives that do not refuse an option."""
    return pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSES[option]])


def in_turn(argument: str, *values: Any, among: Sequence[str] = NAMES) -> Any:
    """Each objective with one of the values, each value with as many objectives: the value's own code is shared."""
    cases = [(name, values[place % len(values)]) for place, name in enumerate(among)]
    return pytest.mark.parametrize(("name", argument), cases)


def start(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return weights(random_model("llama", dtype, **SMALL))


@every_objective
def test_says_where_it_is_from_and_what_its_options_are(name: str) -> None:
    kind = objectives()[name]
    text = inspect.getdoc(kind) or ""
    assert "arXiv" in text or name == "FineTuning"
    shared = inspect.signature(UnlearningModule.__init__).parameters
    for option, parameter in inspect.signature(kind.__init__).parameters.items():
        if option not in shared and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert f"{option}:" in text, option


@pytest.mark.parametrize("option", REFUSES)
def test_an_option_is_refused_by_these_and_no_others(option: str) -> None:
    refusals = {name: error for name in NAMES if (error := refusal(name, option)) is not None}
    assert set(refusals) == REFUSES[option]
    for error in refusals.values():
        # PDU could take the divergence if it was told its bound; a quantised base is refused with the adapters
        assert error.argument.partition(".")[0] in {option, "epsilon", "lora"}


def test_the_table_says_who_takes_adapters_and_who_can_be_a_backbone() -> None:
    text = FEATURES.read_text(encoding="utf-8")
    expected = with_support(text)
    assert all(f"\n| `{name}`" in text for name in NAMES)
    assert text == expected, f"python {SCRIPT} writes:\n" + "\n".join(re.findall(r"(?m)^\| `[A-Z].*$", expected))


@pytest.mark.parametrize(("name", "option", "values"), BAD_OPTIONS, ids=lambda value: str(value))
def test_values_out_of_range_are_refused_by_name(name: str, option: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UserError) as refused:
            objectives()[name](**{option.rpartition(".")[2]: value})
        assert refused.value.argument == option, value


@every_objective
def test_every_option_of_its_own_has_a_range(name: str) -> None:
    shared = inspect.signature(UnlearningModule.__init__).parameters
    own = set(inspect.signature(objectives()[name].__init__).parameters) - set(shared) - {"kwargs", "backbone"}
    ranged = {option.rpartition(".")[2] for kind, option, _ in BAD_OPTIONS if kind == name}
    assert own == ranged - set(shared) | ANY_VALUE.get(name, set())


@pytest.mark.parametrize(
    "name", [n for n in NAMES if "backbone" in inspect.signature(objectives()[n].__init__).parameters]
)
def test_what_is_a_backbones_is_given_to_it(name: str) -> None:
    with pytest.raises(UserError, match=r"retain_weight: got 3.0, allowed: unset beside a backbone"):
        made(name, backbone=made("GradientDifference"), retain_weight=3.0)


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(UnlearningModule, "model")
    return parser


@every_objective
def test_is_built_from_yaml(name: str, parser: ArgumentParser) -> None:
    text = f"model: {{class_path: {name}, init_args: {{checkpoint: tiny, scores: [probability]}}}}"
    built = parser.instantiate_classes(parser.parse_string(text)).model
    assert type(built) is objectives()[name]
    assert built.scores == ["probability"]


@every_objective
def test_trains_and_keeps_the_model_to_itself(name: str) -> None:
    module = first(name)
    assert all(p.isfinite().all() for p in module.parameters())
    assert not equal(weights(module), start())
    assert [n.removeprefix("model.") for n, _ in module.named_parameters()] == [
        n for n, _ in module.model.named_parameters()
    ]
    assert not module.model.hf.base_model._forward_hooks
    assert not any(m._forward_hooks or m._backward_hooks for m in module.modules())


@pytest.mark.parametrize("name", [name for name in NAMES if made(name).regularizer is not None])
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    """For the others a penalty of weight zero shows it: what it leaves is what another run gave."""
    assert equal(weights(trained(adopted(made(name)))), plain(name))


@in_turn("middle", True, False)
def test_goes_on_from_a_checkpoint_bit_for_bit(name: str, middle: bool, tmp_path: Path) -> None:
    """From the middle of an epoch or from its end; one that has something to remember from both."""
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"regularizer": AttributionRegularizer(**PENALTY)}
    whole = trained(adopted(made(name, **options)), 3, callbacks=[keep], enable_checkpointing=True, **SCORED)
    steps = (1, 2) if objectives()[name].state_attributes else (1 if middle else 2,)
    for step in steps:
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)  # plain values and tensors
        assert checkpoint["objective"].keys() == {n.removeprefix("_") for n in objectives()[name].state_attributes}
        options = {"regularizer": AttributionRegularizer(**PENALTY)}
        again = trained(adopted(made(name, **options)), 3, resume=str(tmp_path / f"step={step}.ckpt"), **SCORED)
        assert equal(weights(again), weights(whole)), step


@every_objective
def test_a_batch_seen_twice_before_a_step_is_that_batch(name: str) -> None:
    twice = trained(adopted(made(name)), twice=True)
    for a, b in zip(plain(name), twice.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@every_objective
def test_a_penalty_of_weight_zero_changes_no_bit_and_another_does(name: str) -> None:
    # SSIUU's own default has a penalty; FDCU's a mask: given one of weight 0, they are their backbone's
    zero, one = (
        weights(trained(adopted(made(name, regularizer=AttributionRegularizer(**PENALTY | {"weight": weight})))))
        for weight in (0.0, 1.0)
    )
    assert not equal(zero, one)
    if made(name).regularizer is None:
        assert equal(zero, plain(name))


@in_turn("precision", "bf16-mixed", "bf16-true")
def test_trains_in_bfloat16(name: str, precision: str) -> None:
    module = adopted(made(name), torch.bfloat16 if precision == "bf16-true" else torch.float32)
    trained(module, precision=precision, **SCORED)
    assert all(p.isfinite().all() for p in module.parameters())


@taking("gradient_checkpointing")
def test_recomputed_activations_change_nothing(name: str) -> None:
    module = trained(adopted(made(name, gradient_checkpointing=True)))
    for a, b in zip(module.parameters(), plain(name), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@taking("lora")
def test_trains_adapters(name: str) -> None:
    module = trained(adopted(made(name, lora=LoRA(r=2))))
    frozen = {n.replace(".base_layer", ""): p for n, p in module.model.hf.named_parameters() if "lora_" not in n}
    untouched = random_model("llama", torch.float64, **SMALL)
    assert all(torch.equal(frozen[n], p) for n, p in untouched.named_parameters())
    assert any(matrix.abs().max() > 0 for n, matrix in adapter_parameters(module.model).items() if "lora_B" in n)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose rows are whole 4-bit blocks."""
    folder = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    random_model("llama", torch.float32, vocab_size=260, **shape).save_pretrained(folder)
    return str(folder)


@in_turn("quantization", "8bit", "4bit", among=[name for name in NAMES if name not in REFUSES["quantization"]])
def test_trains_adapters_on_a_quantised_base(name: str, quantization: Any, wide: str) -> None:
    module = adopted(made(name, lora=LoRA(r=2), quantization=quantization), wide=wide)
    layers = [m for m in module.model.modules() if is_quantized(m)]
    packed = [layer.weight.data.clone() for layer in layers]
    trained(module)
    assert layers
    assert equal(packed, [layer.weight.data for layer in layers])
    assert any(matrix.abs().max() > 0 for n, matrix in adapter_parameters(module.model).items() if "lora_B" in n)


@every_objective
def test_a_quantised_base_without_adapters_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="quantization: got '8bit', allowed: null without lora"):
        made(name, quantization="8bit")


@taking("retain_weight")
def test_retain_weight_zero_never_trains_on_the_retain_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"only_unforgotten": False} if name == "KLUE" else {}  # a random model knows no answer
    module, asked = adopted(made(name, retain_weight=0.0, **options)), []

    def retain_loss(batch: Any) -> torch.Tensor:
        asked.append(torch.is_grad_enabled())
        return torch.zeros(())

    monkeypatch.setattr(module, "retain_loss", retain_loss)
    if module.forget_weight == 0:
        with pytest.raises(UserError, match=r"batch: got .*, allowed: a part with a weight above 0"):
            trained(module, 1)
    else:
        trained(module, 1)
        assert not equal(weights(module), start())
    # PDU measures it without a gradient all the same: λ may rise again
    assert asked == ([False] if name == "PDU" else [])
