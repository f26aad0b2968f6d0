"""An attack's fine-tuning runs what sequences begin with alike once, and its gradient is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys.data import byte_tokenizer
from toys.models import random_model

from lightning_ssiuu import FineTuning
from lightning_ssiuu.datamodules.encoding import batch_of
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.models.packing import padded

PART = batch_of([([4, 4, 5, 6], [7, 8]), ([4, 4, 5, 9], [3]), ([4, 4, 2], [1, 6, 2])], 0)
#: Tokens that predict an answer; of the second sequence three stand in the first, of the third two.
SHARED, APART = 5 + 1 + 3, 5 + 4 + 5


def trained(lora: LoRA | None = None, shares: bool = True, **options: Any) -> tuple[FineTuning, list[Tensor]]:
    """One pass in training mode, and its gradients."""
    torch.manual_seed(0)
    hf = random_model(**options)
    module = FineTuning()
    module.shares = shares
    module.adopt(AnswerModel(hf if lora is None else lora.attach(hf)).train(), byte_tokenizer())
    parameters = [p for p in module.model.parameters() if p.requires_grad]
    return module, list(torch.autograd.grad(module.retain_loss(PART), parameters))


def test_what_sequences_begin_with_is_run_once() -> None:
    module, gradients = trained()
    assert module.model.packing is not None
    assert len(module.model.packing.flat) == SHARED
    with padded(module.model):
        loss = module.retain_loss(PART)
    for ours, theirs in zip(gradients, torch.autograd.grad(loss, list(module.model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"shares": False}, {"attention_dropout": 0.1}, {"lora": LoRA(r=2, dropout=0.1)}],
    ids=["nobody asking", "dropout", "dropout of adapters"],
)
def test_each_sequence_is_run_by_itself_with(options: dict[str, Any]) -> None:
    module, _ = trained(**options)
    assert module.model.packing is not None
    assert len(module.model.packing.flat) == APART
