"""RMU: steer a block's hidden states on the forget set to a random direction, hold them on the retain set."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.models.answers import AnswerModel, Answers, Part, mean_over_answers
from lightning_ssiuu.models.architectures import transformer_blocks
from lightning_ssiuu.models.hidden_states import HiddenAnswers, answers_with_hidden, block_number
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.training.reference import Observation
from lightning_ssiuu.utils.errors import UserError, check_number

_PAPERS_LAYER = 7


def hidden_mse(hidden: Tensor, target: Tensor, answers: Answers) -> Tensor:
    """RMU's squared distance of hidden states ``[N, H]`` to a target, ``[N, H]`` or one ``[H]``; see :class:`RMU`."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    squared = (hidden.to(wide) - target.to(device=hidden.device, dtype=wide)).square().mean(-1)
    return mean_over_answers(squared, answers)


def random_direction(width: int, seed: int) -> Tensor:
    """``u/‖u‖`` ``[H]``, ``u ~ U[0, 1)`` by an own generator, in float64: the same on every rank and in every run."""
    u = torch.rand(width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return u / u.norm()


class RMU(UnlearningModule):
    """Representation misdirection for unlearning (Li et al., arXiv 2403.03218, Sec. 4).

    ``‖h_l − c·u/‖u‖‖²`` on forget and ``retain_weight · ‖h_l − h_l^original‖²`` on retain, u ~ U[0, 1) drawn once.
    Squared distances are means over dimensions (as in the published code), then over an answer's tokens, then over
    sequences; open-unlearning's divide by all sequences' lengths at once, which mixes up sequences of unequal length.

    Deviations: only the positions that predict answer tokens count (the paper's texts have no prompt); of the chosen
    blocks all weights train, where the paper's code takes the feed-forward output projections alone; the paper scales
    c and the retain weight by model, the defaults are those of the SSIUU paper.

    Args:
        layer: l, a block from 0; None takes 7 as in the paper, or the middle of a model with fewer blocks.
        coefficient: c, the length of the target, > 0.
        layers_to_train: How many blocks train, ≥ 1, the last of them l; None trains all that the loss depends on. Later
            blocks have no gradient and are frozen in any case.
        seed: Of the random direction.
        retain_weight: α; compared in [20, 300] by the SSIUU paper.

    Raises:
        UserError: If ``retain`` is not ``"nll"`` (the retain loss is RMU's own), or there is no such block.

    Example:
        >>> module = RMU(layers_to_train=2)
        >>> module.configure_model()
        >>> sorted({n.split(".")[3] for n, p in module.model.named_parameters() if p.requires_grad})
        ['1', '2']
    """

    takes_token_means = False

    def __init__(
        self,
        layer: int | None = None,
        coefficient: float = 20.0,
        layers_to_train: int | None = 3,
        seed: int = 0,
        retain_weight: float = 100.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(retain_weight=retain_weight, **kwargs)
        check_number("coefficient", coefficient, positive=True)
        if layers_to_train is not None and layers_to_train < 1:
            raise UserError("layers_to_train", layers_to_train, "a number ≥ 1, or null for all")
        if self.retain != "nll":
            raise UserError("retain", self.retain, '"nll", the default: RMU has a retain loss of its own')
        self.layer, self.coefficient = layer, coefficient
        self.layers_to_train, self.seed = layers_to_train, seed

    def adopt(self, model: AnswerModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().adopt(model, tokenizer)
        blocks, end = transformer_blocks(model.hf), self.block + 1
        trained: list[nn.Module] = blocks[max(0, end - (self.layers_to_train or end)) : end]
        if self.layers_to_train is None:  # the base model's parts up to its blocks as well: the embeddings
            parts = model.hf.base_model.children()
            trained += takewhile(lambda part: not any(module is blocks[0] for module in part.modules()), parts)
        chosen = {id(p) for module in trained for p in module.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in chosen:  # DDP counts a trained weight without a gradient as an error
                parameter.requires_grad_(False)

    @property
    def block(self) -> int:
        """l, once there is a model."""
        return block_number(self.model, self.layer, _PAPERS_LAYER)

    def references(self) -> dict[str, Observation]:
        return {self._reference_name: reference_hidden(self.block)} if self.retain_weight > 0 else {}

    def forward(self, batch: Part) -> HiddenAnswers:
        return answers_with_hidden(self.model, batch, self.block)

    def forget_loss(self, batch: Part) -> Tensor:
        answers = self._answers(batch)
        target = self.coefficient * random_direction(answers.hidden.shape[-1], self.seed)
        return hidden_mse(answers.hidden, target, answers)

    def retain_loss(self, batch: Part) -> Tensor:
        answers = self._answers(batch)
        return hidden_mse(answers.hidden, self.original(self._reference_name, batch), answers)

    @property
    def _reference_name(self) -> str:
        return f"retain/hidden{self.block}"  # stored values are found by name: other layers are other values

    def _answers(self, batch: Part) -> HiddenAnswers:
        answers = self.answers(batch)
        # An objective that has this one for a backbone may have run the model before, for the logits alone.
        return answers if isinstance(answers, HiddenAnswers) else self(batch)


def reference_hidden(layer: int) -> Observation:
    """Observes a block's output at the labelled positions: ``[N, H]``."""

    def observe(model: AnswerModel, part: Part) -> tuple[Tensor, Tensor | None]:
        answers = answers_with_hidden(model, part, layer)
        return answers.hidden, answers.lengths

    return observe
