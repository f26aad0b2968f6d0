"""UNDO: the noise, the divergence by hand, that the noise comes once and the forget set never."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from toys.data import Toy, byte_tokenizer, examples
from toys.models import Recorder, bare_trainer, distance, equal, weights
from toys.runs import first_batch, first_gradients, toy_model, toy_run

from lightning_ssiuu.datamodules import Splits
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.objectives.undo import UNDO, shrink_and_perturb
from lightning_ssiuu.regularizers import Regularizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_SSIUU_CACHE", str(tmp_path / "cache"))


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


# ---- the noise ---------------------------------------------------------------------------------------------------


def test_noise_is_uniform_within_xavier_s_bound_and_vectors_only_shrink() -> None:
    layer: Any = nn.Sequential(nn.Linear(200, 100), nn.LayerNorm(100)).double()
    before = weights(layer)
    alpha, beta = 0.4, 0.5
    shrink_and_perturb(layer, alpha, beta, seed=1)
    noise = (layer[0].weight.detach() - (1 - alpha) * before[0]) / (alpha * beta)
    bound = math.sqrt(6 / 300)
    assert 0.99 * bound < noise.abs().max() <= bound * (1 + 1e-6)
    assert abs(noise.mean()) < 0.02 * bound
    assert abs(noise.std() / (bound / math.sqrt(3)) - 1) < 0.02
    assert abs(noise.pow(4).mean() / (bound**4 / 5) - 1) < 0.05  # a normal distribution's would be far off
    for parameter, old in zip([layer[0].bias, *layer[1].parameters()], before[1:], strict=True):
        assert equal([parameter], [old * (1 - alpha)])


def test_noise_is_the_seed_s_alone_and_tied_weights_get_it_once() -> None:
    first, second, other = toy_model(), toy_model(), toy_model()
    state = torch.get_rng_state()
    shrink_and_perturb(first, 0.5, 0.1, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    shrink_and_perturb(second, 0.5, 0.1, seed=0)
    shrink_and_perturb(other, 0.5, 0.1, seed=1)
    assert equal(weights(first), weights(second))
    assert not equal(weights(first), weights(other))
    embedding: Any
    embedding, original = first.hf.get_input_embeddings().weight, toy_model().hf.get_input_embeddings().weight
    assert first.hf.get_output_embeddings().weight is embedding
    noise = (embedding - 0.5 * original).detach() / 0.05
    assert noise.abs().max() <= math.sqrt(6 / 276) * (1 + 1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.3), (1.0, 0.0)])
def test_limits_of_the_noise(alpha: float, beta: float) -> None:
    model = toy_model()
    before = weights(model)
    shrink_and_perturb(model, alpha, beta, seed=0)
    assert equal(weights(model), [w * (1 - alpha) for w in before])


# ---- the loss ----------------------------------------------------------------------------------------------------


def divergence_by_hand(student: AnswerModel, teacher: AnswerModel, one: dict[str, Tensor]) -> Tensor:
    total = torch.tensor(0.0, dtype=torch.float64)
    for ids, mask, labels in zip(one["input_ids"], one["attention_mask"], one["labels"], strict=True):
        n = int(mask.sum())
        where = [k - 1 for k in range(n) if labels[k] != -100]
        with torch.no_grad():
            p = teacher.hf(input_ids=ids[None, :n]).logits[0, where].exp()
        p = p / p.sum(1, keepdim=True)
        q = student.hf(input_ids=ids[None, :n]).logits[0, where].exp()
        q = q / q.sum(1, keepdim=True)
        total = total + (p * (p.log() - q.log())).sum() / len(where)
    return total / len(one["input_ids"])


@pytest.mark.parametrize("reference", ["cached", "second_model"])
def test_the_first_step_by_hand(reference: Any, tmp_path: Path) -> None:
    module = UNDO(alpha=0.4, beta=0.3, seed=5, retain_weight=2.0, reference=reference)
    ours = first_gradients(module, tmp_path)
    student, teacher = toy_model(), toy_model()
    shrink_and_perturb(student, 0.4, 0.3, seed=5)
    assert equal(weights(module.model), weights(student))  # the optimiser's step was 0
    loss = divergence_by_hand(student, teacher, first_batch()["retain"])
    assert abs(module.trainer.callback_metrics["train/retain_loss"] - loss) < 1e-6  # logged in float32
    assert loss > 1e-3
    expected = torch.autograd.grad(2.0 * loss, list(student.parameters()))
    assert distance(list(ours.values()), expected) < 1e-10
    assert "train/forget_loss" not in module.trainer.callback_metrics


def test_without_noise_there_is_nothing_to_learn(tmp_path: Path) -> None:
    module = UNDO(alpha=0.0)
    gradients = first_gradients(module, tmp_path)
    assert abs(module.trainer.callback_metrics["train/retain_loss"]) < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients.values())
    assert equal(weights(module.model), weights(toy_model()))


# ---- runs --------------------------------------------------------------------------------------------------------


def test_the_forget_set_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for first in (0, 50):
        module = UNDO(optimizer=adam)
        module.adopt(toy_model(), byte_tokenizer())
        data = Toy(Splits(examples(first, 5), examples(10, 7), examples(20, 3)))
        bare_trainer(3, default_root_dir=tmp_path).fit(module, data)
        ends.append(weights(module))
    assert equal(*ends)


def test_a_second_model_of_a_resumed_run_is_not_noised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UNDO, "build", lambda *_: toy_model())  # what a second model of a resumed run is loaded by
    whole = toy_run(UNDO(optimizer=adam, reference="second_model"), tmp_path / "a", steps=5)
    again = UNDO(optimizer=adam, reference="second_model")
    toy_run(again, tmp_path / "b", steps=5, resume=str(tmp_path / "a" / "step=2.ckpt"))
    assert equal(weights(whole), weights(again))


class Start(Regularizer):
    """Keeps the weights that it is shown before the first step."""

    def prepare(self, module: Any) -> None:
        self.seen = weights(module.model)

    def collect(self, model: nn.Module, answers: Any, part: Any) -> None: ...

    def apply(self, model: nn.Module) -> dict[str, float]:
        return {}


def test_a_regulariser_starts_from_the_noised_model(tmp_path: Path) -> None:
    regularizer, noised = Start(), toy_model()
    shrink_and_perturb(noised, 0.6, 0.1, seed=0)
    toy_run(UNDO(optimizer=lambda p: Recorder(p, lr=0.0), regularizer=regularizer), tmp_path)
    assert equal(regularizer.seen, weights(noised))


class Before(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen = weights(pl_module.model)


def test_callbacks_measure_the_model_before_the_noise(tmp_path: Path) -> None:
    before, module = Before(), UNDO(optimizer=adam)
    module.adopt(toy_model(), byte_tokenizer())
    bare_trainer(1, default_root_dir=tmp_path, callbacks=[before]).fit(module, Toy())
    assert equal(before.seen, weights(toy_model()))
