"""Figures of an update, on numbers that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from toys.models import VOCAB, answer_model, equal, example_log_probability, part, weights
from toys.training import FewFacts

from lightning_ssiuu.attribution.indicators import FOLDS, at_weights, barrier, indicators, line, mean_nll
from lightning_ssiuu.attribution.update import (
    Sketch,
    example_gradients,
    mean_cosine,
    norm,
    norms_by_kind,
    principal_share,
    update_between,
    weights_of,
)
from lightning_ssiuu.datamodules import RelearnDataModule
from lightning_ssiuu.evaluation.elicitation import Elicitation, elicited_score
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.training.shards import participation
from lightning_ssiuu.utils.errors import UserError


def test_size_and_spread() -> None:
    original = {"h.0.q.weight": torch.zeros(2, 2), "h.1.q.weight": torch.ones(1), "norm.weight": torch.ones(2)}
    changed = {
        "h.0.q.weight": torch.tensor([[2.0, 0.0], [0.0, 2.0]]),
        "h.1.q.weight": torch.tensor([2.0]),
        "norm.weight": torch.tensor([1.0, 5.0]),
    }
    update = update_between(original, changed)
    assert norm(update.values()) == pytest.approx(5.0)  # √(4 + 4 + 1 + 16)
    assert norms_by_kind(update) == pytest.approx({"q": 3.0, "norm": 4.0})
    # (Σ x²)² = 625, Σ x⁴ = 16 + 16 + 1 + 256, of seven coordinates
    assert participation(list(update.values()), 5.0) == pytest.approx(100 * 625 / (7 * 289))
    assert participation([torch.zeros(3)], 0.0) == 0.0
    with pytest.raises(UserError, match=r"^original: got 'weights of another model'"):
        update_between(original, {"norm.weight": torch.ones(2)})


def test_a_sketch_keeps_inner_products() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = ([torch.randn(shape, generator=generator) for shape in ((30, 4), (8,), (3, 5))] for _ in range(2))
    flat = [torch.cat([t.flatten() for t in tensors]) for tensors in (x, y)]
    exact = Sketch(143)  # as many places as coordinates: 120 + 8 + 15
    assert torch.dot(exact(x), exact(y)) == pytest.approx(torch.dot(*flat).item(), rel=1e-5)
    assert exact(x).abs().sort().values.tolist() == pytest.approx(flat[0].abs().sort().values.tolist())
    narrow = [Sketch(64, seed) for seed in range(400)]
    found = torch.stack([torch.dot(s(x), s(y)) for s in narrow])
    spread = math.sqrt(2 / 64) * (flat[0].norm() * flat[1].norm()).item()  # no more than this
    assert found.std() < spread
    assert found.mean() == pytest.approx(torch.dot(*flat).item(), abs=4 * spread / math.sqrt(400))


def test_directions() -> None:
    # Two facts pull along the first axis and one along the second; the update is (3, 4, 12), of length 13.
    gradients = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    update = torch.tensor([3.0, 4.0, 12.0])
    assert principal_share(update, gradients, 1) == pytest.approx(100 * 9 / 169)
    assert principal_share(update, gradients, 2) == pytest.approx(100 * 25 / 169)
    assert principal_share(update, gradients, 3) == pytest.approx(100 * 25 / 169)  # there is no third
    assert principal_share(torch.zeros(3), gradients, 1) == 0.0
    assert mean_cosine(gradients) == pytest.approx(1 / 3)
    slanted = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])  # cosines √½, −1, −√½
    assert mean_cosine(slanted) == pytest.approx(-1 / 3)


def test_gradients_of_examples() -> None:
    model, one = answer_model(dtype=torch.float32), part([(3, 1), (5, 2), (2, 3)])
    sketch = Sketch(sum(p.numel() for p in model.parameters()))
    model.train()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    found = example_gradients(model, [one], sketch)
    assert model.training
    assert not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())
    parameters = list(model.parameters())
    frozen.requires_grad_(True)
    for row in range(3):
        total, length = example_log_probability(model.hf, one, row)
        expected = sketch(torch.autograd.grad(total / length, parameters, materialize_grads=True))
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-6)


class Scale(nn.Module):
    """One weight."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]), requires_grad=False)


def test_the_line_between_two_models() -> None:
    model = Scale(4.0)
    seen = line(model, {"weight": torch.tensor([2.0])}, lambda: (model.weight.item() - 3) ** 2)  # type: ignore[arg-type]
    assert seen == [1.0, 0.25, 0.0, 0.25, 1.0]
    assert (model.weight.item(), model.weight.requires_grad) == (4.0, False)
    assert barrier(seen) == 0.0
    assert barrier([0.0, 5.0, 4.0]) == 3.0  # the chord is at 2
    with at_weights(model, {"weight": torch.tensor([7.0])}):  # type: ignore[arg-type]
        assert model.weight.item() == 7.0
    assert model.weight.item() == 4.0


def test_mean_nll() -> None:
    model, one = answer_model(dtype=torch.float64), part([(3, 1), (5, 2), (2, 3)])
    each = [example_log_probability(model.hf, one, row) for row in range(3)]
    want = -sum((total / length).item() for total, length in each) / 3
    assert mean_nll(model, [{k: v[:2] for k, v in one.items()}, {k: v[2:] for k, v in one.items()}]) == pytest.approx(
        want
    )
    assert 0 < want < 3 * math.log(VOCAB)


def test_all_of_a_model() -> None:
    data, model = FewFacts(n=6), AnswerModel(load_model("tiny"))
    original = weights_of(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    before = weights(model)
    adversary = Elicitation(share=0.5, steps=4)
    found = indicators(model, data.tokenizer, original, data, adversary, data.splits.test, probe_examples=4)
    assert equal(before, weights(model))
    n_weights = sum(p.numel() for p in model.parameters())
    assert found["distance"] == pytest.approx(0.02 * math.sqrt(n_weights), rel=0.01)
    assert found["participation"] == pytest.approx(100 / 3, rel=0.02)  # of a Gaussian
    assert math.hypot(*found["distance_by_kind"].values()) == pytest.approx(found["distance"])
    assert found["principal_share_1"] <= found["principal_share_5"] < 1  # random directions have nothing in common
    assert -1 <= found["gradient_cosine"] <= 1
    folds = [RelearnDataModule(data, p=0.5, seed=seed) for seed in FOLDS]
    each = [elicited_score(model, data.tokenizer, fold, adversary) for fold in folds]
    assert found["elicited"] == pytest.approx(sum(each) / 2)
    assert found["elicited"] != found["elicited_early"]
    others = RelearnDataModule(data, seed=FOLDS[0], selection=lambda of, *_: (data.splits.test[:3], of))
    assert found["gain_strangers"] == pytest.approx(elicited_score(model, data.tokenizer, others, adversary), abs=1.0)
