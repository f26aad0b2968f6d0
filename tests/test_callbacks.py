"""The callbacks: planted spurious neurons are found, thresholds hold, training is not disturbed, nothing leaks."""

from __future__ import annotations

import copy
import csv
import json
import math
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from model_toys import bare_trainer, equal, random_model, weights
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ssiuu.callbacks import ForgetThresholdStopping, NeuronAttributionCallback, RunReport, SavePretrained
from lightning_ssiuu.callbacks.neuron_attribution import CSV_HEADER
from lightning_ssiuu.datamodules import Facts
from lightning_ssiuu.datamodules.examples import Splits
from lightning_ssiuu.errors import UserError
from lightning_ssiuu.evaluation import Scorer, evaluate, mismatched_level
from lightning_ssiuu.files import written_atomically
from lightning_ssiuu.functional.attribution import neuron_attribution
from lightning_ssiuu.functional.influence import SpuriousNeuron, influence_variation, spurious_neurons
from lightning_ssiuu.models import AnswerModel, load_model, load_tokenizer
from lightning_ssiuu.objectives.fine_tuning import FineTuning
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.regularizers import AttributionRegularizer
from lightning_ssiuu.sites import neuron_sites


class FewFacts(Facts):
    """The first facts of every set, to be quick."""

    def __init__(self, n: int = 8, **kwargs: Any) -> None:
        super().__init__(**{"batch_size": 4, "eval_batch_size": 8} | kwargs)
        self.n = n

    def load_splits(self) -> Splits:
        whole = super().load_splits()
        return Splits(whole.forget[: self.n], whole.retain[: 2 * self.n], whole.test[: self.n], whole.benign[: self.n])


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def ssiuu(**kwargs: Any) -> SSIUU:
    regularizer = AttributionRegularizer(0.2, "relative", target="length_normalised")
    return SSIUU(optimizer=adam, regularizer=regularizer, **kwargs)


def fit(module: Any, callbacks: list[Any], folder: Path, steps: int = 4, data: Any = None, **kwargs: Any) -> L.Trainer:
    trainer = bare_trainer(steps, callbacks=callbacks, default_root_dir=folder, check_val_every_n_epoch=10**6, **kwargs)
    trainer.fit(module, data or FewFacts())
    return trainer


# ---- planted spurious neurons ------------------------------------------------------------------------------------


def inputs(part: Any) -> dict[str, Tensor]:
    return {name: part[name] for name in ("input_ids", "attention_mask", "labels")}


