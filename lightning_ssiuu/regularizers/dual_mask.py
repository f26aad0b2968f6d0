"""FDCU's two masks on the update: spare what the retain set needs and what does not promote the forget answers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ssiuu.models.answers import Answers
from lightning_ssiuu.models.loading import evaluation_mode
from lightning_ssiuu.regularizers.base import Regularizer
from lightning_ssiuu.training.gradients import extra_gradient, sum_over_ranks
from lightning_ssiuu.training.shards import (
    chunks,
    local,
    local_state,
    over_shards,
    shard_device,
    shard_like,
    snapshot,
    trained_parameters,
    wide,
)
from lightning_ssiuu.utils.errors import UserError, check_at_least, check_choice, check_number

Normalise = Literal["max", "mean", "none"]


class DualMask(Regularizer):
    """Multiplies the update by ``M₁ ⊙ M₂``, ``M₁ = 1/(1 + αf)`` and ``M₂ = 1/(1 + βh)`` (arXiv 2609.39279, Eq. 9).

    f is the diagonal empirical Fisher information of the retain set before training, the mean over examples of
    ``(∂log p(y|x)/∂θ)²`` (Eq. 2, one backward pass per example, without dropout). h is 1 for every weight whose
    attribution ``θ · Σ_b ∂log p(y_b|x_b)/∂θ`` to this step's forget answers is ≤ 0 (Eq. 3), else 0.

    Differences from the paper: it masks the gradient before the optimiser; AdamW divides a gradient by its own running
    size and so undoes a mask that stays the same, as M₁ does. Here the step itself is masked,
    ``θ ← θ_old + M ⊙ (θ_new − θ_old)``, weight decay and the retain loss's share included; with plain SGD both are the
    same. It calls f normalised without saying how, hence ``normalise``. It masks chosen layers; here all that train.

    Holds f (float32) and, during the step, a gradient and a copy of the trained weights. On fresh LoRA adapters, half
    of which are zero and so have attribution 0, M₂ is 1/(1 + β) for these at first.

    Args:
        alpha: α ≥ 0; 0 needs no Fisher information, and no retain set. The paper's is 50.
        beta: β ≥ 0; 0 needs no attribution. The paper's is 20. With both 0, training is the backbone's, bit for bit.
        n_examples: How many of the retain set's examples f is taken over, ≥ 1; None for all.
        normalise: ``"max"`` divides f by its largest element in each weight tensor, so that M₁ is in [1/(1+α), 1];
            ``"mean"`` by its mean there; ``"none"`` takes it as it is.

    Example:
        >>> DualMask(alpha=10.0, n_examples=100).beta
        20.0
    """

    state_attributes = ("_fisher",)  # of a resumed run the weights are no longer the original ones

    def __init__(
        self, alpha: float = 50.0, beta: float = 20.0, n_examples: int | None = None, normalise: Normalise = "max"
    ) -> None:
        check_number("regularizer.alpha", alpha)
        check_number("regularizer.beta", beta)
        if n_examples is not None:
            check_at_least("regularizer.n_examples", n_examples, 1)
        check_choice("regularizer.normalise", normalise, Normalise)
        self.alpha, self.beta, self.n_examples, self.normalise = alpha, beta, n_examples, normalise
        self._fisher: dict[str, Tensor] | None = None  # normalised, by parameter, a shard where that is one
        self._gradients: list[Tensor] | None = None  # of the forget answers' log-probability
        self._before: list[Tensor] | None = None

    def prepare(self, module: Any) -> None:
        if self.alpha == 0:
            return
        model = module.model  # each rank goes through all examples: f is the same on any number of them
        fisher: list[Tensor] = []
        n_seen = 0
        # ranks whose shares differed would mix their gradients under FSDP2, where a square cannot be taken any more
        with evaluation_mode(model), torch.enable_grad(), module.trainer.precision_plugin.forward_context():
            for part in islice(module.training_parts("retain", 1), self.n_examples):
                total = module(part).logps.sum()
                parameters = list(trained_parameters(model).values())
                gradients = [wide(g) for g in extra_gradient(total, parameters, model, keep_graph=False)]
                fisher = fisher or [torch.zeros_like(g) for g in gradients]
                torch._foreach_addcmul_(fisher, gradients, gradients)
                n_seen += 1
        if not n_seen:
            raise UserError("regularizer.alpha", self.alpha, "0 without retain examples to take Fisher information of")
        torch._foreach_div_(fisher, n_seen)
        named = trained_parameters(model)
        self._normalised(fisher, list(named.values()))
        self._fisher = {name: shard_like(f, p) for (name, p), f in zip(named.items(), fisher, strict=True)}

    def collect(self, model: nn.Module, answers: Answers, part: Mapping[str, Tensor]) -> None:
        if self.beta == 0:
            return
        parameters = list(trained_parameters(model).values())
        fresh = [wide(g) for g in extra_gradient(answers.logps.sum(), parameters, model)]
        if self._gradients is None:
            self._gradients = fresh
        else:
            torch._foreach_add_(self._gradients, fresh)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> dict[str, float]:
        """Remember the weights; with β > 0 returns ``not_excitatory_share``, the percentage of weights with h = 1."""
        if self.alpha == 0 and self.beta == 0:
            return {}
        parameters = list(trained_parameters(model).values())
        self._before = snapshot(parameters)
        if self._gradients is None:
            return {}
        sum_over_ranks(parameters, self._gradients)
        count = total = 0
        for gradient, parameter in zip(self._gradients, parameters, strict=True):
            gradient.mul_(wide(local(parameter))).le_(0)  # h
            count += int(gradient.sum(dtype=torch.float64))
            total += gradient.numel()
        shards = shard_device(parameters)
        return {"not_excitatory_share": 100 * over_shards(count, shards) / max(over_shards(total, shards), 1)}

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        if self._before is None:
            return
        before, h = self._before, self._gradients
        self._before = self._gradients = None
        named = trained_parameters(model)
        now = [local(p) for p in named.values()]
        factors = [] if h is None else [(self.beta, h)]
        if self.alpha > 0:
            if self._fisher is None or self._fisher.keys() != named.keys():
                raise UserError("regularizer.alpha", self.alpha, "0, or the Fisher information of the weights trained")
            self._fisher, fisher = local_state(self._fisher, named)
            factors.insert(0, (self.alpha, fisher))
        for c in chunks(before):
            mask = [torch.ones_like(wide(w)) for w in now[c]]
            for strength, values in factors:
                torch._foreach_div_(mask, [1 + strength * value for value in values[c]])
            # exactly the new weight where the mask is 1
            masked = torch._foreach_lerp([wide(w) for w in before[c]], [wide(w) for w in now[c]], mask)
            torch._foreach_copy_(now[c], masked)

    def _normalised(self, fisher: list[Tensor], parameters: list[nn.Parameter]) -> None:  # in place, over all shards
        if self.normalise == "none":
            return
        largest = self.normalise == "max"
        by = torch.stack([f.max() if largest and f.numel() else f.sum() for f in fisher])
        if shard_device(parameters) is not None:
            dist.all_reduce(by, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        if not largest:
            by = by / torch.tensor([p.numel() for p in parameters], device=by.device)
        for values, divisor in zip(fisher, by, strict=True):
            if divisor > 0:
                values.div_(divisor)
