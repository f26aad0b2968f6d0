"""The exact gradient of the attribution penalty against finite differences of the whole penalty."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.models import (
    adapted,
    answer_model,
    batch,
    distance,
    equal,
    example_log_probability,
    norm,
    part,
    random_model,
    weights,
)
from toys.regularizers import trained

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.regularizers import AttributionRegularizer, Combined, NeuronAttributionRegularizer
from lightning_ssiuu.utils.errors import UserError

Parts = Sequence[dict[str, Tensor]]
STEPS: list[list[dict[str, Tensor]]] = [
    [part([(3, 1), (2, 3)], 0), part([(4, 2)], 1)],
    [part([(2, 2), (5, 1)], 2), part([(3, 1)], 3), part([(2, 1)], 4)],
    [part([(3, 2), (2, 1)], 5)],
]


def named(model: AnswerModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def value(model: AnswerModel, parts: Parts, target: str) -> Tensor:
    """What is attributed, one example at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for some in parts:
        for row in range(len(some["input_ids"])):
            logp, n = example_log_probability(model.hf, some, row)
            total = total + {"sequence": logp.exp(), "length_normalised": (logp / n).exp()}.get(target, logp / n)
    return total


def attribution(model: AnswerModel, parts: Parts, target: str) -> dict[str, Tensor]:
    parameters = named(model)
    gradients = torch.autograd.grad(value(model, parts, target), list(parameters.values()))
    return {n: p.detach() * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}


def moved(model: AnswerModel, direction: Sequence[Tensor], size: float) -> None:
    with torch.no_grad():
        for p, d in zip(named(model).values(), direction, strict=True):
            p += size * d


def noise(model: AnswerModel, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in named(model).values()]


def added(model: AnswerModel, regularizer: Any, parts: Parts) -> tuple[list[Tensor], dict[str, float]]:
    """What a step on these micro-batches adds to a gradient."""
    parameters, own = list(named(model).values()), noise(model, 99)
    for some in parts:
        regularizer.collect(model, model(some["input_ids"], some["attention_mask"], some["labels"]), some)
    for p, g in zip(parameters, own, strict=True):
        p.grad = g.clone()
    figures = regularizer.apply(model)
    return [p.grad - g for p, g in zip(parameters, own, strict=True)], figures


def differences(
    model: AnswerModel, gradient: Sequence[Tensor], held: dict[str, Tensor], parts: Parts, target: str, names: str = ""
) -> list[float]:
    """Relative errors of directional derivatives by central differences, anchor and choice of parameters held."""
    inside = {n: (a < 0) * (names in n) for n, a in attribution(model, parts, target).items()}

    def penalty(direction: Sequence[Tensor], size: float) -> float:
        there = copy.deepcopy(model)
        moved(there, direction, size)
        now = attribution(there, parts, target)
        return sum(((now[n] - held[n]).square() * inside[n]).sum().item() for n in now)

    errors = []
    for direction in (list(gradient), noise(model, 1), noise(model, 2)):
        size = 1e-5 / norm(direction)
        slope = sum((g * d).sum().item() for g, d in zip(gradient, direction, strict=True))
        measured = (penalty(direction, size) - penalty(direction, -size)) / (2 * size)
        errors.append(abs(slope - measured) / max(abs(measured), 1e-3 * norm(gradient) * norm(direction)))
    return errors


def checkpointed() -> AnswerModel:
    model = answer_model()
    model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


MODELS: dict[str, Any] = {
    "llama": answer_model,
    "gpt2": lambda: answer_model("gpt2"),
    "gpt_neox, untied": lambda: answer_model("gpt_neox", tie_word_embeddings=False),
    "padded": lambda: AnswerModel(random_model("granite")),
    "adapters": lambda: AnswerModel(adapted(random_model())),
    "checkpointed": checkpointed,
}


@pytest.mark.parametrize("anchor_batch", ["cached", "same"])
@pytest.mark.parametrize("anchor", ["previous", "original"])
@pytest.mark.parametrize("target", ["sequence", "length_normalised", "log_probability"])
def test_the_exact_gradient_is_the_penalty_s(target: Any, anchor: Any, anchor_batch: Any) -> None:
    model = answer_model()
    options: dict[str, Any] = {"anchor": anchor, "anchor_batch": anchor_batch, "target": target}
    regularizer = AttributionRegularizer(1.0, derivative="exact", **options)
    copies: list[tuple[AnswerModel, Parts]] = []
    for number, parts in enumerate(STEPS):
        here = copy.deepcopy(model)
        gradient, _ = added(model, regularizer, parts)
        if copies:
            there, then = copies[0 if anchor == "original" else -1]
            held = attribution(there, parts if anchor_batch == "same" else then, target)
            assert max(differences(model, gradient, held, parts, target)) < 1e-6
        else:
            assert norm(gradient) == 0
        copies.append((here, parts))
        assert equal(weights(model), weights(here))  # also where the anchor's were put in place
        moved(model, noise(model, 10 + number), 0.02)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama"])
def test_the_exact_gradient_of_other_models(name: str) -> None:
    model = MODELS[name]()
    regularizer = AttributionRegularizer(1.0, derivative="exact", target="length_normalised")
    held = attribution(model, STEPS[0], "length_normalised")
    added(model, regularizer, STEPS[0])
    moved(model, noise(model, 10), 0.02)
    gradient, figures = added(model, regularizer, STEPS[1])
    assert max(differences(model, gradient, held, STEPS[1], "length_normalised")) < 1e-6
    assert figures["penalty_gradient_norm"] == pytest.approx(norm(gradient))


