"""Objectives that move weights within a step: with regulariser, adapters, chosen neurons, resuming, and mistakes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from toys.adversarial import ALL, LENGTHS, a_batch, length, plus, the_adversarys, trained
from toys.data import Toy
from toys.models import (
    answer_model,
    bare_trainer,
    distance,
    equal,
    part,
    weights,
)

from lightning_ssiuu.attribution.activation_gradient import neuron_attribution
from lightning_ssiuu.models.architectures import neuron_rows, neuron_sites
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives.adversarial_unlearning import AdversarialUnlearning
from lightning_ssiuu.objectives.elicited_unlearning import ElicitedUnlearning
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.objectives.mudman import MUDMAN
from lightning_ssiuu.objectives.npo import NPO
from lightning_ssiuu.objectives.sam import SAM
from lightning_ssiuu.regularizers import AttributionRegularizer
from lightning_ssiuu.training.perturbation import displaced
from lightning_ssiuu.utils.errors import UserError

# ---- with everything else ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ALL)
def test_the_regulariser_sees_answers_at_the_original_weights(objective: Any) -> None:
    """Its anchor after one step is the attribution at the original weights, whatever the objective does."""
    anchors = []
    for module in (GradientDifference(), objective()):
        module.regularizer = AttributionRegularizer(1.0, "relative")
        trained(module, [a_batch(0)])
        anchors.append(module.regularizer.state()["anchor"])
    for name, expected in anchors[0].items():
        torch.testing.assert_close(anchors[1][name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", ALL)
def test_the_penalty_follows_the_whole_gradient(objective: Any) -> None:
    module = objective(regularizer=AttributionRegularizer(0.5, "relative", target="length_normalised"))
    without = trained(objective(), [a_batch(0), a_batch(0)], lr=1e-3)[1]
    penalised = trained(module, [a_batch(0), a_batch(0)], lr=1e-3)[1]
    assert equal(penalised[0], without[0])  # no anchor yet
    extra = plus(penalised[1], without[1], -1.0)
    assert length(extra) == pytest.approx(0.5 * length(without[1]), rel=1e-6)


def test_gradients_are_clipped_as_a_whole() -> None:
    _, (whole,) = trained(AdversarialUnlearning(), [a_batch(0)])
    _, (clipped,) = trained(AdversarialUnlearning(), [a_batch(0)], gradient_clip_val=0.01)
    assert length(clipped) == pytest.approx(0.01, rel=1e-3)
    assert distance([c * (length(whole) / length(clipped)) for c in clipped], whole) < 1e-9


@pytest.mark.parametrize("objective", [AdversarialUnlearning, SAM])
def test_without_a_retain_loss(objective: Any) -> None:
    options = {"steps": 0} if objective is AdversarialUnlearning else {"rho": 0.0}
    expected, _ = trained(GradientDifference(retain_weight=0.0), [a_batch(0)])
    for batch in (a_batch(0), {"forget": a_batch(0)["forget"]}):
        got, _ = trained(objective(retain_weight=0.0, **options), [batch])
        assert distance(weights(got), weights(expected)) < 1e-13


def test_a_batch_without_forget_items_is_the_backbones() -> None:
    batches = [{"retain": a_batch(0)["retain"]}]
    expected, _ = trained(GradientDifference(), batches)
    assert distance(weights(trained(SAM(), batches)[0]), weights(expected)) < 1e-13


def test_adapters_alone_are_moved() -> None:
    model = answer_model()
    lora = LoRA(2)
    lora.attach(model.hf)
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    with displaced(model) as parameters:
        assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    _, (got,) = trained(AdversarialUnlearning(step_size=1e-2, lora=lora), [a_batch(0)], model)
    assert len(got) == len(parameters)
    assert equal([p for p in model.parameters() if not p.requires_grad], frozen)


def test_other_items_for_the_adversary_in_every_step() -> None:
    module = AdversarialUnlearning(seed=3)
    seen = set()
    forget = part(LENGTHS)

    for step in range(20):
        learned, rest = the_adversarys(module, forget, step)
        assert len(learned) == 2
        assert not set(learned) & set(rest)
        turned = {name: value.flip(0) for name, value in forget.items()}  # the order is not what decides
        assert {4 - row for row in the_adversarys(module, turned, step)[0]} == set(learned)
        seen |= set(learned)
    assert seen == {0, 1, 2, 3, 4}


# ---- chosen neurons --------------------------------------------------------------------------------


class Served:
    """Ready-made forget examples where an objective looks for the training set."""

    def __init__(self, module: Any, forget: dict[str, Tensor]) -> None:
        module.training_parts = lambda name, batch_size=16: iter([forget])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_adversary_moves_only_the_chosen_neurons(name: str) -> None:
    model = answer_model(name, tie_word_embeddings=True)
    forget = a_batch(0)["forget"]
    module = AdversarialUnlearning(steps=1, step_size=0.5, adversary_neurons=10.0)
    Served(module, forget)
    moved: list[list[Tensor]] = []

    class Looking(GradientDifference):
        def forget_loss(self, batch: Any) -> Tensor:
            moved.append(weights(self.model))
            return super().forget_loss(batch)

    module._backbone = (Looking(),)
    before = weights(model)
    sites = neuron_sites(model.hf)
    values = neuron_attribution(model, [forget], sites, "length_normalised").mean_positive
    trained(module, [a_batch(0)], model, lr=0.0)
    assert equal(weights(model), before)

    n_chosen = round(0.1 * len(values))
    threshold = values.sort(descending=True).values[n_chosen - 1]
    allowed = {}
    for site, value in zip(sites, values.split([site.width for site in sites]), strict=True):
        columns = torch.arange(site.width) if site.columns is None else site.columns
        layer = model.hf.get_submodule(site.module_name)
        mask = allowed.setdefault(layer, torch.zeros(layer.weight.shape[1 if name == "gpt2" else 0], dtype=torch.bool))
        mask[columns] = value >= threshold
    by_parameter = {}
    for layer, mask in allowed.items():
        by_parameter[layer.weight] = mask if name == "gpt2" else mask.unsqueeze(1)
        if layer.bias is not None:
            by_parameter[layer.bias] = mask
    n_moved = 0
    for parameter, new, old in zip(model.parameters(), moved[0], before, strict=True):
        changed = new != old
        mask = by_parameter.get(parameter, torch.zeros(()).bool())
        assert not (changed & ~mask).any()
        n_moved += int(changed.sum())
    assert n_moved > 0.9 * sum(int(mask.expand(p.shape).sum()) for p, mask in by_parameter.items()) > 0


def test_rows_of_all_neurons_are_all_rows() -> None:
    hf = answer_model("gpt_neox").hf
    sites = neuron_sites(hf)
    rows = neuron_rows(hf, sites, torch.ones(sum(site.width for site in sites), dtype=torch.bool))
    assert len(rows) == len({id(p) for p, _ in rows}) == 2 * 4 * 2
    assert all(mask.all() for _, mask in rows)


def test_what_is_measured_on_the_original_model_is_kept(tmp_path: Path) -> None:
    def module() -> AdversarialUnlearning:
        fresh = AdversarialUnlearning(
            floor=0.3,
            adversary_neurons=20.0,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        )
        model = answer_model(vocab_size=260, max_position_embeddings=64)
        fresh.adopt(model.train(), Toy().tokenizer)
        return fresh

    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    whole = module()
    bare_trainer(4, callbacks=[keep], enable_checkpointing=True).fit(whole, Toy())
    resumed = module()
    bare_trainer(4).fit(resumed, Toy(), ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert torch.equal(resumed._neurons, whole._neurons)
    assert equal(weights(resumed.model), weights(whole.model))


def test_any_backbone_with_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NPO at the first step: ``2 log(2)/β`` at the reference itself, more where the answers have been relearned."""
    monkeypatch.setenv("LIGHTNING_SSIUU_CACHE", str(tmp_path))
    for objective in ALL:
        module = objective(NPO(beta=0.5), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        module.adopt(answer_model(vocab_size=260, max_position_embeddings=64).train(), Toy().tokenizer)
        trainer = bare_trainer(1, log_every_n_steps=1)
        trainer.fit(module, Toy(batch_size=4))
        value = float(trainer.callback_metrics["train/forget_loss"])
        excess = value - 2 * math.log(2) / 0.5
        assert (abs(excess) < 1e-9) if objective in (MUDMAN, ElicitedUnlearning) else (0.01 < excess < 1.0)


# ---- bad options ---------------------------------------------------------------------------------------------------


def test_neurons_are_not_chosen_beside_adapters() -> None:
    with pytest.raises(UserError, match=r"adversary_neurons: got 5\.0, allowed: null with lora"):
        AdversarialUnlearning(adversary_neurons=5.0, lora=LoRA(2))


@pytest.mark.parametrize("objective", ALL)
@pytest.mark.parametrize(
    ("options", "argument"),
    [({"static_graph": True}, "strategy.static_graph"), ({"precision": "16-true"}, "precision")],
)
def test_refused_strategies(objective: Any, options: dict[str, Any], argument: str) -> None:
    if "static_graph" in options:
        options = {"strategy": DDPStrategy(**options)}
    module = objective()
    module._trainer = bare_trainer(1, **options)
    with pytest.raises(UserError, match=f"trainer.{argument}: .*with {objective.__name__}, whose") as caught:
        module.setup("fit")
    assert caught.value.argument == f"trainer.{argument}"