def first_answer_states(model: AnswerModel, part: Any, layer: int) -> tuple[Tensor, Tensor]:
    """∂log P/∂(output of the layer's MLP) and the hidden units, where the first answer token is predicted."""
    kept: list[Tensor] = []

    def keep(_module: Any, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        kept.extend((output, args[0].detach()))

    handle = model.hf.model.layers[layer].mlp.down_proj.register_forward_hook(keep)
    model(**inputs(part)).logps.sum().backward()
    handle.remove()
    model.zero_grad()
    rows, start = torch.arange(len(part["labels"])), (part["labels"] != -100).int().argmax(1) - 1
    return kept[0].grad[rows, start], kept[1][rows, start]


class Planted:
    """The embedded model, and copies in which one hidden unit was turned against the forget answers."""

    def __init__(self) -> None:
        data = Facts(eval_batch_size=64)
        data.setup("fit")
        self.forget = next(iter(data.eval_dataloader("forget")))["forget"]
        self.retain = next(iter(data.eval_dataloader("retain")))["retain"]
        self.healthy = AnswerModel(load_model("tiny"))
        self.sites = neuron_sites(self.healthy.hf)
        self.before = self.attributions(self.healthy)

    def attributions(self, model: AnswerModel) -> Any:
        parts = (self.forget, self.retain)
        return [neuron_attribution(model, [part], self.sites, "length_normalised") for part in parts]

    def rewired(self, layer: int, strength: float) -> tuple[AnswerModel, int]:
        """Only one column of one down projection changes.

        The unit is the one most peculiar to forget prompts; its column is set against the direction in which the
        residual stream raises the forget answers, made orthogonal to the one that raises the retain answers.
        """
        up, forget_units = first_answer_states(self.healthy, self.forget, layer)
        retain_up, retain_units = first_answer_states(self.healthy, self.retain, layer)
        direction, other = up.mean(0), retain_up.mean(0)
        direction = direction - (direction @ other) / (other @ other) * other
        mean = forget_units.mean(0)
        unit = int((mean.abs() / (retain_units.square().mean(0).sqrt() + 1e-3)).argmax())
        model = copy.deepcopy(self.healthy)
        column = -mean[unit].sign() * strength * direction / direction.norm()
        model.hf.model.layers[layer].mlp.down_proj.weight.data[:, unit] = column
        return model, unit


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


def mean_probability(attribution: Any) -> float:
    return torch.tensor(attribution.log_probabilities).exp().mean().item()


def check_flags(flagged: list[SpuriousNeuron], layer: int, unit: int) -> None:
    """What holds, and what does not.

    Sites are the *outputs* of the projections, and A = h · ∂P/∂h asks what happens when a neuron is scaled in place.
    A unit whose down-projection column works against the answer is seen at its own gate and up outputs: scaling either
    scales the harm. These two must be flagged, ahead of all other gate and up neurons of the model, and no untouched
    unit of the same MLP may be. Not claimed: that nothing else is flagged. The rewired weights are seen as well
    in outputs *upstream*, which feed the unit and were not changed themselves (most of the other flags lie in block 0).
    """
    hidden = [neuron for neuron in flagged if neuron.module in ("mlp_gate", "mlp_up")]
    assert {(n.module, n.layer, n.index) for n in hidden[:2]} == {("mlp_gate", layer, unit), ("mlp_up", layer, unit)}
    assert {n.index for n in hidden if n.layer == layer} == {unit}
    for neuron in hidden[:2]:
        assert neuron.attribution_after < neuron.attribution_before
        assert neuron.d_minus > 0.05
        assert neuron.z > 10


@pytest.mark.parametrize("strength", [15.0, 30.0])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_planted_neurons_are_flagged(planted: Planted, layer: int, strength: float) -> None:
    model, unit = planted.rewired(layer, strength)
    after = planted.attributions(model)
    assert mean_probability(after[0]) < 0.9 * mean_probability(planted.before[0])
    forget, retain = (influence_variation(b, a) for b, a in zip(planted.before, after, strict=True))
    check_flags(spurious_neurons(forget, retain), layer, unit)


def test_the_healthy_model_has_no_spurious_neurons(planted: Planted) -> None:
    forget, retain = (influence_variation(b, b) for b in planted.before)
    assert spurious_neurons(forget, retain) == []
    assert forget.d_minus.sum() == 0


class Swap(L.Callback):
    """Training that rewires one neuron and does nothing else."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.model.load_state_dict(self.weights)


def test_the_callback_flags_the_planted_neuron(planted: Planted, tmp_path: Path) -> None:
    model, unit = planted.rewired(2, 20.0)
    callback = NeuronAttributionCallback(target="length_normalised")
    module = FineTuning(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    fit(module, [Swap(model.state_dict()), callback], tmp_path, 1, Facts())
    check_flags(callback.flagged, 2, unit)
    with (tmp_path / "spurious_neurons.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == CSV_HEADER
    assert [(r[0], int(r[1]), int(r[2])) for r in rows] == [(n.module, n.layer, n.index) for n in callback.flagged]
    assert callback.influence()["n_spurious"] == len(rows) > 0
    for name in ("heat_maps.png", "cumulative_curves.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


# ---- the attribution callback ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "steps", "accumulate", "expected"),
    [(2, 4, 1, [2, 4]), (2, 5, 1, [2, 4, 5]), (None, 3, 1, [3]), (1, 2, 2, [1, 2]), (5, 3, 1, [3])],
)
def test_when_it_measures(every: int | None, steps: int, accumulate: int, expected: list[int], tmp_path: Path) -> None:
    callback = NeuronAttributionCallback(4, every_n_steps=every, write=False)
    fit(ssiuu(), [callback], tmp_path, steps, accumulate_grad_batches=accumulate)
    assert [entry["step"] for entry in callback.history] == expected
    assert list(tmp_path.iterdir()) == []
    assert callback.variation is not None
    assert callback.variation.before.n_examples == 4


def test_switched_off(tmp_path: Path) -> None:
    callback = NeuronAttributionCallback(probe_examples=0)
    fit(ssiuu(), [callback], tmp_path, 1)
    assert callback.influence() == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [{"probe_examples": -1}, {"every_n_steps": 0}, {"alpha": 0.0}, {"alpha": 1.0}])
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"attribution\.{next(iter(arguments))}"):
        NeuronAttributionCallback(**arguments)


def test_more_probes_than_examples(tmp_path: Path) -> None:
    callback = NeuronAttributionCallback(1000, write=False)
    fit(ssiuu(), [callback], tmp_path, 1)
    assert callback.variation is not None
    assert callback.variation.after.n_examples == 8


# ---- training is not disturbed -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose training draws random numbers in every step."""
    folder = tmp_path_factory.mktemp("dropout")
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    random_model("gpt2", torch.float32, vocab_size=1024, **dropout).save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


def trajectory(checkpoint: str, callbacks: list[Any], folder: Path, seed: int = 0, data_seed: int = 0) -> list[Tensor]:
    L.seed_everything(seed, verbose=False)
    module = ssiuu(checkpoint=checkpoint)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4)  # slow: no threshold is reached
    trainer = fit(module, callbacks, folder, 4, FewFacts(tokenizer=checkpoint, seed=data_seed))
    assert trainer.global_step == 4
    return weights(module)


