"""SSIUU's regulariser: penalise what makes negative attribution grow, on top of any objective.

Source: arXiv 2509.22263, Eqs. 12 to 14 and Algorithm 1, at parameter level and first order.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ssiuu.errors import UserError
from lightning_ssiuu.extra_gradient import extra_gradient, local, reshard, sum_over_ranks, wide
from lightning_ssiuu.functional.attribution import target_logps
from lightning_ssiuu.functional.losses import Answers
from lightning_ssiuu.ranks import world_size
from lightning_ssiuu.sites import neuron_sites, select_sites

# Elements handled together: large enough to launch few kernels, small enough that temporaries do not matter.
_CHUNK = 1 << 24


class Regularizer(ABC):
    """What an objective expects of its ``regularizer``: collect per micro-batch, act once per optimiser step.

    Example:
        >>> class Halve(Regularizer):
        ...     def collect(self, model, answers): ...
        ...     def apply(self, model):
        ...         for parameter in model.parameters():
        ...             parameter.grad.mul_(0.5)
        ...         return {}
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> layer(torch.ones(1, 1)).backward()
        >>> Halve().apply(layer), layer.weight.grad
        ({}, tensor([[0.5000]]))
    """

    @abstractmethod
    def collect(self, model: nn.Module, answers: Answers) -> None:
        """See a micro-batch's forget answers, graph attached, before the loss is differentiated."""

    @abstractmethod
    def apply(self, model: nn.Module) -> dict[str, float]:
        """Change the parameters' ``.grad`` before clipping and the optimiser step; returns figures to log."""

    def prepare(self, module: Any) -> None:  # noqa: B027 - optional
        """Look at the model before the first step of a new run (not of a resumed one).

        Args:
            module: The objective: ``module.model``, ``module.training_parts("retain")``.
        """

    def after_step(self, model: nn.Module) -> None:  # noqa: B027 - optional
        """See, or change, the weights right after an optimiser step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values and tensors.

        Under FSDP2 this runs on every rank; tensors that are shards (``DTensor``) have to stand in a dictionary under
        the name of the parameter they are cut like, as ``model.named_parameters()`` has it.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - optional, like state_dict
        """Take up the state of an interrupted run."""


class AttributionRegularizer(Regularizer):
    """Adds ``2λ (A_t − A_anchor) g`` to the gradient of every parameter whose attribution ``A_t = φ g`` is negative.

    ``g = Σ_b ∂P_b/∂φ`` over the forget sequences of an optimiser step, P_b the probability of answer b; both g and A
    are held constant (first order). The first step has no anchor and hence no penalty. g is taken by a backward pass
    of its own through the objective's forward pass, which is right under one process, DDP and FSDP2 alike; it is
    summed over micro-batches and ranks. All scales are kept as logarithms, so that a P of e^−200 is as good as any.

    Args:
        weight: λ ≥ 0. With 0 nothing is computed and training is the backbone's, bit for bit.
        weight_mode: ``"absolute"`` takes λ as the paper does. ``"relative"`` scales the penalty's gradient to
            ``weight`` times the norm of the objective's gradient: the literal λ depends on the model's size and on P
            and can be negligible.
        anchor: ``"previous"`` holds A to its value one optimiser step ago (Algorithm 1), ``"original"`` to its value at
            the first step, where the weights are still the original model's. Either is a value on that step's batch.
        target: ``"sequence"`` (P, the paper's) or ``"length_normalised"`` (P^{1/T}); see
            :func:`lightning_ssiuu.functional.attribution.target_logps`.
        modules: Restrict to the weights of these sites, e.g. ``["mlp_up", "layer3.attn_q"]``; None means every
            parameter, embeddings and norms included.

    Raises:
        UserError: If an argument is outside its range or names no module.

    Example:
        >>> AttributionRegularizer(weight=-1.0)
        Traceback (most recent call last):
        ...
        lightning_ssiuu.errors.UserError: regularizer.weight: got -1.0, allowed: a finite number ≥ 0
    """

    def __init__(
        self,
        weight: float = 1e-3,
        weight_mode: Literal["absolute", "relative"] = "absolute",
        anchor: Literal["previous", "original"] = "previous",
        target: Literal["sequence", "length_normalised"] = "sequence",
        modules: list[str] | None = None,
    ) -> None:
        if not (weight >= 0 and math.isfinite(weight)):
            raise UserError("regularizer.weight", weight, "a finite number ≥ 0")
        for name, value, allowed in (
            ("weight_mode", weight_mode, ("absolute", "relative")),
            ("anchor", anchor, ("previous", "original")),
            ("target", target, ("sequence", "length_normalised")),
        ):
            if value not in allowed:
                raise UserError(f"regularizer.{name}", value, f"one of {list(allowed)}")
        if modules is not None and not modules:
            raise UserError("regularizer.modules", modules, "null, or at least one module to restrict to")
        self.weight, self.weight_mode, self.anchor, self.target = weight, weight_mode, anchor, target
        self.modules = modules
        self._gradients: list[Tensor] | None = None  # g / e^scale, summed over the micro-batches of this step
        self._scale = -math.inf
        self._anchor: dict[str, Tensor] | None = None  # A / e^anchor_scale by parameter, a shard where that is one
        self._anchor_scale = -math.inf
        self._warned: set[str] = set()

    def collect(self, model: nn.Module, answers: Answers) -> None:
        """Add this micro-batch's ``Σ_b ∂P_b/∂φ``, leaving ``.grad`` and the graph as they were.

        Args:
            model: The model the answers came from (transformers model inside, or any module for ``modules=None``).
            answers: Forward pass on the forget part.
        """
        if self.weight == 0:
            return
        logps = target_logps(answers, self.target)
        self._warn(logps.detach())
        reshard(model)
        scale = max(self._scale, _reduced(logps.detach().max(), dist.ReduceOp.MAX if dist.is_available() else None))
        parameters = list(self._parameters(model).values())
        # ∂P = P ∂log P; the weights are constants, relative to e^scale, so the largest is 1.
        total = ((logps.detach() - scale).exp() * logps).sum()
        fresh = [wide(gradient) for gradient in extra_gradient(total, parameters, model)]
        if self._gradients is None:
            self._gradients = fresh
        else:
            torch._foreach_mul_(self._gradients, math.exp(self._scale - scale))
            torch._foreach_add_(self._gradients, fresh)
        self._scale = scale

    @torch.no_grad()
    def apply(self, model: nn.Module) -> dict[str, float]:
        """Add the penalty's gradient to ``.grad``, keep A_t as the next anchor, forget g.

        Returns:
            ``objective_gradient_norm``, ``penalty_gradient_norm`` (as added), ``negative_share`` (|I⁻| over all
            regularised parameters, percent), ``max_log_probability`` (nats). Empty when there was nothing to do.
        """
        if self._gradients is None:
            return {}
        named = self._parameters(model)
        parameters = list(named.values())
        gradients, scale, self._gradients, self._scale = self._gradients, self._scale, None, -math.inf
        sum_over_ranks(parameters, gradients)
        first = self._anchor is None
        top = max(scale, self._anchor_scale)
        anchor = gradients if self._anchor is None else self._local_anchor(named)
        now, negative, square = math.exp(scale - top), 0, 0.0
        then = 0.0 if first else math.exp(self._anchor_scale - top)
        kept: list[Tensor] = []
        for part in _chunks(gradients):
            g = gradients[part]
            attribution = torch._foreach_mul(g, [wide(local(p)) for p in parameters[part]])
            inside = [a < 0 for a in attribution]
            negative += sum(int(mask.sum()) for mask in inside)
            if not first:
                growth = torch._foreach_mul(attribution, now)
                torch._foreach_add_(growth, anchor[part], alpha=-then)
                torch._foreach_mul_(g, growth)
                torch._foreach_mul_(g, [mask.to(x.dtype) for mask, x in zip(inside, g, strict=True)])
                square += sum(float(n) ** 2 for n in torch._foreach_norm(g))
                if self.anchor == "previous":
                    torch._foreach_copy_(anchor[part], attribution)  # in place: no third copy as large as the weights
            else:
                kept += attribution
        if first:
            self._anchor = {name: _like(a, p) for (name, p), a in zip(named.items(), kept, strict=True)}
        if first or self.anchor == "previous":
            self._anchor_scale = scale
        shards = next((g.device for g, p in zip(gradients, parameters, strict=True) if hasattr(p, "to_local")), None)
        total = _over_shards(sum(g.numel() for g in gradients), shards)
        figures = {"negative_share": 100 * _over_shards(negative, shards) / max(total, 1)}
        figures["max_log_probability"] = scale
        if first:
            return figures
        objective = math.sqrt(_over_shards(_square(model.parameters()), shards))
        raw = math.sqrt(_over_shards(square, shards))
        if self.weight_mode == "absolute":
            coefficient = math.exp(math.log(2 * self.weight) + scale + top)
        else:
            coefficient = self.weight * objective / raw if raw > 0 else 0.0
        for parameter, penalty in zip(parameters, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            own = local(parameter.grad)
            own.add_(penalty.to(own.dtype), alpha=coefficient)
        return figures | {"objective_gradient_norm": objective, "penalty_gradient_norm": coefficient * raw}

    def state_dict(self) -> dict[str, Any]:
        """The anchor by parameter name and its scale; between optimiser steps there is nothing else."""
        return {"anchor": self._anchor, "anchor_scale": self._anchor_scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the anchor of an interrupted run."""
        self._anchor, self._anchor_scale = state["anchor"], state["anchor_scale"]

    def _local_anchor(self, parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
        if self._anchor is None or self._anchor.keys() != parameters.keys():
            allowed = "those of the run that is resumed: its anchor belongs to other parameters"
            raise UserError("regularizer.modules", self.modules, allowed)
        # A resumed run's anchor comes from the file to the CPU, wherever the weights are.
        self._anchor = {name: self._anchor[name].to(p.device) for name, p in parameters.items()}
        return [local(a) for a in self._anchor.values()]

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.modules is None:
            return trained
        hf = getattr(model, "hf", model)
        sites = neuron_sites(hf)
        chosen = {site.key for site in select_sites(sites, self.modules, "regularizer.modules")}
        found: set[nn.Parameter] = set()
        for name in dict.fromkeys(site.module_name for site in sites if site.key in chosen):
            sharing = {site.key for site in sites if site.module_name == name}
            if not sharing <= chosen:
                allowed = f"all kinds of the fused projection together: {sorted(kind for _, kind in sharing)}"
                raise UserError("regularizer.modules", self.modules, allowed)
            found |= set(hf.get_submodule(name).parameters())
        if not (restricted := {name: p for name, p in trained.items() if p in found}):
            raise UserError("regularizer.modules", self.modules, "sites whose weights train (see lora.target_modules)")
        return restricted

    def _warn(self, logps: Tensor) -> None:
        highest = logps.max().exp().item()
        if logps.mean().exp() > 0.99:
            self._warn_once("saturated", "answers are saturated (mean P > 0.99): ∂P and hence attributions are near 0")
        elif highest < 1e-6 and self.weight_mode == "absolute":
            advice = 'weight_mode "relative" or target "length_normalised" keeps the penalty alive'
            self._warn_once("vanished", f"all answers have P < 1e-6: the absolute penalty has vanished; {advice}")

    def _warn_once(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(f"AttributionRegularizer: {text}", stacklevel=3)


def _like(local: Tensor, parameter: Tensor) -> Tensor:
    """The shard that ``local`` is where ``parameter`` is one."""
    if not isinstance(parameter, DTensor):
        return local
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[slice]:
    start = size = 0
    for index, tensor in enumerate(tensors):
        if size and size + tensor.numel() > _CHUNK:
            yield slice(start, index)
            start, size = index, 0
        size += tensor.numel()
    if start < len(tensors):
        yield slice(start, len(tensors))


def _reduced(value: Tensor, operation: Any) -> float:
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value, op=operation)
    return value.item()


def _over_shards(value: float, shards: torch.device | None) -> float:
    # Shards hold parts of a count or a squared norm; replicas hold all of it each. NCCL needs the sum on the device.
    if shards is None:
        return value
    return _reduced(torch.tensor(value, dtype=torch.float64, device=shards), dist.ReduceOp.SUM)


def _square(parameters: Iterator[nn.Parameter]) -> float:
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    # Chunk by chunk: widened copies of all bfloat16 gradients at once would be the step's memory peak.
    norms = (n for part in _chunks(gradients) for n in torch._foreach_norm([wide(g) for g in gradients[part]]))
    return math.fsum(float(n) ** 2 for n in norms)
