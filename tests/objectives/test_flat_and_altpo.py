"""FLAT and AltPO: losses worked out by hand, conjugates by their definition, and which alternates are chosen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.data import Toy, byte_tokenizer
from toys.losses import UNEQUAL, check_by_hand, log_probability, mean, predictions, probabilities
from toys.models import bare_trainer, part, random_model

from lightning_ssiuu.datamodules import QAExample, Splits
from lightning_ssiuu.datamodules.pairs import answered
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.objectives import objectives
from lightning_ssiuu.objectives.altpo import AltPO
from lightning_ssiuu.objectives.cir import CIR
from lightning_ssiuu.objectives.flat import FLAT, activation, conjugate
from lightning_ssiuu.objectives.lat import LAT
from lightning_ssiuu.objectives.rejection import rejected
from lightning_ssiuu.utils.errors import UserError

FORGET = part(UNEQUAL, 7)
#: f of each divergence, as a function of the ratio of two densities.
F_OF: dict[str, Any] = {
    "total_variation": lambda t: 0.5 * (t - 1).abs(),
    "kl": lambda t: t * t.log(),
    "jensen_shannon": lambda t: t * t.log() - (t + 1) * ((t + 1) / 2).log(),
    "pearson": lambda t: (t - 1).square(),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_SSIUU_CACHE", str(tmp_path / "cache"))


# ---- FLAT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", F_OF)
def test_conjugates_are_what_their_definition_says(divergence: Any) -> None:
    """``f*(u) = sup_t (t u − f(t))``, by a fine grid of t, at what g* makes of probabilities."""
    ratios = torch.logspace(-9, 9, 40_001, base=math.e, dtype=torch.float64)
    for value in (0.0, 0.2, 0.7, 1.0):
        u = activation(torch.tensor(value, dtype=torch.float64), divergence)
        slowest = (ratios * u - F_OF[divergence](ratios)).max()
        assert conjugate(u, divergence).item() == pytest.approx(slowest.item(), abs=2e-4)


def mean_token_probability(model: nn.Module, some: dict[str, Tensor]) -> list[Tensor]:
    return [mean([probabilities(z)[y] for z, y in tokens]) for tokens in predictions(model, some)]


def flat_by_hand(model: nn.Module, original: nn.Module, divergence: str) -> Tensor:
    good = mean_token_probability(model, dict(rejected(FORGET, byte_tokenizer())))
    bad = mean_token_probability(model, FORGET)
    per_example = []
    for p, q in zip(good, bad, strict=True):
        if divergence == "kl":
            per_example.append((q - 1).exp() - p)
        elif divergence == "pearson":
            per_example.append(q**2 / 4 + q - p)
        elif divergence == "jensen_shannon":
            lowered = q + (1 + (-q).exp()).log() - math.log(2)
            per_example.append(lowered - (math.log(2) - (1 + (-p).exp()).log()))
        else:
            per_example.append((q.tanh() - p.tanh()) / 2)
    return mean(per_example)


@pytest.mark.parametrize("divergence", F_OF)
def test_flat_and_its_gradient_are_those_worked_out_by_hand(divergence: Any) -> None:
    check_by_hand(FLAT(divergence=divergence), flat_by_hand, FORGET, {"divergence": divergence})


# ---- AltPO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_altpo_and_its_gradient_are_those_worked_out_by_hand(beta: float) -> None:
    module = AltPO(beta=beta)
    module.alternates = {n: [40 + n, 50 + n, 60] for n in range(len(UNEQUAL))}

    def by_hand(model: nn.Module, original: nn.Module) -> Tensor:
        instead = dict(module.alternated(FORGET))
        assert [answer for _, answer in answered(instead)] == list(module.alternates.values())
        assert [prompt for prompt, _ in answered(instead)] == [prompt for prompt, _ in answered(FORGET)]
        gains = []
        for some in (instead, FORGET):
            pairs = zip(predictions(model, some), predictions(original, some), strict=True)
            gains.append([log_probability(now) - log_probability(then).detach() for now, then in pairs])
        return mean([2 / beta * (1 + (beta * (bad - good)).exp()).log() for good, bad in zip(*gains, strict=True)])

    check_by_hand(module, by_hand, FORGET, {})


def chosen(forget: list[QAExample], retain: list[QAExample], **kwargs: Any) -> dict[int, str]:
    module: Any = AltPO(**kwargs)
    module.adopt(AnswerModel(random_model(vocab_size=260)), byte_tokenizer())
    data = Toy(Splits(forget, retain, [QAExample(99, "t?", "t")]))
    bare_trainer(1, limit_val_batches=0).fit(module, data)
    return {n: byte_tokenizer().decode(ids, skip_special_tokens=True)[-1] for n, ids in module.alternates.items()}


def test_an_alternate_answers_the_most_similar_retain_question() -> None:
    forget = [QAExample(0, "abc?", "1"), QAExample(1, "xyz?", "2")]
    retain = [QAExample(10, "xyw?", "9"), QAExample(11, "abd?", "8"), QAExample(12, "mno?", "7")]
    assert chosen(forget, retain) == {0: "8", 1: "9"}


def test_ones_own_answer_is_no_alternate_and_the_seed_breaks_ties() -> None:
    forget = [QAExample(n, f"abc{n}?", "1") for n in range(6)]
    retain = [QAExample(10, "abc?", "1"), QAExample(11, "abj?", "8"), QAExample(12, "abk?", "7")]
    found = [chosen(forget, retain, seed=seed) for seed in (0, 0, 1)]
    assert set(found[0].values()) == {"8", "7"}
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("name", ["AltPO", "DPO", "FLAT", "IDK"])
@pytest.mark.parametrize("wrapper", [LAT, CIR])
def test_states_of_other_texts_than_the_forget_answers_are_no_business_of_some(wrapper: Any, name: str) -> None:
    with pytest.raises(UserError, match=f"backbone: got '?{name}'?, allowed: an objective whose loss is of the forget"):
        wrapper(backbone=objectives()[name]())


def test_no_other_answer_is_refused() -> None:
    with pytest.raises(UserError, match="data: got 'no retain answer', allowed: a retain set whose answers fit"):
        chosen([QAExample(0, "abc?", "1")], [QAExample(10, "abd?", "1")])
