"""FDCU's masks against loops over examples and weights, worked in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.data import Toy, byte_tokenizer, examples
from toys.models import answer_model, bare_trainer, batch, distance, equal, example_log_probability, loader, weights

from lightning_ssiuu.datamodules import Splits
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.objectives.fdcu import FDCU
from lightning_ssiuu.objectives.gradient_ascent import GradientAscent
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.regularizers import AttributionRegularizer, Combined, DualMask, MatchedUpdateNorm
from lightning_ssiuu.utils.errors import UserError

ALPHA, BETA, LR = 7.0, 3.0, 0.05


def model_of(dtype: torch.dtype = torch.float64, **kwargs: Any) -> AnswerModel:
    return answer_model(dtype=dtype, vocab_size=260, max_position_embeddings=64, **kwargs)


def data(n_retain: int = 4) -> Toy:
    return Toy(Splits(examples(0, 2, 2), examples(10, n_retain, 2), examples(20, 2, 2)), batch_size=2)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR)


def run(module: Any, model: AnswerModel, source: Any = None, steps: int = 1, **kwargs: Any) -> Any:
    """Train; the trainer afterwards."""
    module.adopt(model.train(), byte_tokenizer())
    trainer = bare_trainer(steps, limit_val_batches=0, **kwargs)
    trainer.fit(module, source or data())
    return trainer


def log_probability_gradients(hf: nn.Module, some: dict[str, Tensor], row: int) -> list[Tensor]:
    logp, _ = example_log_probability(hf, some, row)
    return list(torch.autograd.grad(logp, list(hf.parameters()), allow_unused=True, materialize_grads=True))


def expected_fisher(hf: nn.Module, parts: list[dict[str, Tensor]], normalise: str) -> list[Tensor]:
    total = [torch.zeros_like(p) for p in hf.parameters()]
    count = 0
    for some in parts:
        for row in range(len(some["input_ids"])):
            for t, g in zip(total, log_probability_gradients(hf, some, row), strict=True):
                t += g**2
            count += 1
    fisher = [t / count for t in total]
    scale = {"max": lambda f: f.max(), "mean": lambda f: f.mean(), "none": lambda f: f.new_ones(())}[normalise]
    return [f / s if (s := scale(f)) > 0 else f for f in fisher]


def retain_parts(toy: Toy, limit: int | None = None) -> list[dict[str, Tensor]]:
    dataset = toy.train_dataloader().dataset
    rows = range(len(dataset.parts["retain"]))
    return [toy.train_dataloader().collate_fn([dataset["retain", n]])["retain"] for n in rows][:limit]


@pytest.mark.parametrize("normalise", ["max", "mean", "none"])
@pytest.mark.parametrize("n_examples", [None, 2])
def test_fisher_information(normalise: Any, n_examples: int | None) -> None:
    model, toy = model_of(), data()
    start = copy.deepcopy(model.hf)
    module = FDCU(alpha=ALPHA, beta=0.0, n_examples=n_examples, normalise=normalise, optimizer=sgd)
    run(module, model, toy)
    got = list(module.regularizer._fisher.values())
    expected = expected_fisher(start, retain_parts(toy, n_examples), normalise)
    assert distance(got, expected) < 1e-10
    assert [name for name, _ in model.named_parameters()] == list(module.regularizer._fisher)


class Batches(Toy):
    """Remembers the batches it served."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(Splits(examples(0, 4, 2), examples(10, 4, 2), examples(20, 2, 2)), batch_size=2, **kwargs)
        self.served: list[Any] = []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.served.append(batch)
        return batch


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("alpha", "beta"), [(ALPHA, 0.0), (0.0, BETA), (ALPHA, BETA)])
def test_the_step_is_masked(alpha: float, beta: float, accumulate: int) -> None:
    model, toy = model_of(), Batches()
    start = copy.deepcopy(model.hf)
    module = FDCU(alpha=alpha, beta=beta, optimizer=sgd)
    run(module, model, toy, accumulate_grad_batches=accumulate)
    micro = toy.served[:accumulate]
    parameters = list(start.parameters())
    gradient = [torch.zeros_like(p) for p in parameters]
    attribution = [torch.zeros_like(p) for p in parameters]
    for one in micro:
        for name, sign in (("forget", 1), ("retain", -1)):  # descending −NLL_forget + NLL_retain
            n = len(one[name]["input_ids"])
            for row in range(n):
                _, length = example_log_probability(start, one[name], row)
                for k, g in enumerate(log_probability_gradients(start, one[name], row)):
                    gradient[k] += sign * g / length / n / accumulate
                    if name == "forget":
                        attribution[k] += parameters[k].detach() * g
    fisher = expected_fisher(start, retain_parts(toy), "max")
    for now, p, g, a, f in zip(model.hf.parameters(), parameters, gradient, attribution, fisher, strict=True):
        mask = 1 / (1 + alpha * f) / (1 + beta * (a <= 0).double())
        assert (now - (p - LR * mask * g)).abs().max() < 1e-12
    assert any(0.05 < (a <= 0).double().mean() < 0.95 for a in attribution)


@pytest.mark.parametrize("backbone", [GradientDifference, GradientAscent])
def test_without_masks_it_is_the_backbone_bit_for_bit(backbone: Any) -> None:
    ends = []
    for make in (backbone, lambda **kwargs: FDCU(backbone(), alpha=0.0, beta=0.0, **kwargs)):
        model = model_of(torch.float32)
        run(make(optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2)), model, steps=3)
        ends.append(weights(model))
    assert equal(*ends)


