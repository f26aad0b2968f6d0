"""MCU: turn what feed-forward networks say on the forget set away from the original, but for its main directions."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.models.answers import AnswerModel, Answers, Part, mean_over_answers
from lightning_ssiuu.models.architectures import feed_forward_sites, transformer_blocks
from lightning_ssiuu.models.packing import at
from lightning_ssiuu.objectives.cir import CollapsedObjective, common_directions, without
from lightning_ssiuu.training.reference import Observation
from lightning_ssiuu.utils.errors import UserError, check_at_least, check_number

#: The paper's for models of 32 blocks, the last one exclusive.
_PAPERS_LAYERS = (6, 12)


class MCU(CollapsedObjective):
    """Minor-component unlearning (arXiv 2605.11685) of feed-forward outputs, by :class:`~lightning_ssiuu.CIR`'s steps.

    In each of some blocks ``max(floor, ⟨ô, ô₀⟩/c²)`` is descended: o is the feed-forward network's output at the
    positions that predict answer tokens, o₀ the original model's, the hat what is left without mean and
    ``output_components`` leading principal components of o₀ over the forget set, and c the mean length of ô₀ there.
    What examples have in common is what relearning some of them restores for the others; so it is left alone, and what
    is each example's own is broken. With ``output_components`` 0 it is the loss of CIR's paper. The weight gradients
    are collapsed as CIR's are; only feed-forward projections up to the last of the blocks train.

    Deviations: the retain loss is the usual one (``retain``) instead of a distance of hidden states; c is the whole
    forget set's, not the batch's; prompt tokens do not count; steps and stopping as for CIR.

    Args:
        output_components: Principal components of the outputs that are left alone, ≥ 0; 0 leaves out the mean, too. At
            most a quarter of the width.
        input_components: As for CIR.
        gradient_components: As for CIR.
        floor: Smallest value of a position's loss: 0 stops where ô is orthogonal to ô₀.
        layers: Blocks from 0; None takes 6 to 11 as in the paper, or the middle half of a model with fewer than 13.
        every_n_epochs: How often the directions of inputs and gradients are taken again, ≥ 1.

    Raises:
        UserError: As CIR; or if there is no such block.

    Example:
        >>> MCU(output_components=4).input_components
        24
    """

    state_attributes = (*CollapsedObjective.state_attributes, "output_bases", "lengths")

    def __init__(
        self,
        output_components: int = 8,
        input_components: int = 24,
        gradient_components: int = 36,
        floor: float = 0.0,
        layers: list[int] | None = None,
        every_n_epochs: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_components, gradient_components, False, every_n_epochs, **kwargs)
        check_at_least("output_components", output_components, 0)
        check_number("floor", floor)
        if layers is not None and (not layers or min(layers) < 0):
            raise UserError("layers", layers, "null, or at least one block from 0")
        self.output_components, self.floor, self.layers = output_components, floor, layers
        self.output_bases: dict[str, Tensor] = {}  # by module, orthonormal [K, H]
        self.lengths: dict[str, float] = {}

    def adopt(self, model: AnswerModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().adopt(model, tokenizer)
        last = self.blocks[-1]
        for number, block in enumerate(transformer_blocks(model.hf)):
            if number > last:  # DDP counts a trained weight without a gradient as an error
                block.requires_grad_(False)

    @property
    def blocks(self) -> list[int]:
        """Those whose outputs count, once there is a model."""
        n = len(transformer_blocks(self.model.hf))
        if self.layers is None:
            return list(range(*_PAPERS_LAYERS)) if n > _PAPERS_LAYERS[1] else list(range(n // 4, max(1, 3 * n // 4)))
        if max(self.layers) >= n:
            raise UserError("layers", self.layers, f"blocks of this model: 0 to {n - 1}, or null")
        return sorted(set(self.layers))

    @property
    def output_modules(self) -> list[str]:
        """The last projections of the blocks' feed-forward networks, by name."""
        by_layer = {site.layer: site.module_name for site in feed_forward_sites(self.model.hf)}  # the last kind is down
        return [by_layer[number] for number in self.blocks]

    def references(self) -> dict[str, Observation]:
        return super().references() | {self._reference_name: self._observed}

    def prepare(self) -> None:
        with untouched(self.model):
            seen = [self.original(self._reference_name, part) for part in self.training_parts("forget")]
        for number, name in enumerate(self.output_modules):
            rows = torch.cat([one[:, number] for one in seen]).double()
            self.output_bases[name] = common_directions(rows, self.output_components)
            self.lengths[name] = float(without(rows, self.output_bases[name]).norm(dim=-1).mean())

    def loss_to_collapse(self, batch: Part) -> Tensor:
        outputs, answers = feed_forward_outputs(self.model, batch, self.output_modules)
        originals = self.original(self._reference_name, batch)
        total = torch.zeros((), dtype=torch.promote_types(outputs.dtype, torch.float32), device=outputs.device)
        for number, (name, basis) in enumerate(self.output_bases.items()):
            now, then = (
                without(some[:, number].to(total.dtype), basis.to(total.device)) for some in (outputs, originals)
            )
            products = (now * then).sum(-1) / max(self.lengths[name], 1e-30) ** 2
            total = total + mean_over_answers(products.clamp(min=self.floor), answers)
        return total / len(self.output_bases)

    @property
    def _reference_name(self) -> str:
        return "forget/feed_forward" + "_".join(map(str, self.blocks))  # stored values are found by name

    def _observed(self, model: AnswerModel, part: Part) -> tuple[Tensor, Tensor | None]:
        outputs, answers = feed_forward_outputs(model, part, self.output_modules)
        return outputs, answers.lengths


def feed_forward_outputs(model: AnswerModel, part: Part, names: list[str]) -> tuple[Tensor, Answers]:
    """What modules give at the positions that predict answer tokens, ``[N, len(names), H]``, and the answers."""
    outputs: list[Tensor] = []
    with ExitStack() as hooks:
        for name in names:
            module = model.hf.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(lambda *call: outputs.append(call[-1])))
        answers = model(part["input_ids"], part["attention_mask"], part["labels"])
    rows, positions = (part["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    return torch.stack([at(output, model.packing, rows, positions) for output in outputs], dim=1), answers
