"""Neurons turned by hand against the answers are found, and no others: by the functions and by the callback."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from confirming import confirmed
from planting import PlantedUnit, Planter, found_and_right, with_units
from toys.audit import Planted
from toys.training import fit

from lightning_ssiuu.attribution.influence import CSV_HEADER, SpuriousNeuron
from lightning_ssiuu.attribution.weight_change import OwnFlag, own_flags
from lightning_ssiuu.callbacks import NeuronAttributionCallback
from lightning_ssiuu.datamodules import Facts
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import Kind
from lightning_ssiuu.objectives.fine_tuning import FineTuning
from lightning_ssiuu.utils.errors import UserError

#: Kind, layer, strength: weak to strong. The first three cost the answers less than a tenth.
CASES: list[tuple[Kind, int, float]] = [
    ("mlp_up", 2, 0.2),
    ("attn_v", 3, 0.3),
    ("attn_o", 1, 0.3),
    ("mlp_up", 1, 0.6),
    ("mlp_up", 3, 2.0),
    ("attn_v", 1, 1.0),
    ("attn_k", 0, 0.5),
    ("attn_o", 3, 1.0),
    ("mlp_down", 3, 0.5),
]


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


def names(flagged: list[SpuriousNeuron]) -> list[tuple[str, int, int]]:
    return [(neuron.module, neuron.layer, neuron.index) for neuron in flagged]


def neurons(flags: list[OwnFlag]) -> set[tuple[str, int, int]]:
    return {(kind, flag.layer, flag.index) for flag in flags for kind in flag.kinds}


def test_recall_and_precision_on_planted_neurons(planted: Planted) -> None:
    healthy = planted.probability(planted.healthy)
    found = to_find = flagged = weak = 0
    for kind, layer, strength in CASES:
        unit = planted.unit(kind, layer, strength)
        model = with_units(planted.healthy, [unit])
        cost = 1 - planted.probability(model) / healthy
        weak += cost < 0.1
        assert planted.probability(model, "retain") > 0.9 * planted.probability(planted.healthy, "retain")
        own = planted.own(model)
        counts = found_and_right(list(neurons(own_flags(*own))), {unit: cost})
        found, to_find, flagged = found + counts["found"], to_find + counts["to_find"], flagged + counts["flagged"]
        # Neurons whose own weights did not change have no own change, whatever feeds them or is fed by them.
        moved = {(key[1], key[0], i) for key, v in own[0].units().items() for i in v.nonzero().flatten().tolist()}
        assert moved == unit.neurons
    assert weak == 3
    assert to_find == 8
    assert found / to_find >= 0.95
    assert found / flagged >= 0.95


def test_flags_on_d_minus_are_not_precise(planted: Planted) -> None:
    """Why there are others: neurons up- and downstream, whose own weights are the original's, are flagged as well."""
    unit = planted.unit("mlp_up", 2, 1.0)
    model = with_units(planted.healthy, [unit])
    flagged = planted.flags(model)
    assert unit.neurons < set(names(flagged))
    assert {neuron.layer for neuron in flagged} == {0, 1, 2, 3}
    assert len(flagged) > 100
    precise = planted.flags(model, own_flags(*planted.own(model)))
    assert set(names(precise)) == unit.neurons
    cost = 1 - planted.probability(model) / planted.probability(planted.healthy)
    for neuron in precise:
        assert neuron.own_cost == pytest.approx(cost, abs=0.1)
        assert neuron.attribution_after < neuron.attribution_before
    assert flagged[0].own_cost is None


def test_several_units_among_decoys_and_noise(planted: Planted) -> None:
    harmful = [planted.unit("mlp_up", 1, 0.6), planted.unit("mlp_down", 2, 0.8)]
    decoys = [planted.unit("attn_v", 3, 0.1, True, 1), planted.unit("attn_o", 3, 0.1, True, 1)]

    def noisy(units: list[PlantedUnit]) -> AnswerModel:
        model, generator = with_units(planted.healthy, units), torch.Generator().manual_seed(0)
        for name in planted.original:
            weight = model.hf.get_parameter(name).data
            weight += 0.01 * weight.square().mean().sqrt() * torch.randn(weight.shape, generator=generator)
        return model

    units = [*harmful, *decoys]
    model = noisy(units)
    taken_out = {one: planted.probability(noisy([unit for unit in units if unit is not one])) for one in units}
    cost = {unit: 1 - planted.probability(model) / value for unit, value in taken_out.items()}
    assert min(cost[unit] for unit in harmful) > 0.12
    assert max(cost[unit] for unit in decoys) < 0.08
    before = {name: value.clone() for name, value in model.state_dict().items()}
    candidates = own_flags(*planted.own(model, points=2), minimum_cost=0.02)
    flags = confirmed(model, planted.original, candidates, [planted.parts["forget"]], planted.sites)
    assert neurons(flags) == frozenset().union(*(unit.neurons for unit in harmful))
    assert [flag.cost for flag in flags] == sorted((flag.cost for flag in flags), reverse=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_confirmed_costs_are_those_of_the_unit(planted: Planted) -> None:
    unit = planted.unit("mlp_up", 2, 1.0)
    model = with_units(planted.healthy, [unit])
    flag = OwnFlag(2, ("mlp_gate", "mlp_up"), unit.index, 0.0)
    other = OwnFlag(2, ("mlp_gate", "mlp_up"), unit.index + 1, 9.0)
    (kept,) = confirmed(model, planted.original, [other, flag], [planted.parts["forget"]], planted.sites)
    cost = 1 - planted.probability(model) / planted.probability(planted.healthy)
    assert kept.share == pytest.approx(cost, abs=1e-6)


def test_the_healthy_model_has_no_spurious_neurons(planted: Planted) -> None:
    assert planted.flags(planted.healthy) == []
    own = planted.own(planted.healthy)
    assert own_flags(*own, minimum_cost=0.0) == []
    assert planted.flags(planted.healthy, own_flags(*own)) == []


def test_models_that_cannot_be_planted(planted: Planted) -> None:
    from toys.models import random_model

    part = planted.parts["forget"]
    with pytest.raises(UserError, match="layout of Llama"):
        Planter(AnswerModel(random_model("gpt2", torch.float32, vocab_size=1024)), part, part)
    with pytest.raises(UserError, match="kind"):
        planted.unit("mlp_gate", 0, 1.0)


class Swap(L.Callback):
    """Training that rewires one unit and does nothing else."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.model.load_state_dict(self.weights)


def test_the_callback_flags_the_planted_neuron(planted: Planted, tmp_path: Path) -> None:
    unit = planted.unit("mlp_up", 2, 1.0)
    callback = NeuronAttributionCallback(target="length_normalised")
    module = FineTuning(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    swap = Swap(with_units(planted.healthy, [unit]).state_dict())
    fit(module, [swap, callback], tmp_path, 1, Facts())
    hidden = [name for name in names(callback.flagged) if name[0] in ("mlp_gate", "mlp_up")]
    assert set(hidden[:2]) == unit.neurons
    with (tmp_path / "spurious_neurons.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == CSV_HEADER
    assert [(r[0], int(r[1]), int(r[2])) for r in rows] == names(callback.flagged)
    assert callback.influence()["n_spurious"] == len(rows) > 0
    for name in ("heat_maps.png", "cumulative_curves.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
