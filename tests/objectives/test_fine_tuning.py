"""An attack's fine-tuning runs what sequences begin with alike once, and its gradient is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from toys.data import byte_tokenizer
from toys.models import random_model

from lightning_ssiuu import FineTuning
from lightning_ssiuu.datamodules.pairs import batch_of
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


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_and_where_a_function_drops_not_a_layer(dropout: float) -> None:
    sizes = {"hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16, "num_hidden_layers": 1}
    config = transformers.OPTConfig(vocab_size=31, num_attention_heads=4, dropout=dropout, **sizes)
    module = FineTuning()
    module.shares = True
    module.adopt(AnswerModel(transformers.AutoModelForCausalLM.from_config(config)).train(), byte_tokenizer())
    module.retain_loss(PART)
    assert module.model.packing is not None
    assert len(module.model.packing.flat) == (APART if dropout else SHARED)
