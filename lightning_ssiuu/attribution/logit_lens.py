"""Logit lens: at which layer a model prefers the true answer to a wrong one.

The residual stream after every block goes through the final norm and the unembedding, as if the later blocks were not
there (nostalgebraist 2020; used on unlearned models in arXiv 2509.22263, Sec. 5). An answer that is hidden in the last
layers is still preferred in the middle ones; an over-unlearned one falls *below* chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from lightning_ssiuu.evaluation.metrics.answers import multiple_choice_accuracy
from lightning_ssiuu.models.answers import AnswerModel, Answers, own_logits
from lightning_ssiuu.models.architectures import final_norm
from lightning_ssiuu.models.loading import evaluation_mode
from lightning_ssiuu.utils.errors import UserError


def layer_logps(model: AnswerModel, part: Mapping[str, Tensor]) -> Tensor:
    """``[layers, B]`` mean log-probability per answer token, read off after every block, in nats; one forward pass.

    The last row is the model's own.
    """
    labels = part["labels"]
    labelled = labels[:, 1:] != -100
    rows, positions = labelled.nonzero(as_tuple=True)
    norm = final_norm(model.hf)
    head = model.hf.get_output_embeddings() if model.plain_head else partial(own_logits, model.hf)
    with torch.inference_mode(), evaluation_mode(model):
        states = model.hf.base_model(
            input_ids=part["input_ids"],
            attention_mask=part["attention_mask"],
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states[1:]
        logps = []
        for layer, state in enumerate(states):
            hidden = state[rows, positions]
            if layer < len(states) - 1:  # transformers has normed the last one
                hidden = norm(hidden)
            logps.append(Answers(head(hidden), labels[:, 1:][labelled], rows, len(labels)).mean_logps)
    return torch.stack(logps)


def prefers_answer(logps: Tensor, option_of: Tensor) -> Tensor:
    """Whether the true answer beats the first distractor at every layer, ``[layers, rows]`` bool; a tie is wrong.

    From ``[layers, options]`` and the row of each option, ascending: the true answer first, a distractor second.
    Further ones are left out: chance is one in two.
    """
    _, counts = option_of.unique_consecutive(return_counts=True)
    if counts.min() < 2:
        raise UserError("options", "an example with one option", "a true answer and a distractor for every example")
    first = counts.cumsum(0) - counts
    pairs = torch.stack([first, first + 1], 1).flatten()
    rows = torch.arange(len(counts), device=option_of.device).repeat_interleave(2)
    return torch.stack([multiple_choice_accuracy(layer[pairs], rows) for layer in logps])
