"""Neurons turned by hand against the answers are found: by the functions and by the callback."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from training_toys import fit

from lightning_ssiuu.callbacks import NeuronAttributionCallback
from lightning_ssiuu.callbacks.neuron_attribution import CSV_HEADER
from lightning_ssiuu.datamodules import Facts
from lightning_ssiuu.functional.attribution import neuron_attribution
from lightning_ssiuu.functional.influence import SpuriousNeuron, influence_variation, spurious_neurons
from lightning_ssiuu.models import AnswerModel, load_model
from lightning_ssiuu.objectives.fine_tuning import FineTuning
from lightning_ssiuu.sites import neuron_sites


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