def test_what_the_masks_let_through_whole_is_the_optimiser_s_bit_for_bit() -> None:
    ends, shares = [], []
    for make in (GradientDifference, lambda **kwargs: FDCU(alpha=0.0, beta=BETA, **kwargs)):
        model = model_of(torch.float32)
        trainer = run(make(optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2)), model)
        ends.append(weights(model))
        shares.append(trainer.callback_metrics.get("train/not_excitatory_share"))
    same = sum(int((a == b).sum()) for a, b in zip(*ends, strict=True)) / sum(a.numel() for a in ends[0])
    assert 100 * (1 - same) == pytest.approx(float(shares[1]), abs=1.0)
    assert 5 < float(shares[1]) < 95


def test_an_infinite_beta_freezes_what_does_not_promote_the_answers() -> None:
    model = model_of()
    start = copy.deepcopy(model.hf)
    toy = Batches()
    run(FDCU(alpha=0.0, beta=1e300, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2)), model, toy)
    some = toy.served[0]["forget"]
    rows = [log_probability_gradients(start, some, row) for row in range(2)]
    for k, (now, p) in enumerate(zip(model.hf.parameters(), start.parameters(), strict=True)):
        attribution = p.detach() * sum(one[k] for one in rows)
        held, free = attribution < -1e-14, attribution > 1e-14  # between them rounding decides
        assert torch.equal(now[held], p[held])
        assert not free.any() or not torch.equal(now[free], p[free])


def test_adamw_does_not_undo_the_mask_as_it_would_one_on_the_gradient() -> None:
    """A tensor of one weight, whose f is 1: its first AdamW step is the learning rate, masked 1/(1 + α) of that."""
    model, steps = model_of(), []
    for alpha in (0.0, 9.0):
        model = model_of()
        start = weights(model)
        run(FDCU(alpha=alpha, beta=0.0, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2)), model)
        steps.append([b - a for a, b in zip(start, weights(model), strict=True)])
    places = [int(f.argmax()) for f in expected_fisher(model_of().hf, retain_parts(data()), "max")]
    for place, free, masked in zip(places, *steps, strict=True):
        assert float(masked.flatten()[place]) == pytest.approx(float(free.flatten()[place]) / 10, rel=1e-6)


def test_dropout_is_off_while_fisher_information_is_taken() -> None:
    ends = []
    for dropout in (0.0, 0.5):
        quiet = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        model = AnswerModel(answer_model("gpt2", vocab_size=260, n_positions=64, **quiet).hf)
        module = FDCU(alpha=ALPHA, beta=0.0, optimizer=sgd)
        run(module, model)
        assert all(one.training for one in model.modules())
        ends.append(list(module.regularizer._fisher.values()))
    assert equal(*ends)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_narrow_precision(precision: Any) -> None:
    model = model_of(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    module = FDCU(optimizer=sgd)
    run(module, model, steps=2, precision=precision)
    assert all(f.dtype == torch.float32 and f.min() >= 0 and f.max() <= 1 for f in module.regularizer._fisher.values())
    assert all(p.isfinite().all() for p in model.parameters())


def test_resuming_takes_the_original_fisher_information_up(tmp_path: Any) -> None:
    def module() -> FDCU:
        module = FDCU(alpha=ALPHA, beta=BETA, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
        module.adopt(model_of(torch.float32).train(), byte_tokenizer())
        return module

    def trainer(steps: int) -> Any:
        return bare_trainer(steps, limit_val_batches=0)

    whole, first, second = module(), module(), module()
    trainer(4).fit(whole, data())
    half = trainer(2)
    half.fit(first, data())
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer(4).fit(second, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert equal(weights(whole.model), weights(second.model))
    assert equal(whole.regularizer._fisher.values(), second.regularizer._fisher.values())


def test_another_regularizer_works_beside_the_masks() -> None:
    module = FDCU(regularizer=AttributionRegularizer(0.3, "relative"), optimizer=sgd)
    assert isinstance(module.regularizer, Combined)
    trainer = run(module, model_of(), steps=2)
    assert trainer.callback_metrics["train/penalty_gradient_norm"] > 0
    assert trainer.callback_metrics["train/not_excitatory_share"] > 0
    model = model_of()
    start = weights(model)
    run(FDCU(regularizer=MatchedUpdateNorm(0.25), optimizer=sgd), model)  # the masked step is the one that is scaled
    moved = [a - b for a, b in zip(weights(model), start, strict=True)]
    assert math.sqrt(sum(float((m**2).sum()) for m in moved)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FDCU(alpha=-1.0), "regularizer.alpha"),
        (lambda: FDCU(beta=math.inf), "regularizer.beta"),
        (lambda: FDCU(n_examples=0), "regularizer.n_examples"),
        (lambda: FDCU(normalise="norm"), "regularizer.normalise"),
        (lambda: FDCU(GradientDifference(regularizer=DualMask())), "backbone.regularizer"),
    ],
)
def test_bad_arguments(make: Any, named: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert caught.value.argument == named


def test_no_retain_examples_are_refused_before_the_first_step() -> None:
    model = answer_model()
    before = weights(model)
    module = FDCU(optimizer=sgd)
    module.adopt(model.train(), None)
    with pytest.raises(UserError, match="UnlearningDataModule"):
        bare_trainer(1).fit(module, loader([batch(0)]))
    assert equal(before, weights(model))
