"""The logit lens: by hand on a stack of two blocks, against transformers' own output, on every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys.models import TOYS, random_model

from lightning_ssiuu.attribution.logit_lens import layer_logps, logit_lens_accuracy, prefers_answer
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import ARCHITECTURES, final_norm
from lightning_ssiuu.utils.errors import UserError

IDS = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
PART = {
    "input_ids": IDS,
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    "labels": torch.tensor([[-100, -100, 7, 8], [-100, -100, 9, -100]]),
}


@torch.inference_mode()
@pytest.mark.parametrize("architecture", [name for name in TOYS if name in ARCHITECTURES])
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
    logits = model.hf.get_output_embeddings()(final_norm(model.hf)(seen[0])).log_softmax(-1)
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


def test_accuracy_over_batches_is_that_of_all_examples() -> None:
    model = AnswerModel(random_model("llama", torch.float32))
    ids = torch.randint(2, 31, (10, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([torch.full((10, 4), -100), ids[:, 4:]], 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    whole = batch | {"option_of": torch.arange(5).repeat_interleave(2)}
    parts = [{name: value[rows] for name, value in whole.items()} for rows in (slice(0, 4), slice(4, 10))]
    accuracy = logit_lens_accuracy(model, parts)
    assert accuracy == pytest.approx(logit_lens_accuracy(model, [whole]))
    right = model(**batch).mean_logps.view(5, 2)
    assert accuracy[-1] == 100 * (right[:, 0] > right[:, 1]).double().mean().item()
    with pytest.raises(UserError, match="options"):
        logit_lens_accuracy(model, [])


def test_unknown_architecture() -> None:
    model = AnswerModel(random_model("llama", torch.float32))
    model.hf.config.model_type = "unheard_of"
    with pytest.raises(UserError, match="final norm"):
        final_norm(model.hf)
