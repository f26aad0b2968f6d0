"""LAT: forget where an adversary has moved the hidden states to bring the answers back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.models.architectures import transformer_blocks
from lightning_ssiuu.objectives.backbone import check_reads_part_alone
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.gradient_difference import gradient_difference_like
from lightning_ssiuu.objectives.losses import answer_nll
from lightning_ssiuu.training.perturbation import shortened, unit
from lightning_ssiuu.training.shards import wide
from lightning_ssiuu.utils.errors import UserError, check_at_least, check_number


class LAT(UnlearningModule):
    """The backbone's forget loss at hidden states ``h + δ``, δ the adversary's, beside its retain loss at h.

    Targeted latent adversarial training (Sheshadri et al., arXiv 2407.15549): on each forget batch δ is added to the
    output of some blocks at every token and descends the answers' negative log-likelihood, so that the weights have to
    forget also what a nudge inside the network would still bring out. ``steps`` times
    ``δ ← Π(δ − step_size · ε‖h‖ · g/‖g‖)``, token by token, where Π cuts δ to the length ``ε‖h‖``; the backbone's
    gradient is then taken with δ fixed.

    Deviations: ε is relative to the length of the token's own hidden state, so that it carries over between models; the
    adversary takes normalised gradient steps instead of AdamW's; the default backbone is gradient difference. A step
    costs ``steps + 1`` forward and backward passes over the forget part, the adversary's without weight gradients.

    Args:
        backbone: An objective whose losses and weights are used, and whose forget loss is of the forget answers alone;
            None takes gradient difference.
        epsilon: ε ≥ 0, the largest length of δ in lengths of h; 0 is the backbone.
        steps: The adversary's steps, ≥ 0; 0 is the backbone.
        step_size: Their size in parts of the largest length, ≥ 0.
        layers: Blocks, from 0, after which δ is added; None takes those after a quarter, a half and three quarters.

    Raises:
        UserError: If activations are recomputed (``gradient_checkpointing``: without δ), or there is no such block.

    Example:
        >>> LAT(epsilon=0.05, retain_weight=5.0).steps
        4
    """

    can_be_backbone = False

    def __init__(
        self,
        backbone: UnlearningModule | None = None,
        epsilon: float = 0.02,
        steps: int = 4,
        step_size: float = 0.3,
        layers: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_number("epsilon", epsilon)
        check_at_least("steps", steps, 0)
        check_number("step_size", step_size)
        if layers is not None and (not layers or min(layers) < 0):
            raise UserError("layers", layers, "null, or at least one block from 0")
        if self.gradient_checkpointing:
            raise UserError("gradient_checkpointing", True, "false: layers are recomputed without the adversary")
        self.use_backbone(backbone or gradient_difference_like(self))
        check_reads_part_alone(self)
        self.epsilon, self.steps, self.step_size, self.layers = epsilon, steps, step_size, layers

    @property
    def second_gradient(self) -> str:
        return "LAT"

    @property
    def blocks(self) -> list[nn.Module]:
        """Those after which the adversary acts, once there is a model."""
        blocks = transformer_blocks(self.model.hf)
        n = len(blocks)
        chosen = sorted({n // 4, n // 2, 3 * n // 4} if self.layers is None else set(self.layers))
        if chosen[-1] >= n:
            raise UserError("layers", self.layers, f"blocks of this model: 0 to {n - 1}, or null")
        return [blocks[number] for number in chosen]

    def on_train_start(self) -> None:
        _ = self.blocks  # all are there
        super().on_train_start()

    def forget_loss(self, batch: Part) -> Tensor:
        """The backbone's value at the adversary's hidden states."""
        if self.epsilon == 0 or self.steps == 0:
            return super().forget_loss(batch)
        # A copy, as the step remembers passes by part: the regulariser is to see the ordinary one.
        with added(self.blocks, self._adversary(batch)):
            return super().forget_loss(dict(batch))

    def _adversary(self, batch: Part) -> list[Tensor]:
        with torch.no_grad(), seen(self.blocks) as outputs:
            self._pass(batch)
        lengths = [wide(h).norm(dim=-1, keepdim=True) * self.epsilon for h in outputs]
        deltas = [torch.zeros_like(wide(h)) for h in outputs]
        with torch.enable_grad():
            for _ in range(self.steps):
                moving = [delta.requires_grad_() for delta in deltas]
                with added(self.blocks, moving):
                    gradients = torch.autograd.grad(answer_nll(self._pass(batch)), moving)
                deltas = [
                    shortened(delta.detach() - self.step_size * length * unit(g), length)
                    for delta, length, g in zip(deltas, lengths, gradients, strict=True)
                ]
        return deltas

    def _pass(self, batch: Part) -> Any:
        model: AnswerModel = self.model
        return model(batch["input_ids"], batch["attention_mask"], batch["labels"])


@contextmanager
def seen(blocks: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside, the outputs of blocks in a pass are collected, in the order of the blocks."""
    outputs: list[Tensor] = []
    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(lambda *call: outputs.append(_hidden(call[-1]))))
        yield outputs


@contextmanager
def added(blocks: list[nn.Module], deltas: list[Tensor]) -> Iterator[None]:
    """Inside, ``deltas`` of the shape of the blocks' outputs are added to them; nothing of it stays."""

    def add(delta: Tensor, _module: nn.Module, _args: object, output: Any) -> Any:
        hidden = _hidden(output)
        moved = hidden + delta.to(hidden.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    with ExitStack() as hooks:
        for block, delta in zip(blocks, deltas, strict=True):
            hooks.enter_context(block.register_forward_hook(partial(add, delta)))
        yield


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
