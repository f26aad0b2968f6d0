"""The logit lens: by hand on a stack of two blocks, against transformers' own output, on every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys.models import RECORDED, random_model

from lightning_ssiuu.attribution.logit_lens import layer_logps, prefers_answer
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import final_norm
from lightning_ssiuu.utils.errors import UserError

IDS = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
PART = {
    "input_ids": IDS,
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    "labels": torch.tensor([[-100, -100, 7, 8], [-100, -100, 9, -100]]),
}


@torch.inference_mode()
@pytest.mark.parametrize("architecture", RECORDED)
def test_last_layer_is_the_model_and_others_are_blocks_through_norm_and_head(architecture: str) -> None:
    model = AnswerModel(random_model(architecture, torch.float64))
    seen: list[torch.Tensor] = []
    blocks = next(m for m in model.hf.modules() if isinstance(m, nn.ModuleList))

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks[0].register_forward_hook(keep)
    logps = layer_logps(model, PART)
    handle.remove()
    assert logps.shape == (len(blocks), 2)
    torch.testing.assert_close(logps[-1], model(**PART).mean_logps)
    # By hand: the first block's output, then norm and unembedding, at the positions before the answers.
    logits = model.hf.get_output_embeddings()(final_norm(model.hf)(seen[0]))
    if architecture == "gemma2":
        logits = 3.0 * (logits / 3.0).tanh()
    logits = logits.log_softmax(-1)
    first = (logits[0, 1, 7] + logits[0, 2, 8]) / 2
    torch.testing.assert_close(logps[0], torch.stack([first, logits[1, 1, 9]]))
    assert not torch.allclose(logps[0], logps[-1])


def test_one_distractor_counts_and_a_tie_is_wrong() -> None:
    # Rows of three, two and two options; the third option of the first would win and is left out.
    option_of = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    logps = torch.tensor([[-2.0, -3.0, -1.0, -2.0, -1.0, -1.0, -1.0], [-4.0, -3.0, -1.0, -1.0, -2.0, -1.0, -1.1]])
    assert prefers_answer(logps, option_of).tolist() == [[True, False, False], [False, True, True]]
    with pytest.raises(UserError, match="distractor"):
        prefers_answer(logps, torch.tensor([0, 0, 0, 1, 1, 1, 2]))


def test_unknown_architecture() -> None:
    model = AnswerModel(random_model("llama", torch.float32))
    model.hf.config.model_type = "unheard_of"
    with pytest.raises(UserError, match="final norm"):
        final_norm(model.hf)
