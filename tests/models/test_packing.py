"""One row without padding gives what padded batches give, to rounding in float64, for every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys.models import TOYS, UNRECORDED, part, random_model

from lightning_ssiuu.models.answers import AnswerModel, Answers
from lightning_ssiuu.models.packing import NAME, Packing, apart, padded

#: Toys whose attention is none of transformers' functions, or refuses SDPA: their batches stay padded.
PADDED = {"falcon", "falcon_mq", "falcon_rw", "gpt_neo", "gemma2"}
FORGET, RETAIN = [(3, 2), (1, 4), (5, 1)], [(2, 6), (4, 1)]


def loss_and_gradients(model: AnswerModel, answers: tuple[Answers, ...]) -> tuple[Tensor, list[Tensor]]:
    weights = [torch.linspace(0.5, 2, a.n_sequences, dtype=torch.float64) for a in answers]
    loss = sum((w * a.mean_logps).sum() * (-1) ** n for n, (w, a) in enumerate(zip(weights, answers, strict=True)))
    assert isinstance(loss, Tensor)
    return loss, list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("name", [*TOYS])
def test_packed_is_padded(name: str) -> None:
    model = AnswerModel(random_model(name)).train()
    assert model.packs == (name not in PADDED)
    forget, retain = part(FORGET), part(RETAIN)
    del forget["example_id"], retain["example_id"]
    with padded(model):
        expected = loss_and_gradients(model, (model(**forget), model(**retain)))
        assert model.packing is None
    joint = loss_and_gradients(model, model(*forget.values(), retain))
    assert (model.packing is not None) == model.packs
    alone = loss_and_gradients(model, (model(**forget), model(**retain)))
    for loss, gradients in (joint, alone):
        torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
        for gradient, own in zip(gradients, expected[1], strict=True):
            torch.testing.assert_close(gradient, own, rtol=1e-9, atol=1e-12)
