"""The share of weights whose step a penalty turns round, against the optimiser's formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys.models import Recorder, answer_model, bare_trainer, batch, equal, loader, norm, weights
from toys.regularizers import LR, Split

from lightning_ssiuu.callbacks import UpdateSigns
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.regularizers import AttributionRegularizer
from lightning_ssiuu.utils.errors import UserError

CLIP, MOMENTUM, STEPS = 0.1, 0.9, 4


class Shares(UpdateSigns):
    """Keeps every figure."""

    def __init__(self, every_n_steps: int = 1) -> None:
        super().__init__(every_n_steps)
        self.found: list[float | None] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.share = None
        super().on_train_batch_end(*args)
        self.found.append(self.share)


def run(callbacks: list[Any], penalty: Any, **options: Any) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Gradients as the optimiser took them, and the weights."""
    log: list[list[Tensor]] = []
    module, model = GradientDifference(regularizer=penalty), answer_model()
    module.optimizer = lambda params: Recorder(params, lr=LR, log=log, momentum=MOMENTUM)
    model.train()
    module.adopt(model, None)
    trainer = bare_trainer(STEPS, callbacks=callbacks, gradient_clip_val=CLIP, **options)
    trainer.fit(module, loader([batch(n) for n in range(8)]))
    return log, weights(model)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_share_of_turned_steps(accumulate: int) -> None:
    make = lambda: AttributionRegularizer(3.0, "relative")  # noqa: E731
    split, shares = Split(), Shares()
    taken, after = run([split, shares], make(), accumulate_grad_batches=accumulate)
    _, plain = run([], make(), accumulate_grad_batches=accumulate)
    assert equal(after, plain)
    found = [share for share in shares.found if share is not None]
    momentum, expected = [torch.zeros_like(w) for w in after], []
    for own, clipped in zip(split.seen, taken[1::2], strict=True):  # before each the copy has taken its own
        alone = [g * min(1.0, CLIP / (norm(own) + 1e-6)) for g in own]
        turned = [
            (MOMENTUM * m + a).sign() != (MOMENTUM * m + g).sign()
            for m, a, g in zip(momentum, alone, clipped, strict=True)
        ]
        expected.append(100 * sum(int(t.sum()) for t in turned) / sum(t.numel() for t in turned))
        momentum = [MOMENTUM * m + g for m, g in zip(momentum, clipped, strict=True)]
    assert found == pytest.approx(expected, abs=0.05)
    assert found[0] == 0
    assert max(found) > 0.5


def test_it_looks_every_so_many_steps_and_at_penalties_alone() -> None:
    shares = Shares(every_n_steps=3)
    run([shares], AttributionRegularizer(3.0, "relative"))
    assert [share is None for share in shares.found] == [False, True, True, False]
    shares = Shares()
    run([shares], None)
    assert shares.found == [None] * STEPS


def test_bad_option() -> None:
    with pytest.raises(UserError, match="every_n_steps"):
        UpdateSigns(every_n_steps=0)
