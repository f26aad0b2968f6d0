"""SSIUU's regulariser: penalise what makes negative attribution grow, on top of any objective."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_ssiuu.models.answers import Answers, target_logps
from lightning_ssiuu.models.architectures import neuron_sites, select_sites
from lightning_ssiuu.regularizers.penalty import Penalty, WeightMode
from lightning_ssiuu.training.gradients import extra_gradient, sum_over_ranks
from lightning_ssiuu.training.layer_gradients import Sums
from lightning_ssiuu.training.shards import (
    blocks,
    local,
    local_state,
    over_shards,
    reduced,
    reshard,
    shard_device,
    shard_like,
    trained_parameters,
    wide,
)
from lightning_ssiuu.training.single_pass import NotExact, SinglePass
from lightning_ssiuu.utils.errors import UserError, check_choice

Anchor = Literal["previous", "original"]
Target = Literal["sequence", "length_normalised"]
Passes = Literal["auto", "one", "two"]


class AttributionPenalty(Penalty):
    """What the penalty has in common at both levels: options, the probability's scale, warnings.

    Args:
        anchor: ``"previous"`` holds A to its value one optimiser step ago (Algorithm 1), ``"original"`` to its value at
            the first step, where the weights are still the original model's. Either is a value on that step's batch;
            the first step has none and hence no penalty.
        target: ``"sequence"`` (P, the paper's) or ``"length_normalised"`` (P^{1/T}).
        modules: Restrict to these sites, e.g. ``["mlp_up", "layer3.attn_q"]``; None for no restriction. When training
            starts, an architecture without known sites and modules that name none are refused.
        **kwargs: As :class:`Penalty`; an absolute λ, the paper's, depends on the model's size and P, can be negligible.
    """

    state_attributes = (*Penalty.state_attributes, "_anchor", "_anchor_scale")  # between steps there is nothing else
    _anchor: Any = None  # A / e^anchor_scale, in the subclass's form

    def __init__(
        self,
        weight: float = 1e-3,
        weight_mode: WeightMode = "absolute",
        anchor: Anchor = "previous",
        target: Target = "sequence",
        modules: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(weight, weight_mode, **kwargs)
        check_choice("regularizer.anchor", anchor, Anchor)
        check_choice("regularizer.target", target, Target)
        if modules is not None and not modules:
            raise UserError("regularizer.modules", modules, "null, or at least one module to restrict to")
        self.anchor, self.target, self.modules = anchor, target, modules
        self._scale = self._anchor_scale = -math.inf  # logarithms of what this step's g and the anchor are relative to
        self._warned: set[str] = set()

    def _rescaled(self, logps: Tensor) -> float:
        """The scale, the highest log-probability of this step so far on any rank, with these seen too."""
        text = None
        if logps.mean().exp() > 0.99:
            text = "answers are saturated (mean P > 0.99): ∂P and hence attributions are near 0"
        elif logps.max().exp() < 1e-6 and self.weight_mode == "absolute":
            advice = 'weight_mode "relative" or target "length_normalised" keeps the penalty alive'
            text = f"all answers have P < 1e-6: the absolute penalty has vanished; {advice}"
        if text is not None and text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"{type(self).__name__}: {text}", stacklevel=2)
        return max(self._scale, reduced(logps.max(), dist.ReduceOp.MAX if dist.is_available() else None))


class AttributionRegularizer(AttributionPenalty):
    """Adds ``2λ (A_t − A_anchor) g`` to the gradient of every parameter whose attribution ``A_t = φ g`` is negative.

    ``g = Σ_b ∂P_b/∂φ`` over the forget sequences of an optimiser step, P_b the probability of answer b; both g and A
    are held constant (first order). g is summed over micro-batches and ranks. All scales are kept as logarithms, so
    that a P of e^−200 is as good as any. Source: arXiv 2509.22263, Eqs. 12 to 14, Algorithm 1; here at parameter level.

    Args:
        *args: As :class:`AttributionPenalty`; ``modules``: the weights of these sites alone, None for every parameter,
            embeddings and norms included.
        passes: How g is taken. ``"two"``: by a backward pass of its own through the objective's forward pass, right
            under any strategy and with any loss. ``"one"``: in the loss's backward pass, by a second product per layer
            (:mod:`lightning_ssiuu.training.single_pass`), at about half the cost; the same but for rounding where the
            forget loss is a function of the answers' log-probabilities (GradientAscent, NPO, ...) and every trained
            layer is a known one, else refused. ``"auto"``: one where that holds, otherwise two; the log says why.

    Example:
        >>> AttributionRegularizer(weight=0.1, weight_mode="relative", modules=["mlp_up"]).anchor
        'previous'
    """

    optional_state = frozenset({"takes_two"})
    _gradients: list[Tensor | None] | None = None  # g / e^scale of this step so far; None where nothing was added
    _anchor: dict[str, Tensor] | None = None  # A / e^anchor_scale by parameter, a shard where that is one

    def __init__(self, *args: Any, passes: Passes = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_choice("regularizer.passes", passes, Passes)
        self.passes = passes
        self._single: SinglePass | None = None if passes == "two" else SinglePass()
        # What the loss's backward pass is to add: the answers, and each sequence's weight of ∂log P.
        self._pending: tuple[Answers, Tensor] | None = None

    def state(self) -> dict[str, Any]:
        # Found out in a step, which ran as with one: a resumed run does not find it out again.
        return super().state() | {"takes_two": self._single is None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        if self.passes == "auto" and state.get("takes_two"):
            self._single = None

    @property
    def differentiates(self) -> bool:
        return self._single is None and self.weight != 0

    def prepare(self, module: Any) -> None:
        self._parameters(module.model)  # refuses modules that name nothing

    def before_forward(self, model: nn.Module, part: Mapping[str, Tensor]) -> None:
        if self.weight == 0 or self._single is None:
            return
        self._pending = None
        try:
            self._single.watch(model, part, list(self._parameters(model).values()))
        except NotExact as reason:
            self._take_two(reason)

    def collect(self, model: nn.Module, answers: Answers, part: Mapping[str, Tensor]) -> None:
        """Add this micro-batch's ``Σ_b ∂P_b/∂φ``, with one pass in the backward pass to come; ``.grad`` stays as is."""
        if self.weight == 0:
            return
        logps = target_logps(answers, self.target)
        reshard(model)
        scale = self._rescaled(logps.detach())
        if self._gradients is None:
            self._gradients = [None] * len(self._parameters(model))
        elif known := [gradient for gradient in self._gradients if gradient is not None]:
            torch._foreach_mul_(known, math.exp(self._scale - scale))
        self._scale = scale
        # ∂P = P ∂log P; the weights are constants, relative to e^scale, so the largest is 1.
        weights = (logps.detach() - scale).exp()
        if self._single is not None and self._single.watching:
            per_token = self.target == "length_normalised"
            self._pending = answers, weights / answers.lengths.clamp(min=1) if per_token else weights
            return
        if self._single is not None:
            self._take_two(NotExact("the forget loss is differentiated elsewhere than in the step's backward pass"))
        self._second_pass(model, (weights * logps).sum())

    def before_backward(self, model: nn.Module, loss: Tensor) -> None:
        if self._pending is None or self._single is None or self._gradients is None:
            return
        (answers, weights), self._pending = self._pending, None
        parameters = list(self._parameters(model).values())
        try:
            self._single.arm(answers, weights, loss, parameters, self._gradients)
        except NotExact as reason:
            self._take_two(reason)
            self._second_pass(model, (weights * answers.logps).sum())

    def _second_pass(self, model: nn.Module, total: Tensor) -> None:
        parameters = list(self._parameters(model).values())
        sums = Sums(parameters, self._gradients or [])
        for parameter, gradient in zip(parameters, extra_gradient(total, parameters, model), strict=True):
            sums.add(parameter, gradient)

    def _take_two(self, reason: NotExact) -> None:
        if self.passes == "one" and not reason.is_momentary:
            raise UserError("regularizer.passes", "one", f"auto or two here: {reason}") from reason
        if str(reason) not in self._warned:
            self._warned.add(str(reason))
            rank_zero_info(f"{type(self).__name__}: two backward passes instead of one: {reason}")
        if not reason.is_momentary:
            self._single = None

    @torch.no_grad()
    def apply(self, model: nn.Module) -> dict[str, float]:
        """Add the penalty's gradient to ``.grad``, keep A_t as the next anchor, forget g."""
        if self._gradients is None:
            return {}
        named = self._parameters(model)
        parameters = list(named.values())
        raw, scale, self._gradients, self._scale = self._gradients, self._scale, None, -math.inf
        gradients = [wide(torch.zeros_like(local(p))) if g is None else g for p, g in zip(parameters, raw, strict=True)]
        sum_over_ranks(parameters, gradients)
        first = self._anchor is None
        top = max(scale, self._anchor_scale)
        now, then, negative, square = math.exp(scale - top), math.exp(self._anchor_scale - top), 0, 0.0
        kept = [torch.empty_like(g) for g in gradients] if first else self._local_anchor(named)
        for g, held, weights in blocks(gradients, kept, [local(p.detach()) for p in parameters]):
            attribution = torch._foreach_mul(g, [wide(w) for w in weights])
            # As numbers: a CPU is slow with booleans.
            inside = [torch.lt(a, 0, out=torch.empty_like(a)) for a in attribution]
            # float32 counts to 2^24
            negative += sum(int(m.sum(dtype=torch.float64 if m.numel() > 1 << 24 else None)) for m in inside)
            if not first:
                growth = attribution if now == 1 else torch._foreach_mul(attribution, now)
                growth = torch._foreach_add(growth, held, alpha=-then)
                torch._foreach_mul_(g, growth)
                torch._foreach_mul_(g, inside)
                square += sum(float(n) ** 2 for n in torch._foreach_norm(g))
            if first or self.anchor == "previous":
                torch._foreach_copy_(held, attribution)  # in place: no third copy as large as the weights
        if first:
            self._anchor = {name: shard_like(a, p) for (name, p), a in zip(named.items(), kept, strict=True)}
        if first or self.anchor == "previous":
            self._anchor_scale = scale
        shards = shard_device(parameters)
        total = over_shards(sum(g.numel() for g in gradients), shards)
        # |I⁻| over all regularised parameters in percent, and nats
        share = 100 * over_shards(negative, shards) / max(total, 1)
        figures = {"negative_share": share, "max_log_probability": scale}
        if not first:
            figures |= self.add(model, parameters, gradients, scale + top + math.log(2), square)
        self._n_steps += 1
        return figures

    def _local_anchor(self, parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
        if self._anchor is None or self._anchor.keys() != parameters.keys():
            allowed = "those of the run that is resumed: its anchor belongs to other parameters"
            raise UserError("regularizer.modules", self.modules, allowed)
        self._anchor, parts = local_state(self._anchor, parameters)
        return parts

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        if not (trained := trained_parameters(model)):
            allowed = "NeuronAttributionRegularizer: no weight is trained, and a frozen one has no attribution to keep"
            raise UserError("regularizer", type(self).__name__, allowed)
        if self.modules is None:
            return trained
        sites = neuron_sites(hf := getattr(model, "hf", model))
        chosen = {site.key for site in select_sites(sites, self.modules, "regularizer.modules")}
        names = {site.module_name for site in sites if site.key in chosen}
        if cut := [site.module_name for site in sites if site.module_name in names and site.key not in chosen]:
            kinds = sorted({site.kind for site in sites if site.module_name == cut[0]})
            raise UserError("regularizer.modules", self.modules, f"all kinds of the fused projection together: {kinds}")
        restricted = {parameter for name in names for parameter in hf.get_submodule(name).parameters()}
        if not (parameters := {name: p for name, p in trained.items() if p in restricted}):
            allowed = "sites whose weights train (see lora.target_modules), or NeuronAttributionRegularizer"
            raise UserError("regularizer.modules", self.modules, allowed)
        return parameters
