"""Losses by hand, objectives' gradients, how often the model is run, and what a user's own objective needs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toys.models import (
    TOYS,
    UNRECORDED,
    VOCAB,
    Recorder,
    answer_model,
    bare_trainer,
    batch,
    distance,
    equal,
    example_log_probability,
    loader,
    part,
    random_model,
    weights,
)

from lightning_ssiuu.models.answers import AnswerModel, Answers
from lightning_ssiuu.objectives import objectives
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.fine_tuning import FineTuning
from lightning_ssiuu.objectives.gradient_ascent import GradientAscent
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.objectives.losses import answer_nll, gradient_ascent
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.regularizers import AttributionRegularizer, Regularizer
from lightning_ssiuu.utils.errors import UserError


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def fitted(
    module: UnlearningModule, batches: list[Any], model: AnswerModel | None = None, **kwargs: Any
) -> AnswerModel:
    model = model or answer_model()
    module.adopt(model.train(), None)  # type: ignore[arg-type]
    bare_trainer(len(batches), **kwargs).fit(module, loader(batches))
    return model


# ---- losses ------------------------------------------------------------------------------------------------------


def test_losses_are_means_over_sequences_of_token_means() -> None:
    # probabilities of the right tokens: sequence 0: 1/2, 1/4, 1/8; sequence 1: 1/2; sequence 2: 1/3, 1/3
    p = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 2, 1 / 3, 1 / 3], dtype=torch.float64)
    logits = torch.stack([p.log(), (1 - p).log()], -1) + 5.0
    answers = Answers(logits, torch.zeros(6, dtype=torch.long), torch.tensor([0, 0, 0, 1, 2, 2]), 3)
    log2, log3 = math.log(2), math.log(3)
    assert answers.logps.tolist() == pytest.approx([-6 * log2, -log2, -2 * log3])
    assert answers.lengths.tolist() == [3, 1, 2]
    assert answers.mean_logps.tolist() == pytest.approx([-2 * log2, -log2, -log3])
    # not the mean over all tokens, which would be (7 log 2 + 2 log 3) / 6
    assert answer_nll(answers).item() == pytest.approx((3 * log2 + log3) / 3)
    assert gradient_ascent(answers).item() == pytest.approx(-(3 * log2 + log3) / 3)
    assert answers.token_correct.tolist() == [True, False, False, True, False, False]


def test_half_precision_logits_are_widened_before_the_softmax() -> None:
    answers = Answers(torch.tensor([[0.0, 9.0]]).bfloat16(), torch.tensor([0]), torch.tensor([0]), 1)
    assert answers.token_logps.dtype == torch.float32
    assert answers.logps.item() == pytest.approx(-math.log1p(math.exp(9)), rel=1e-6)


def reference_nll(hf: torch.nn.Module, some: dict[str, Tensor]) -> Tensor:
    rows = [example_log_probability(hf, some, row) for row in range(len(some["input_ids"]))]
    return torch.stack([-logp / n for logp, n in rows]).mean()


@pytest.mark.parametrize(
    ("make", "forget", "retain"),
    [
        (lambda: GradientDifference(), -1.0, 1.0),
        (lambda: GradientDifference(forget_weight=0.25, retain_weight=3.0), -0.25, 3.0),
        (lambda: GradientAscent(), -1.0, 0.0),
        (lambda: GradientAscent(retain_weight=2.0), -1.0, 2.0),
        (lambda: FineTuning(), 1.0, 1.0),
        (lambda: SSIUU(forget_weight=0.5, retain_weight=2.0), -0.5, 2.0),
        (lambda: SSIUU(backbone=GradientAscent()), -1.0, 0.0),
        (lambda: SSIUU(backbone=GradientDifference(forget_weight=0.5)), -0.5, 1.0),
    ],
)
def test_gradients(make: Any, forget: float, retain: float) -> None:
    model, log, module, one = answer_model(), [], make(), batch(1)
    module.optimizer = lambda params: Recorder(params, lr=0.0, log=log)
    loss = forget * reference_nll(model.hf, one["forget"]) + retain * reference_nll(model.hf, one["retain"])
    expected = torch.autograd.grad(loss, list(model.hf.parameters()))
    fitted(module, [one], model)
    assert distance(log[0], expected) < 1e-12


# ---- SSIUU and its backbone --------------------------------------------------------------------------------------


def test_default_backbone() -> None:
    module = SSIUU()
    assert type(module.backbone) is GradientDifference
    assert (module.forget_weight, module.retain_weight) == (1.0, 1.0)
    assert SSIUU(retain_weight=5.0).backbone.retain_weight == 5.0  # type: ignore[union-attr]
    assert isinstance(module.regularizer, AttributionRegularizer)
    assert (module.regularizer.weight, module.regularizer.weight_mode) == (1e-3, "absolute")
    module.adopt(answer_model(), None)  # type: ignore[arg-type]
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    assert not [name for name in names if "backbone" in name]


def test_errors() -> None:
    with pytest.raises(UserError, match="retain_weight"):
        SSIUU(backbone=GradientDifference(), retain_weight=2.0)
    with pytest.raises(UserError, match=r"backbone\.regularizer"):
        SSIUU(backbone=GradientDifference(regularizer=AttributionRegularizer()))
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="forget_weight"):
            GradientDifference(forget_weight=weight)
    with pytest.raises(UserError, match="batch"):
        fitted(GradientDifference(), [{"test": part([(2, 2)])}])
    with pytest.raises(UserError, match="batch"):
        fitted(GradientAscent(forget_weight=0.0), [batch(0)])
    with pytest.raises(NotImplementedError, match="forget_loss"):
        fitted(UnlearningModule(optimizer=sgd), [batch(0)])


def test_objectives_are_found() -> None:
    assert {"FineTuning", "GradientAscent", "GradientDifference", "SSIUU"} <= set(objectives())
    assert all(issubclass(value, UnlearningModule) for value in objectives().values())


def test_a_user_s_subclass_under_a_plain_trainer() -> None:
    class Bounded(SSIUU):
        """Ascent that stops caring once an answer is unlikely."""

        def forget_loss(self, batch: Any) -> Tensor:
            return -(-self.answers(batch).mean_logps).clamp(max=4.0).mean()

        def retain_loss(self, batch: Any) -> Tensor:
            return 2 * super().retain_loss(batch)

    start = weights(answer_model())
    module = Bounded(optimizer=sgd, regularizer=AttributionRegularizer(0.5, "relative"))
    model = fitted(module, [batch(n) for n in range(3)])
    assert not equal(start, weights(model))
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_user_s_regularizer() -> None:
    class Freeze(Regularizer):
        seen = 0

        def collect(self, model: Any, answers: Any, part: Any) -> None:
            self.seen += answers.n_sequences

        def apply(self, model: Any) -> dict[str, float]:
            for p in model.parameters():
                p.grad.zero_()
            return {"zeroed": 1.0}

    regularizer = Freeze()
    start = weights(answer_model())
    model = fitted(GradientDifference(optimizer=sgd, regularizer=regularizer), [batch(0), batch(1)])
    assert equal(start, weights(model))
    assert regularizer.seen == 6


# ---- how often the model is run ----------------------------------------------------------------------------------


class OwnRetain(GradientDifference):
    """Need not ask for the answers of its part, so they are not run beside the forget part's."""

    def retain_loss(self, batch: Any) -> Any:
        return super().retain_loss(batch)


