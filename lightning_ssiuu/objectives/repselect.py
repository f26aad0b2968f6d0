"""RepSelect: one forget gradient for the whole run, taken beside adversaries, without its main directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.cir import linear_layers
from lightning_ssiuu.objectives.displaced import DisplacedObjective
from lightning_ssiuu.objectives.losses import answer_nll
from lightning_ssiuu.training.perturbation import (
    answered_rows,
    displaced,
    gradient_at,
    place,
    rows_of,
    share_of_mean,
)
from lightning_ssiuu.training.shards import (
    cut_like,
    local,
    local_state,
    norm_over_shards,
    shard_like,
    snapshot,
    train_only,
    trained_parameters,
    wide,
)
from lightning_ssiuu.utils.distributed import world_size
from lightning_ssiuu.utils.errors import UserError, check_at_least, check_choice, check_number

Directions = Literal["forget", "retain"]


class RepSelect(DisplacedObjective):
    """Representation-selective unlearning (arXiv 2606.17168): W ← W − η · G̃, with one G̃ for the whole run.

    Before the first step: (1) low-rank adversaries ``W + B A`` on the feed-forward projections relearn the forget set
    by SGD; (2) with them in place the forget loss's gradient G is taken over the whole forget set; (3) they are
    removed; (4) of each matrix's ``G = U S Vᵀ`` the leading components are collapsed to the size of the smallest of
    them, on the input and on the output side (:func:`soft_collapse`): what forget examples share in a gradient is what
    relearning some of them restores for all. Then every step moves the weights along ``G̃/‖G̃‖``; with SGD,
    ``lr · forget_weight`` is the length of a step. Only these projections train.

    Deviations: the paper has no retain loss (``retain_weight: 0``; a weight above adds the backbone's, at θ), ends when
    a divergence on other text is used up, here at the forget threshold, and leaves G̃ at its length. An optimiser that
    scales weights one by one, as Adam does, undoes the collapse. At most a quarter of a matrix's smaller side is
    collapsed: 512 components are more than a small model has. Memory: one more copy of the feed-forward weights, and
    three while they are looked at; of weights that are cut over ranks (FSDP2) one whole matrix at a time.

    Args:
        backbone: Any objective whose losses and weights are used; None takes gradient difference.
        components: How many leading components of a matrix are collapsed, ≥ 0; 0 leaves G as it is.
        adversary_lr: Learning rate of the adversaries, ≥ 0; 0 takes G at θ.
        adversary_rank: Rows of A, ≥ 1.
        adversary_epochs: Passes over the forget set in which they learn, ≥ 1.
        adversary_batch_size: Sequences of one of their steps, ≥ 1.
        directions: Whose components are collapsed: ``"forget"``, of G itself, or ``"retain"``, of the retain set's
            gradient of the negative log-likelihood.
        seed: Of A.

    Raises:
        UserError: If weights are frozen (``lora``).

    Example:
        >>> RepSelect(retain_weight=0.0).components
        512
    """

    state_attributes = ("_direction",)

    def __init__(
        self,
        backbone: UnlearningModule | None = None,
        components: int = 512,
        adversary_lr: float = 0.01,
        adversary_rank: int = 8,
        adversary_epochs: int = 1,
        adversary_batch_size: int = 16,
        directions: Directions = "forget",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        check_at_least("components", components, 0)
        check_number("adversary_lr", adversary_lr)
        check_at_least("adversary_rank", adversary_rank, 1)
        check_at_least("adversary_epochs", adversary_epochs, 1)
        check_at_least("adversary_batch_size", adversary_batch_size, 1)
        check_choice("directions", directions, Directions)
        if self.lora is not None:
            raise UserError("lora", "adapters", "null: G̃ is collapsed by a weight's own singular vectors")
        self.components, self.adversary_lr, self.adversary_rank = components, adversary_lr, adversary_rank
        self.adversary_epochs, self.adversary_batch_size = adversary_epochs, adversary_batch_size
        self.directions, self.seed = directions, seed
        self._direction: dict[str, Tensor] = {}  # by parameter name, of length 1 in all

    def adopt(self, model: AnswerModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().adopt(model, tokenizer)
        train_only(model.hf, {f"{name}.weight" for name in linear_layers(model.hf)})

    def prepare(self) -> None:
        with untouched(self.model), self.trainer.precision_plugin.forward_context():
            others: list[Tensor] | None = None
            with displaced(self.model) as parameters:
                if self.directions == "retain" and self.components > 0:
                    others = self._gradient("retain", parameters)
                if self.adversary_lr > 0:
                    self._elicit(parameters)
                gradients = self._gradient("forget", parameters)
        found = []
        for number, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
            whole = _whole(gradient, parameter)
            other = whole if others is None else _whole(others[number], parameter)
            found.append(cut_like(soft_collapse(whole, other, self.components), parameter))
        if (norm := norm_over_shards(found, parameters)) > 0:
            torch._foreach_div_(found, norm)
        named = trained_parameters(self.model)
        self._direction = {name: shard_like(part, p) for part, (name, p) in zip(found, named.items(), strict=True)}

    def displaced_gradient(self, batch: Part) -> tuple[list[Tensor], Tensor]:
        rows, weight = share_of_mean(answered_rows(batch))
        with torch.no_grad():
            loss = weight * self.forget_loss(rows_of(batch, rows))
        self._direction, directions = local_state(self._direction, trained_parameters(self.model))
        return [direction.clone() for direction in directions], loss

    def _gradient(self, name: str, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        # Every rank looks at all examples: the sum over ranks has each once per rank.
        sums = [torch.zeros_like(wide(local(parameter))) for parameter in parameters]
        for part in self.training_parts(name, self.adversary_batch_size):
            loss = self.forget_loss(part) if name == "forget" else answer_nll(self.answers(part))
            share = len(part["labels"]) / world_size()
            torch._foreach_add_(sums, gradient_at(loss * share, parameters, self.model))
        return sums

    def _elicit(self, parameters: Sequence[nn.Parameter]) -> None:
        """Move the weights to where the low-rank adversaries end."""
        generator, start = torch.Generator().manual_seed(self.seed), snapshot(parameters)
        layers = [self.model.get_submodule(name.rpartition(".")[0]) for name in trained_parameters(self.model)]
        pairs = []
        for parameter, layer in zip(parameters, layers, strict=True):
            n_out, n_in = _as_linear(parameter, layer).shape
            a = (2 * torch.rand(self.adversary_rank, n_in, generator=generator) - 1) / math.sqrt(n_in)
            a = a.to(wide(local(parameter)))
            pairs.append((a, a.new_zeros(n_out, self.adversary_rank)))
        for _ in range(self.adversary_epochs):
            for part in self.training_parts("forget", self.adversary_batch_size):
                nll = answer_nll(self.answers(part)) / world_size()
                gradients = gradient_at(nll, parameters, self.model)
                for (a, b), gradient, parameter, layer in zip(pairs, gradients, parameters, layers, strict=True):
                    g = _as_linear(_whole(gradient, parameter), layer)
                    of_a, of_b = b.T @ g, g @ a.T
                    a.sub_(of_a, alpha=self.adversary_lr)
                    b.sub_(of_b, alpha=self.adversary_lr)
                added = [_as_linear(b @ a, layer) for (a, b), layer in zip(pairs, layers, strict=True)]
                cut = [cut_like(whole, parameter) for whole, parameter in zip(added, parameters, strict=True)]
                place(parameters, [(w + part).to(w.dtype) for w, part in zip(start, cut, strict=True)])


def _whole(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """A matrix of which this rank may have a part; each rank must call it."""
    tensor: Any = shard_like(part, parameter)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _as_linear(matrix: Tensor, layer: nn.Module) -> Tensor:
    """``[out, in]`` of a layer's weight, or back: GPT-2's are the other way round."""
    return matrix.T if isinstance(layer, Conv1D) else matrix


@torch.no_grad()
def soft_collapse(gradient: Tensor, reference: Tensor, components: int) -> Tensor:
    """``(I − U(I − D)Uᵀ) G (I − V(I − D)Vᵀ)``, D the diagonal of ``s_q/s_k``, of the q leading ``u_k, s_k, v_k`` of R.

    What G ``[r, c]`` has along the directions that lead in R of the same shape shrinks to the weight of the last of
    them; R is G itself in the paper (arXiv 2606.17168), so that component k of G comes out as ``s_q²/s_k``. At most a
    quarter of the smaller side is collapsed, and nothing that is zero up to rounding.

    Example:
        >>> soft_collapse(torch.diag(torch.tensor([8.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])), torch.eye(8), 1)[1, 1]
        tensor(4.)
        >>> wide = torch.diag(torch.tensor([8.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
        >>> soft_collapse(wide, wide, 2).diag()[:3]
        tensor([2., 4., 1.])
    """
    u, s, vh = torch.linalg.svd(reference, full_matrices=False)
    counted = int((s > _RANK_TOLERANCE * s[0]).sum())
    q = min(components, min(reference.shape) // 4, counted)
    if q == 0:
        return gradient.clone()
    u, v, removed = u[:, :q], vh[:q].T, 1 - s[q - 1] / s[:q]
    narrowed = gradient - (gradient @ v * removed) @ v.T
    return narrowed - u @ (removed.unsqueeze(1) * (u.T @ narrowed))


#: Singular values below this share of the largest are noise of the arithmetic.
_RANK_TOLERANCE = 1e-5
