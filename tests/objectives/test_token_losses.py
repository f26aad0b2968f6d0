"""UNDIAL, CE-U, WGA, SatImp and PDU against losses worked out by hand, their limits, and PDU's dual variable."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from toys.data import Toy, byte_tokenizer, examples
from toys.losses import (
    UNEQUAL,
    answers,
    check_by_hand,
    gradient,
    logit_gradient,
    mean,
    predictions,
    probabilities,
    total,
)
from toys.models import bare_trainer, distance, part, random_model, weights

from lightning_ssiuu.datamodules import Splits
from lightning_ssiuu.models.answers import AnswerModel, mean_over_answers
from lightning_ssiuu.objectives.ceu import CEU, ceu
from lightning_ssiuu.objectives.losses import answer_nll, gradient_ascent
from lightning_ssiuu.objectives.pdu import PDU, logit_margin_flattening
from lightning_ssiuu.objectives.satimp import SatImp, satimp
from lightning_ssiuu.objectives.undial import UNDIAL, undial
from lightning_ssiuu.objectives.wga import WGA, wga

FORGET = part(UNEQUAL, 7)


# ---- losses and gradients ----------------------------------------------------------------------------------------


def undial_by_hand(model: nn.Module, original: nn.Module, beta: float) -> Tensor:
    sequences = []
    for now, then in zip(predictions(model, FORGET), predictions(original, FORGET), strict=True):
        tokens = []
        for (z, y), (z_then, _) in zip(now, then, strict=True):
            lowered = z_then.detach().clone()
            lowered[y] -= beta
            target = probabilities(lowered)
            tokens.append(-total([target[v] * probabilities(z)[v].log() for v in range(len(z))]))
        sequences.append(mean(tokens))
    return mean(sequences)


def ceu_by_hand(model: nn.Module, original: nn.Module, skip_first: int) -> Tensor:
    sequences = []
    for now in predictions(model, FORGET):
        tokens = [torch.zeros((), dtype=torch.float64)] if len(now) <= skip_first else []
        for z, y in now[skip_first:]:
            p, fixed = probabilities(z), probabilities(z).detach()
            others = [v for v in range(len(z)) if v != y]
            tokens.append(-total([fixed[v] / (1 - fixed[y]) * p[v].log() for v in others]))
        sequences.append(mean(tokens))
    return mean(sequences)


def satimp_by_hand(model: nn.Module, original: nn.Module, beta1: float, beta2: float) -> Tensor:
    sequences = []
    for now in predictions(model, FORGET):
        p = [probabilities(z)[y] for z, y in now]
        sequences.append(mean([p_.item() ** beta1 * (1 - p_.item()) ** beta2 * p_.log() for p_ in p]))
    return mean(sequences)


def wga_by_hand(model: nn.Module, original: nn.Module, beta: float) -> Tensor:
    return satimp_by_hand(model, original, beta, 0.0)


def pdu_by_hand(model: nn.Module, original: nn.Module) -> Tensor:
    sequences = []
    for now in predictions(model, FORGET):
        sequences.append(mean([(z[int(z.argmax())] - mean(list(z))) ** 2 for z, _ in now]))
    return mean(sequences)


@pytest.mark.parametrize(
    ("module", "by_hand", "options"),
    [
        (UNDIAL, undial_by_hand, {"beta": 10.0}),
        (UNDIAL, undial_by_hand, {"beta": 0.5}),
        (CEU, ceu_by_hand, {"skip_first": 0}),
        (CEU, ceu_by_hand, {"skip_first": 1}),
        (CEU, ceu_by_hand, {"skip_first": 3}),
        (WGA, wga_by_hand, {"beta": 1.0}),
        (WGA, wga_by_hand, {"beta": 0.3}),
        (SatImp, satimp_by_hand, {"beta1": 0.5, "beta2": 1.0}),
        (SatImp, satimp_by_hand, {"beta1": 0.2, "beta2": 7.0}),
        (PDU, pdu_by_hand, {}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_loss_and_gradient_are_those_worked_out_by_hand(module: Any, by_hand: Any, options: dict[str, float]) -> None:
    check_by_hand(module(**options), by_hand, FORGET, options)


def some_answers(n_vocabulary: int = 9) -> Any:
    logits = torch.randn(6, n_vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return answers(logits, [1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 2])


def test_without_weights_it_is_gradient_ascent() -> None:
    some = some_answers()
    ascent = logit_gradient(gradient_ascent, some)
    for loss in (lambda one: wga(one, 0.0), lambda one: satimp(one, 0.0, 0.0)):
        assert loss(some).item() == gradient_ascent(some).item()
        assert torch.equal(logit_gradient(loss, some), ascent)


def test_the_two_weights_pull_the_two_ways() -> None:
    sure, unsure, lost = answers([[9.0, 0.0]], [0]), answers([[0.0, 0.0]], [0]), answers([[0.0, 9.0]], [0])

    def share(beta1: float, beta2: float) -> list[float]:
        strength = [logit_gradient(lambda one: satimp(one, beta1, beta2), one).norm() for one in (sure, unsure, lost)]
        plain = [logit_gradient(gradient_ascent, one).norm() for one in (sure, unsure, lost)]
        return [float(a / b) for a, b in zip(strength, plain, strict=True)]

    assert share(2.0, 0.0) == pytest.approx([(1 / (1 + math.exp(-9))) ** 2, 1 / 4, (1 / (1 + math.exp(9))) ** 2])
    assert share(0.0, 1.0) == pytest.approx([1 / (1 + math.exp(9)), 1 / 2, 1 / (1 + math.exp(-9))])


def test_undial_of_the_original_is_still_where_nothing_is_lowered() -> None:
    some = some_answers()
    assert logit_gradient(lambda one: undial(one, some.logits, 0.0), some).abs().max() < 1e-15
    assert logit_gradient(lambda one: undial(one, some.logits, 1.0), some).abs().max() > 1e-2


def test_ceu_skips_the_beginning_of_each_answer() -> None:
    some = some_answers()
    moved = logit_gradient(lambda one: ceu(one, 1), some).abs().sum(-1)
    assert (moved > 0).tolist() == [False, True, True, False, False, True]
    assert (logit_gradient(lambda one: ceu(one, 3), some) == 0).all()
    assert ceu(some, 3).item() == 0.0
    # the first sequence's two tokens, the third's one, over three sequences
    each = [ceu(answers(some.logits[k : k + 1], [int(some.targets[k])]), 0).item() for k in (1, 2, 5)]
    assert ceu(some, 1).item() == pytest.approx(((each[0] + each[1]) / 2 + 0 + each[2]) / 3)


def test_flat_logits_have_no_margin() -> None:
    assert logit_margin_flattening(answers([[4.0, 4.0, 4.0]], [1])).item() == 0.0
    assert logit_margin_flattening(answers([[4.0, 1.0, 1.0], [0.0, 0.0, 0.0]], [1, 1])).item() == pytest.approx(2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_certain_tokens_give_finite_losses_and_gradients(dtype: torch.dtype, logit: float) -> None:
    some = answers(torch.tensor([[logit, 0.0, 1.0]], dtype=dtype), [0])
    for loss in (
        lambda one: undial(one, some.logits, 10.0),
        lambda one: ceu(one, 0),
        lambda one: wga(one, 1.0),
        lambda one: satimp(one, 5.0, 1.0),
        lambda one: satimp(one, 0.0, 0.0),
        logit_margin_flattening,
    ):
        value = loss(some)
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert logit_gradient(loss, some).isfinite().all()


def test_a_sequence_without_labels_adds_nothing() -> None:
    with_empty = answers(some_answers().logits[:1], [1], [1])  # row 0 has none
    assert mean_over_answers(torch.tensor([3.0]), with_empty).item() == 1.5
    assert wga(with_empty, 1.0).isfinite()


# ---- PDU's dual variable -----------------------------------------------------------------------------------------


class Followed(PDU):
    """Notes λ before each step, and the mean loss on the whole retain set."""

    def __init__(self, lr: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**{"forget_weight": 0.01, **kwargs}, optimizer=lambda p: torch.optim.SGD(p, lr=lr))
        self.path: list[tuple[float, float]] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            loss = answer_nll(self(next(self.training_parts("retain")))).item()
        self.path.append((self.retain_weight, loss))
        super().on_before_optimizer_step(optimizer)


def followed(steps: int, micro: int = 1, folder: Path | None = None, resume: Path | None = None, **kwargs: Any) -> Any:
    """Trained with the whole retain set in each step, in so many micro-batches; both sets have 6 examples."""
    module = Followed(**kwargs)
    module.adopt(AnswerModel(random_model(vocab_size=260)), byte_tokenizer())
    data = Toy(Splits(examples(0, 6), examples(10, 6), examples(20, 2), []), batch_size=6 // micro)
    keep = [] if folder is None else [ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)]
    trainer = bare_trainer(steps, accumulate_grad_batches=micro, callbacks=keep, enable_checkpointing=bool(keep))
    trainer.fit(module, data, ckpt_path=resume)
    return module


def test_lambda_moves_once_per_step_by_the_retain_loss_before_the_step() -> None:
    module = followed(4, epsilon=4.0, dual_step_size=0.5, retain_weight=2.0)
    dual = 2.0
    for before, loss in module.path:
        assert before == pytest.approx(dual, rel=1e-12)
        dual = max(0.0, dual + 0.5 * (loss - 4.0))
    assert module.retain_weight == pytest.approx(dual, rel=1e-12)
    assert module.path[0][1] > 4.0
    assert len({before for before, _ in module.path}) == 4


def test_lambda_does_not_depend_on_how_a_step_is_cut() -> None:
    whole, cut = (followed(4, micro, epsilon=4.0, retain_weight=2.0) for micro in (1, 3))
    assert len(whole.path) == len(cut.path) == 4
    assert whole.retain_weight == pytest.approx(cut.retain_weight, rel=1e-12)
    assert distance(weights(cut.model), weights(whole.model)) < 1e-12


def test_lambda_is_in_the_gradient() -> None:
    module = followed(2, epsilon=1e9, dual_step_size=1.0, retain_weight=3.0)  # λ is 0 after the first step
    other = followed(1, epsilon=1e9, dual_step_size=1.0, retain_weight=3.0)
    some, lr = next(other.training_parts("forget")), 0.05
    step = gradient(0.01 * other.forget_loss(some), other.model)
    expected = [p - lr * g for p, g in zip(weights(other.model), step, strict=True)]
    assert distance(weights(module.model), expected) < 1e-12


def test_lambda_falls_to_zero_and_rises_again() -> None:
    module = followed(1, epsilon=1e9, retain_weight=1.0)
    assert module.retain_weight == 0.0
    module.bound = 1.0
    bare_trainer(2).fit(module, Toy(Splits(examples(0, 6), examples(10, 6), examples(20, 2), []), batch_size=6))
    assert module.path[1][0] == 0.0
    assert module.path[2][0] == pytest.approx(module.path[1][1] - 1.0, rel=1e-12)


def test_lambda_waits_while_warming_up() -> None:
    module = followed(4, epsilon=4.0, retain_weight=2.0, dual_warmup_epochs=2)  # one step an epoch
    assert [before for before, _ in module.path][:3] == [2.0, 2.0, 2.0]
    assert module.path[3][0] != 2.0


def test_the_bound_is_relative_to_the_original_model() -> None:
    module = followed(2, tolerance=0.25)
    assert module.bound == pytest.approx(1.25 * module.path[0][1], rel=1e-12)


def test_a_divergence_can_be_bounded_from_zero_on() -> None:
    module = followed(3, retain="kl", epsilon=0.01, retain_weight=0.0, reference="second_model", forget_weight=1.0)
    assert module.retain_weight > 0.0