@pytest.mark.parametrize(
    ("make", "forwards"),
    [
        (lambda: GradientDifference(), 1),
        (lambda: GradientDifference(retain_weight=0.0), 1),
        (lambda: GradientDifference(forget_weight=0.0), 1),
        (lambda: GradientAscent(), 1),
        (lambda: SSIUU(), 1),
        (lambda: SSIUU(backbone=OwnRetain()), 2),
        (lambda: SSIUU(retain_weight=0.0), 1),
        (lambda: SSIUU(backbone=GradientAscent()), 1),
        (lambda: FineTuning(regularizer=AttributionRegularizer()), 2),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_part_is_run_once(make: Any, forwards: int, accumulate: int) -> None:
    module, model, count = make(), answer_model(), []
    module.optimizer = sgd
    model.register_forward_hook(lambda it, *_: count.append(1) if it.training else None)
    module.adopt(model.train(), None)
    batches = [batch(n) for n in range(2 * accumulate)]
    bare_trainer(2, accumulate_grad_batches=accumulate).fit(module, loader(batches))
    assert len(count) == forwards * 2 * accumulate


def test_one_batch_object_served_again_is_run_again() -> None:
    one, count = batch(0), []
    module, model = SSIUU(optimizer=sgd), answer_model().train()
    model.register_forward_hook(lambda it, *_: count.append(1) if it.training else None)
    fitted(module, [one, one, one], model)
    assert len(count) == 3


def test_training_logs_what_it_does() -> None:
    module = SSIUU(optimizer=sgd)
    module.adopt(answer_model().train(), None)  # type: ignore[arg-type]
    trainer = bare_trainer(2)
    trainer.fit(module, loader([batch(0), batch(1)]))
    names = {"forget_loss", "retain_loss", "negative_share", "max_log_probability"}
    names |= {"objective_gradient_norm", "penalty_gradient_norm"}
    assert {f"train/{name}" for name in names} <= set(trainer.callback_metrics)
    with torch.no_grad():
        want = gradient_ascent(module(batch(1)["forget"])).item()
    assert trainer.callback_metrics["train/forget_loss"].item() == pytest.approx(want, abs=0.5)


# ---- logits only where there are labels --------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_the_full_ones_at_the_labels(name: str, tied: bool) -> None:
    hf = random_model(name, tie_word_embeddings=tied).eval()
    model, some = AnswerModel(hf), part([(3, 2), (2, 5), (6, 1)])
    shapes = []
    hf.get_output_embeddings().register_forward_hook(lambda _m, _a, out: shapes.append(out.shape))
    answers = model(some["input_ids"], some["attention_mask"], some["labels"])
    full = hf(input_ids=some["input_ids"], attention_mask=some["attention_mask"]).logits
    where = [(row, k) for row, labels in enumerate(some["labels"].tolist()) for k, t in enumerate(labels) if t != -100]
    expected = torch.stack([full[row, k - 1] for row, k in where])
    torch.testing.assert_close(answers.logits, expected, rtol=1e-6, atol=1e-9)
    assert answers.targets.tolist() == [some["input_ids"][row, k].item() for row, k in where]
    assert answers.sequence_index.tolist() == [row for row, _ in where]
    assert shapes[0] == {"gemma2": (3, 7, VOCAB), UNRECORDED: (1, 16, VOCAB)}.get(name, (8, VOCAB))
    if name == "gemma2":
        assert answers.logits.abs().max() <= 3.0  # its soft cap, applied after the head