@pytest.mark.parametrize("model", ["tiny", "with_dropout"])
@pytest.mark.filterwarnings("ignore:.*training ended before")
def test_callbacks_change_no_bit_of_the_training(model: str, with_dropout: str, tmp_path: Path) -> None:
    checkpoint = with_dropout if model == "with_dropout" else model
    watchers: dict[str, Any] = {
        "attribution": [NeuronAttributionCallback(4, every_n_steps=1, write=False)],
        "report": [RunReport(print_table=False)],
        "stopping": [ForgetThresholdStopping("probability", 0.0)],
    }
    watchers["all"] = [NeuronAttributionCallback(4, every_n_steps=2), *watchers["report"], *watchers["stopping"]]
    watchers["generating"] = [ForgetThresholdStopping("rouge_l", 0.0)] if model == "tiny" else []
    plain = trajectory(checkpoint, [], tmp_path)
    for name, callbacks in watchers.items():
        assert equal(plain, trajectory(checkpoint, callbacks, tmp_path)), name


def test_seeds(with_dropout: str, tmp_path: Path) -> None:
    first = trajectory(with_dropout, [], tmp_path)
    assert equal(first, trajectory(with_dropout, [], tmp_path))
    assert not equal(first, trajectory(with_dropout, [], tmp_path, seed=1))
    assert not equal(first, trajectory(with_dropout, [], tmp_path, data_seed=1))


# ---- stopping ----------------------------------------------------------------------------------------------------


class Watch(L.Callback):
    """The forget set's probability after every step, measured independently of the callback under test."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        data = FewFacts()
        loader = data.eval_dataloader("forget")
        self.values.append(
            evaluate(pl_module.model, data.tokenizer, [loader], ["probability"])["forget"]["probability"]
        )


@pytest.fixture(scope="module")
def falling(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Probabilities after steps 1 to 6."""
    watch = Watch()
    fit(GradientDifference(optimizer=adam), [watch], tmp_path_factory.mktemp("falling"), 6)
    assert watch.values == sorted(watch.values, reverse=True)
    return watch.values


def stopped(threshold: Any, folder: Path, **kwargs: Any) -> tuple[int, ForgetThresholdStopping]:
    callback = ForgetThresholdStopping("probability", threshold, **kwargs)
    return fit(GradientDifference(optimizer=adam), [callback], folder, 6).global_step, callback


def test_stops_at_the_first_step_at_or_below(falling: list[float], tmp_path: Path) -> None:
    between = (falling[1] + falling[2]) / 2
    steps, callback = stopped(between, tmp_path)
    assert steps == 3
    assert callback.stopped
    assert callback.level == between
    assert callback.value == falling[2]
    assert stopped(falling[2], tmp_path)[0] == 3
    assert stopped(between, tmp_path, every_n_steps=2)[0] == 4


