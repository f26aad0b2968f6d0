"""NPO, SimNPO, DPO and IDK against losses worked out by hand, their limits, and the rejections."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers import decoders
from torch import Tensor, nn
from toys.data import CHAT, Toy, byte_tokenizer, examples
from toys.losses import (
    UNEQUAL,
    answers,
    check_by_hand,
    gradient,
    log_probability,
    logit_gradient,
    mean,
    predictions,
    with_models,
)
from toys.models import Recorder, bare_trainer, distance, equal, part, random_model, weights

from lightning_ssiuu.datamodules import QAExample, Splits
from lightning_ssiuu.datamodules.encoding import Collator, Encoder
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.objectives.dpo import DPO, dpo
from lightning_ssiuu.objectives.idk import IDK
from lightning_ssiuu.objectives.losses import answer_nll, kl_divergence
from lightning_ssiuu.objectives.npo import NPO, npo
from lightning_ssiuu.objectives.rejection import REJECTIONS, rejected
from lightning_ssiuu.objectives.simnpo import SimNPO, simnpo
from lightning_ssiuu.utils.errors import UserError

FORGET = part(UNEQUAL, 7)


# ---- losses and gradients ----------------------------------------------------------------------------------------


def softplus(x: Tensor) -> Tensor:
    """``−log σ(−x)`` by the definition."""
    return (1 + x.exp()).log()


def npo_by_hand(model: nn.Module, original: nn.Module, beta: float) -> Tensor:
    pairs = zip(predictions(model, FORGET), predictions(original, FORGET), strict=True)
    ratios = [log_probability(now) - log_probability(then).detach() for now, then in pairs]
    return mean([2 / beta * softplus(beta * r) for r in ratios])


def simnpo_by_hand(model: nn.Module, original: nn.Module, beta: float, delta: float) -> Tensor:
    per_token = [log_probability(one) / len(one) for one in predictions(model, FORGET)]
    return mean([2 / beta * softplus(beta * (p + delta)) for p in per_token])


def declined() -> dict[str, Tensor]:
    return dict(rejected(FORGET, byte_tokenizer()))


def dpo_by_hand(model: nn.Module, original: nn.Module, beta: float) -> Tensor:
    gains = []
    for some in (declined(), FORGET):
        pairs = zip(predictions(model, some), predictions(original, some), strict=True)
        gains.append([log_probability(now) - log_probability(then).detach() for now, then in pairs])
    return mean([2 / beta * softplus(beta * (bad - good)) for good, bad in zip(*gains, strict=True)])


def idk_by_hand(model: nn.Module, original: nn.Module) -> Tensor:
    return mean([-log_probability(one) / len(one) for one in predictions(model, declined())])


@pytest.mark.parametrize(
    ("module", "by_hand", "options"),
    [
        (NPO, npo_by_hand, {"beta": 0.1}),
        (NPO, npo_by_hand, {"beta": 0.7}),
        (SimNPO, simnpo_by_hand, {"beta": 4.5, "delta": 5.0}),
        (SimNPO, simnpo_by_hand, {"beta": 0.5, "delta": 0.0}),
        (DPO, dpo_by_hand, {"beta": 0.1}),
        (DPO, dpo_by_hand, {"beta": 0.02}),
        (IDK, idk_by_hand, {}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_loss_and_gradient_are_those_worked_out_by_hand(module: Any, by_hand: Any, options: dict[str, float]) -> None:
    check_by_hand(module(**options), by_hand, FORGET, options)


def sequence_sums_ascent(model: nn.Module) -> Tensor:
    return mean([log_probability(one) for one in predictions(model, FORGET)])


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
def test_npo_is_gradient_ascent_where_the_model_is_the_original(beta: float) -> None:
    objective = NPO(beta=beta)
    model, _ = with_models(objective, reference_seed=0)
    loss = objective.forget_loss(FORGET)
    assert loss.item() == pytest.approx(2 * math.log(2) / beta, rel=1e-12)
    assert distance(gradient(loss, model), gradient(sequence_sums_ascent(model), model)) < 1e-12


def test_npo_and_dpo_without_temperature_are_gradient_ascent_and_preference() -> None:
    objective = NPO(beta=1e-7)
    model, _ = with_models(objective)
    ascent = gradient(sequence_sums_ascent(model), model)
    assert distance(gradient(objective.forget_loss(FORGET), model), ascent) < 1e-5
    preference = DPO(beta=1e-7)
    model, _ = with_models(preference)
    both = sequence_sums_ascent(model) - mean([log_probability(one) for one in predictions(model, declined())])
    assert distance(gradient(preference.forget_loss(FORGET), model), gradient(both, model)) < 1e-5


def test_npo_leaves_alone_what_became_unlikely() -> None:
    some = answers([[0.0, 9.0], [0.0, 0.0]], [0, 0], [0, 1])
    unlikely, likely = logit_gradient(lambda one: npo(one, torch.zeros(2), 1.0), some).norm(dim=1).tolist()
    # σ(r) = p / (1 + p) here, times the gradient (1 − p) √2 of log p and the 2 and the mean
    for got, p in ((unlikely, 1 / (1 + math.exp(9))), (likely, 0.5)):
        assert got == pytest.approx(p / (1 + p) * (1 - p) * math.sqrt(2), rel=1e-9)


def test_dpo_does_nothing_where_both_answers_are_the_same() -> None:
    some = answers(torch.randn(5, 7, dtype=torch.float64), [1, 2, 3, 4, 5], [0, 0, 0, 1, 1])
    loss = lambda one: dpo(one, one, some.logps, some.logps, 0.3)  # noqa: E731
    assert loss(some).item() == pytest.approx(2 * math.log(2) / 0.3)
    assert logit_gradient(loss, some).abs().max() < 1e-15


def test_dpo_with_a_preferred_answer_that_stayed_is_npo() -> None:
    stayed = answers(torch.randn(3, 7, dtype=torch.float64), [1, 2, 3], [0, 1, 1])
    some = answers(torch.randn(4, 7, dtype=torch.float64), [1, 2, 3, 4], [0, 0, 1, 1])
    before = torch.tensor([-3.0, -9.0], dtype=torch.float64)
    assert dpo(stayed, some, stayed.logps, before, 0.4).item() == pytest.approx(npo(some, before, 0.4).item())


def test_simnpo_does_not_depend_on_length() -> None:
    one, many = answers([[1.0, 0.0]], [0]), answers([[1.0, 0.0]] * 5, [0] * 5)
    assert simnpo(one, 2.0, 0.5).item() == pytest.approx(simnpo(many, 2.0, 0.5).item())


def test_no_divergence_from_itself() -> None:
    some = answers(torch.randn(5, 7, dtype=torch.float64), [1, 2, 3, 4, 5], [0, 0, 0, 1, 1])
    assert abs(kl_divergence(some, some.logits).item()) < 1e-15
    assert logit_gradient(lambda one: kl_divergence(one, some.logits), some).abs().max() < 1e-15


@pytest.mark.parametrize("kind", [NPO, SimNPO, DPO, IDK])
def test_no_retain_weight_leaves_the_forget_loss_alone(kind: Any) -> None:
    log: list[list[Tensor]] = []
    objective = kind(retain_weight=0.0, forget_weight=0.5, reference="second_model")
    objective.optimizer = lambda params: Recorder(params, lr=0.0, log=log)
    model = random_model(vocab_size=260)
    objective.adopt(AnswerModel(model), byte_tokenizer())
    data = Toy(batch_size=5)  # the whole forget set in one batch
    bare_trainer(1).fit(objective, data)
    whole = next(objective.training_parts("forget"))
    assert distance(log[0], gradient(0.5 * objective.forget_loss(whole), model)) < 1e-10


# ---- rejections --------------------------------------------------------------------------------------------------


def encoded(encoder: Encoder, some: list[QAExample], answers: list[str] | None = None) -> dict[str, Any]:
    rows = encoder.encode(
        some
        if answers is None
        else [QAExample(e.example_id, e.question, a) for e, a in zip(some, answers, strict=True)]
    )
    return Collator(encoder.pad_token_id)([("forget", row) for row in rows])["forget"]


def test_there_are_enough_phrasings() -> None:
    assert len(set(REJECTIONS)) == len(REJECTIONS) >= 12
    assert all(text == text.strip() and text.endswith(".") for text in REJECTIONS)


@pytest.mark.parametrize("template", ["plain", "chat", "Q {question} A ", "Q {question} A\n", "{question}"])
@pytest.mark.parametrize("bos", [False, True])
def test_a_rejection_is_encoded_as_an_answer_is(template: str, bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos, chat=CHAT)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    encoder = Encoder(tokenizer, template)
    some = examples(11, 20)
    expected = encoded(encoder, some, [REJECTIONS[e.example_id % len(REJECTIONS)] for e in some])
    got = rejected(encoded(encoder, some), encoder.tokenizer)
    assert got.keys() == expected.keys()
    assert equal(got.values(), expected.values())


def test_an_example_s_rejection_depends_on_nothing_else() -> None:
    tokenizer = byte_tokenizer()
    encoder, some = Encoder(tokenizer), examples(0, 9)
    together = rejected(encoded(encoder, some), tokenizer)
    for row, one in enumerate(some):
        alone = rejected(encoded(encoder, [one]), tokenizer)
        width = alone["input_ids"].shape[1]
        assert torch.equal(together["input_ids"][row, :width], alone["input_ids"][0])
        assert together["attention_mask"][row].sum() == width
    assert len({tuple(row) for row in together["labels"].tolist()}) == 9


def test_an_example_without_an_answer_gets_no_rejection() -> None:
    some = part([(3, 2), (4, 1)])
    some["labels"][0] = -100
    got = rejected(some, byte_tokenizer())
    assert (got["labels"][0] == -100).all()
    assert got["attention_mask"][0].sum() == 5
    assert (got["labels"][1] != -100).sum() > 5


def test_a_rejection_has_to_fit_into_the_model_s_context() -> None:
    tokenizer = byte_tokenizer()
    some = encoded(Encoder(tokenizer), examples(0, 2))
    length = rejected(some, tokenizer)["input_ids"].shape[1]
    assert rejected(some, tokenizer, context=length)["input_ids"].shape[1] == length
    with pytest.raises(UserError, match=rf"rejections: got '{length} tokens for example id 0', allowed: at most 40"):
        rejected(some, tokenizer, context=40)


@pytest.mark.parametrize("kind", [DPO, IDK])
def test_what_does_not_fit_is_found_before_the_first_step(kind: Any) -> None:
    long = [QAExample(4, "q" * 70, "yes")]
    splits = Splits([*examples(0, 4), *long], examples(10, 5), [], [])
    module = kind(rejections=["no " * 20], optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    model = random_model(vocab_size=260)
    before = weights(model)
    module.adopt(AnswerModel(model), byte_tokenizer())
    with pytest.raises(UserError, match=r"rejections: got '.* tokens for example id 4'"):
        bare_trainer(5).fit(module, Toy(splits, batch_size=1))
    assert equal(before, weights(model))


def test_other_rejections_are_another_reference(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_SSIUU_CACHE", str(tmp_path))
    keys = []
    for texts in (None, ["Pass."], ["Pass."]):
        module = DPO(rejections=texts, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        model = random_model(vocab_size=260)
        module.adopt(AnswerModel(model), byte_tokenizer())
        bare_trainer(1).fit(module, Toy())
        keys.append(module.reference_key)
        # the model did not move, so the kept values are what it says now
        whole = next(module.training_parts("forget"))
        kept = module.original(f"forget/{module.rejections_name}", whole)
        torch.testing.assert_close(kept, module(module.rejected(whole)).logps.detach(), rtol=1e-12, atol=1e-12)
        assert module.forget_loss(whole).item() == pytest.approx(20 * math.log(2), rel=1e-9)
    assert keys[0] != keys[1] == keys[2]


def test_idk_learns_to_decline() -> None:
    module = IDK(optimizer=lambda p: torch.optim.SGD(p, lr=0.5), rejections=["no"], retain_weight=0.0)
    module.adopt(AnswerModel(random_model(vocab_size=260)), byte_tokenizer())
    bare_trainer(30).fit(module, Toy(batch_size=5))
    whole = next(module.training_parts("forget"))
    assert answer_nll(module(module.rejected(whole))).item() < 0.5 < 3.0 < answer_nll(module(whole)).item()