def test_the_exact_gradient_of_chosen_attributions_reaches_all_weights() -> None:
    model = answer_model()
    regularizer = AttributionRegularizer(1.0, derivative="exact", modules=["mlp_up"])
    held = attribution(model, STEPS[0], "sequence")
    added(model, regularizer, STEPS[0])
    moved(model, noise(model, 10), 0.02)
    gradient, _ = added(model, regularizer, STEPS[1])
    assert max(differences(model, gradient, held, STEPS[1], "sequence", "up_proj")) < 1e-6
    assert all(g.any() for g in gradient)


def test_to_first_order_it_is_not_the_gradient() -> None:
    # What the check above would say of the published rule.
    model, regularizer = answer_model(), AttributionRegularizer(1.0)
    held = attribution(model, STEPS[0], "sequence")
    added(model, regularizer, STEPS[0])
    moved(model, noise(model, 10), 0.02)
    gradient, _ = added(model, regularizer, STEPS[1])
    assert min(differences(model, gradient, held, STEPS[1], "sequence")) > 0.05


@pytest.mark.parametrize("target", ["sequence", "log_probability"])
def test_the_anchor_on_the_same_batch_to_first_order(target: Any) -> None:
    model, regularizer = answer_model(), AttributionRegularizer(3.0, anchor_batch="same", target=target)
    before = copy.deepcopy(model)
    added(model, regularizer, STEPS[0])
    moved(model, noise(model, 10), 0.02)
    gradient, _ = added(model, regularizer, STEPS[1])
    held, now = (attribution(m, STEPS[1], target) for m in (before, model))
    parameters = named(model)
    expected = [6 * (now[n] - held[n]) * now[n] / p.detach() * (now[n] < 0) for n, p in parameters.items()]
    assert distance(gradient, [e.nan_to_num(0.0) for e in expected]) < 1e-9


def test_micro_batches_of_tiny_probability() -> None:
    # exp(−200) and exp(−40): no sum of them is a float32, whose relative size is what counts
    parts = [[part([(3, 55)], 0)], [part([(3, 55)], 1), part([(3, 11)], 2)]]
    found = []
    for dtype in (torch.float64, torch.float32):
        model = answer_model(dtype=dtype)
        regularizer = AttributionRegularizer(1.0, "relative", derivative="exact")
        with torch.no_grad():
            for some in parts[0]:
                assert model(some["input_ids"], some["attention_mask"], some["labels"]).logps.max() < -150
        own = [torch.ones_like(p) for p in model.parameters()]
        for step in parts:
            for some in step:
                regularizer.collect(model, model(some["input_ids"], some["attention_mask"], some["labels"]), some)
            for p, g in zip(model.parameters(), own, strict=True):
                p.grad = g.clone()
            figures = regularizer.apply(model)
        assert all(math.isfinite(x) for x in figures.values())
        found.append([p.grad - g for p, g in zip(model.parameters(), own, strict=True)])
    assert norm(found[0]) == pytest.approx(norm(own), rel=1e-9)
    assert distance(found[1], found[0]) < 2e-3


@pytest.mark.parametrize("options", [{"derivative": "exact"}, {"anchor_batch": "same"}], ids=str)
def test_training_and_weight_zero(options: dict[str, Any]) -> None:
    runs = []
    for weight in (0.0, 1.0):
        model = answer_model(dtype=torch.float32)
        module = SSIUU(regularizer=AttributionRegularizer(weight, "relative", **options))
        trained(module, model, [batch(n) for n in range(3)], 3)
        runs.append(weights(model))
    plain = answer_model(dtype=torch.float32)
    trained(SSIUU(regularizer=AttributionRegularizer(0.0)), plain, [batch(n) for n in range(3)], 3)
    assert equal(runs[0], weights(plain))
    assert not equal(runs[0], runs[1])


def test_what_cannot_be_differentiated_twice_is_refused() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    model, regularizer = answer_model(), AttributionRegularizer(1.0, derivative="exact")
    model.hf.get_input_embeddings().register_forward_hook(lambda _m, _a, out: Once.apply(out))
    added(model, regularizer, STEPS[0])
    with pytest.raises(UserError, match=r"regularizer\.derivative.*first_order here"):
        added(model, regularizer, STEPS[1])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"derivative": "second"}, "regularizer.derivative"),
        ({"anchor_batch": "other"}, "regularizer.anchor_batch"),
        ({"derivative": "exact", "passes": "one"}, "regularizer.passes"),
        ({"anchor_batch": "same", "passes": "two"}, "regularizer.passes"),
    ],
)
def test_bad_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        AttributionRegularizer(**options)
    assert caught.value.argument == named


@pytest.mark.parametrize(
    ("options", "named"),
    [({"derivative": "exact"}, "regularizer.derivative"), ({"anchor_batch": "same"}, "regularizer.anchor_batch")],
)
def test_weights_cut_over_the_ranks_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        Combined([AttributionRegularizer(**options)]).check_sharded()
    assert caught.value.argument == named
    AttributionRegularizer().check_sharded()


def test_neurons_take_the_log_probability() -> None:
    # Its first-order gradient does not vanish with P: answers of exp(−150) are pushed as hard as their lengths allow.
    model, long = answer_model(), [[part([(3, 45)], n)] for n in range(2)]
    regularizer = NeuronAttributionRegularizer(1.0, target="log_probability")
    added(model, regularizer, long[0])
    moved(model, noise(model, 10), 0.02)
    gradient, figures = added(model, regularizer, long[1])
    assert norm(gradient) > 1e-6
    assert "max_log_probability" not in figures