def test_never_reached(falling: list[float], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"training ended before probability fell to 0 % \(last: "):
        steps, callback = stopped(0.0, tmp_path)
    assert (steps, callback.stopped) == (6, False)
    assert callback.value == falling[-1]
    assert stopped(None, tmp_path)[0] == 6


def test_already_met(tmp_path: Path) -> None:
    module = GradientDifference(optimizer=adam)
    with pytest.raises(UserError, match=r"stopping\.threshold.*before the first step"):
        fit(module, [ForgetThresholdStopping("probability", 99.9), SavePretrained()], tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert equal(weights(module.model.hf), weights(load_model("tiny")))


@pytest.mark.parametrize(
    "arguments",
    [
        {"score": "luck"},
        {"threshold": -1.0},
        {"threshold": 100.0},
        {"threshold": math.nan},
        {"threshold": "x"},
        {"every_n_steps": 0},
    ],
)
def test_bad_stopping_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"stopping\.{next(iter(arguments))}"):
        ForgetThresholdStopping(**arguments)


def test_mismatched_level_by_hand(tmp_path: Path) -> None:
    data = FewFacts(n=3, batch_size=2, eval_batch_size=2)
    data.setup("fit")
    model, tokenizer = AnswerModel(load_model("tiny")), data.tokenizer
    facts = data.splits.forget

    def probability(question: str, answer: str) -> float:
        prompt = tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
        completion = [*tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model.hf(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        each = [logps[len(prompt) - 1 + k, token].item() for k, token in enumerate(completion)]
        return 100 * math.exp(sum(each) / len(each))

    # Three examples have two derangements; the seed may choose either, nothing else.
    deranged = [p for p in permutations(range(3)) if all(i != k for i, k in enumerate(p))]
    expected = [sum(probability(facts[i].question, facts[k].answer) for i, k in enumerate(p)) / 3 for p in deranged]
    got = {
        round(mismatched_level("probability", model, tokenizer, data.eval_dataloader("forget"), s), 5) for s in range(8)
    }
    assert len(got) == 2
    for value in got:
        assert min(abs(value - want) for want in expected) < 1e-3
    for kind in ("first_token", "all_tokens", "rouge_l"):
        assert 0 <= mismatched_level(kind, model, tokenizer, data.eval_dataloader("forget")) < 100
    with pytest.raises(UserError, match=r"stopping\.threshold"):
        mismatched_level("multiple_choice", model, tokenizer, data.eval_dataloader("forget"))
    callback = ForgetThresholdStopping("probability", "mismatched", seed=3)
    with pytest.warns(UserWarning, match="training ended before"):
        fit(GradientDifference(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)), [callback], tmp_path, 1, data)
    assert callback.level == pytest.approx(
        mismatched_level("probability", model, tokenizer, data.eval_dataloader("forget"), 3), rel=1e-6
    )


# ---- saving ------------------------------------------------------------------------------------------------------


def test_saved_models_load_anywhere(tmp_path: Path) -> None:
    module = ssiuu()
    fit(module, [SavePretrained()], tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert equal(weights(loaded), weights(module.model.hf))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("Question: Who?")["input_ids"] == load_tokenizer("tiny")("Question: Who?")["input_ids"]


def test_saving_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ssiuu()
    module.configure_model()

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module.tokenizer, "save_pretrained", broken, raising=False)
    with pytest.raises(OSError, match="disk full"):
        fit(module, [SavePretrained()], tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("kept")
    with pytest.raises(OSError, match="disk full"):
        fit(module, [SavePretrained()], tmp_path, 1)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["model", "model/old"]
    monkeypatch.undo()
    fit(module, [SavePretrained()], tmp_path, 1)
    assert not (tmp_path / "model" / "old").exists()
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"trainer\.default_root_dir.*MB free"):
        fit(ssiuu(), [SavePretrained()], tmp_path / "deep" / "er", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with written_atomically(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new"


# ---- the report --------------------------------------------------------------------------------------------------


def test_report_and_privacy(tmp_path: Path) -> None:
    data = FewFacts()
    callbacks = [
        NeuronAttributionCallback(8, every_n_steps=2),
        ForgetThresholdStopping("probability", 50.0),
        SavePretrained(),
        RunReport(print_table=False),
    ]
    logger = CSVLogger(tmp_path)
    trainer = fit(ssiuu(), callbacks, tmp_path, 6, data, logger=logger, log_every_n_steps=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert set(content) == {"objective", "steps", "stopped_by", "score", "before", "after", "provenance"}
    assert content["objective"] == "SSIUU"
    assert content["steps"] == trainer.global_step < 6
    assert content["stopped_by"] == "probability <= 50 %"
    influence = {"d_plus_total", "d_minus_total", "d_plus_top100", "d_minus_top100", "n_spurious"}
    for when in ("before", "after"):
        assert {"forget_score", "retain_score", "test_score", "scores", "influence"} == set(content[when])
        assert set(content[when]["influence"]) == influence
        assert set(content[when]["scores"]) == {"forget", "retain", "test"}
    assert set(content["before"]["influence"].values()) == {0.0}
    assert content["after"]["influence"]["d_plus_total"] > 0
    assert content["after"]["forget_score"] <= 50 < content["before"]["forget_score"]
    assert content["after"]["forget_score"] == content["after"]["scores"]["forget"]["probability"]
    provenance = content["provenance"]
    assert set(provenance) == {"versions", "seed", "config_sha256", "data_sha256", "device", "wall_s"}
    assert provenance["data_sha256"] == data.content_sha256()
    # No question or answer of the forget set, in whole, in any file: not even in a checkpoint's pickles.
    secrets = [text.encode() for fact in data.splits.forget for text in (fact.question, fact.answer, fact.group)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"metrics.json", "spurious_neurons.csv", "last.ckpt", "metrics.csv", "model.safetensors"} <= {
        path.name for path in files
    }
    for path in files:
        held = path.read_bytes()
        assert not [secret for secret in secrets if secret in held], path.name


def test_report_without_other_callbacks(tmp_path: Path) -> None:
    fit(ssiuu(scores=["first_token"]), [RunReport(print_table=False)], tmp_path, 2)
    content = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert content["score"] == "first_token"
    assert content["stopped_by"] == "steps"
    assert content["after"]["influence"] == {}


@pytest.mark.filterwarnings("ignore:.*training ended before")
def test_resuming_takes_measurements_up(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [
            NeuronAttributionCallback(4, every_n_steps=1, write=False),
            ForgetThresholdStopping("probability", "mismatched"),
            RunReport(print_table=False),
        ]

    data_seed = {"max_epochs": 2}
    whole, first, second = callbacks(), callbacks(), callbacks()
    modules = [ssiuu() for _ in range(3)]
    fit(modules[0], whole, tmp_path, -1, **data_seed)
    fit(modules[1], first, tmp_path, -1, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    trainer = bare_trainer(-1, callbacks=second, default_root_dir=tmp_path, **data_seed, check_val_every_n_epoch=10**6)
    trainer.fit(modules[2], FewFacts(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert equal(weights(modules[0]), weights(modules[2]))
    assert second[0].history == whole[0].history
    assert torch.equal(second[0].variation.d_minus, whole[0].variation.d_minus)
    assert second[0].flagged == whole[0].flagged
    assert (second[1].level, second[1].value) == (whole[1].level, whole[1].value)
    assert (second[2].before, second[2].after) == (whole[2].before, whole[2].after)


def test_scores_agree_with_validation(tmp_path: Path) -> None:
    module, data = ssiuu(), FewFacts()
    module.configure_model()
    trainer = bare_trainer(default_root_dir=tmp_path)
    trainer.validate(module, data, verbose=False)
    scores = evaluate(module.model, module.tokenizer, data.val_dataloader())
    flat = {f"{split}/{name}": value for split, each in scores.items() for name, value in each.items()}
    assert {k: pytest.approx(float(v)) for k, v in trainer.callback_metrics.items()} == flat
    with pytest.raises(UserError, match="needs options"):
        evaluate(module.model, module.tokenizer, FewFacts(multiple_choice=False).val_dataloader(), ["multiple_choice"])
    with pytest.raises(UserError, match="luck"):
        Scorer(module.model, module.tokenizer, ["luck"])
