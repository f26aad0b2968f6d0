"""SSIUU's regulariser: penalise what makes negative attribution grow, on top of any objective."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_ssiuu.models.answers import Answers, Part, target_logps
from lightning_ssiuu.models.architectures import neuron_sites, select_sites
from lightning_ssiuu.regularizers.attribution_penalty import AttributionPenalty
from lightning_ssiuu.regularizers.reruns import Reruns, once_differentiable, twice_differentiable, without_dropout
from lightning_ssiuu.training.gradients import extra_gradient, sum_over_ranks
from lightning_ssiuu.training.layer_gradients import Sums
from lightning_ssiuu.training.perturbation import displaced, place
from lightning_ssiuu.training.shards import (
    blocks,
    local,
    local_state,
    over_shards,
    reshard,
    shard_device,
    shard_like,
    snapshot,
    trained_parameters,
    wide,
)
from lightning_ssiuu.training.single_pass import NotExact, SinglePass
from lightning_ssiuu.utils.errors import UserError, check_choice

AnchorBatch = Literal["cached", "same"]
Derivative = Literal["first_order", "exact"]
Passes = Literal["auto", "one", "two"]
#: In what torch says where there is no second derivative.
_NOT_TWICE = ("is not implemented", "differentiate twice", "once_differentiable")


class AttributionRegularizer(AttributionPenalty):
    """Penalises ``Σ (A_t − A_anchor)²`` over the parameters whose attribution ``A_t = φ g`` is negative.

    ``g = Σ_b ∂P_b/∂φ`` over the forget sequences of an optimiser step, P_b the probability of answer b, summed over
    micro-batches and ranks. To first order g is held constant, and the penalty's gradient is ``2λ (A_t − A_anchor) g``.
    The exact gradient has another part, ``2λ H (φ (A_t − A_anchor))`` with H the second derivative of ``Σ_b P_b``; the
    anchor and the choice of the parameters are held constant in both. All scales are kept as logarithms, so that a P
    of e^−200 is as good as any. Source: arXiv 2509.22263, Eqs. 12 to 14, Algorithm 1; here at parameter level.

    Args:
        *args: As :class:`AttributionPenalty`; ``modules``: attributions of the weights of these sites alone, None for
            every parameter, embeddings and norms included. (An exact gradient changes the other weights, too.)
        derivative: ``"first_order"`` or ``"exact"``: a pass over the forget parts without dropout that is
            differentiated twice, at the end of the step (with several micro-batches twice, but for the last).
        anchor_batch: Where the anchor's attribution is taken: ``"cached"`` on the batch of the anchor's own step;
            ``"same"`` on the present batch, with the anchor's weights put in place for that pass (a copy of the weights
            is held; the passes are without dropout).
        passes: How g is taken to first order with a cached anchor. ``"two"``: by a backward pass of its own through the
            objective's forward pass, right under any strategy and with any loss. ``"one"``: in the loss's backward
            pass, by a second product per layer (:mod:`lightning_ssiuu.training.single_pass`), at about half the cost;
            the same but for rounding where the forget loss is a function of the answers' log-probabilities
            (GradientAscent, NPO, ...) and every trained layer is a known one, else refused. ``"auto"``: one where that
            holds, otherwise two; the log says why.

    Raises:
        UserError: If an option is not one of these; for ``exact`` and ``same`` if weights are cut over the ranks
            (FSDP2), for ``exact`` if they are quantised or a layer has no second derivative.

    Example:
        >>> AttributionRegularizer(weight=0.1, weight_mode="relative", modules=["mlp_up"]).anchor
        'previous'
    """

    optional_state = frozenset({"takes_two"})
    _gradients: list[Tensor | None] | None = None  # g / e^scale of this step so far; None where nothing was added
    # By parameter, a shard where that is one: A / e^anchor_scale, or the anchor's weights for anchor_batch same.
    _anchor: dict[str, Tensor] | None = None

    def __init__(
        self,
        *args: Any,
        derivative: Derivative = "first_order",
        anchor_batch: AnchorBatch = "cached",
        passes: Passes = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_choice("regularizer.derivative", derivative, Derivative)
        check_choice("regularizer.anchor_batch", anchor_batch, AnchorBatch)
        check_choice("regularizer.passes", passes, Passes)
        self.derivative, self.anchor_batch, self.passes = derivative, anchor_batch, passes
        self._reruns = Reruns() if derivative == "exact" or anchor_batch == "same" else None
        if self._reruns is not None and passes != "auto":
            allowed = (
                f"auto with derivative {derivative} and anchor_batch {anchor_batch}, which run the forget parts again"
            )
            raise UserError("regularizer.passes", passes, allowed)
        self._single = None if passes == "two" or self._reruns is not None else SinglePass()
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
        return self._single is None and self._reruns is None and self.weight != 0

    def check_sharded(self) -> None:
        for name, value, other in (
            ("derivative", self.derivative, "first_order"),
            ("anchor_batch", self.anchor_batch, "cached"),
        ):
            if value in ("exact", "same"):
                raise UserError(f"regularizer.{name}", value, f"{other} with weights cut over the ranks (FSDP2)")

    def prepare(self, module: Any) -> None:
        self._parameters(module.model)  # refuses modules that name nothing
        if self.derivative == "exact" and (reason := once_differentiable(module.model)) is not None:
            raise UserError("regularizer.derivative", "exact", f"first_order with {reason}")

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
        if self._reruns is not None:
            self._reruns.keep(answers, part)
            return
        logps = target_logps(answers, self.target)
        reshard(model)
        self._rescale(model, logps)
        weights = self._factors(logps)  # ∂P = P ∂log P, relative to e^scale
        if self._single is not None and self._single.watching:
            per_token = self.target != "sequence"
            self._pending = answers, weights / answers.lengths.clamp(min=1) if per_token else weights
            return
        if self._single is not None:
            self._take_two(NotExact("the forget loss is differentiated elsewhere than in the step's backward pass"))
        self._second_pass(model, (weights * logps).sum())

    def _rescale(self, model: nn.Module, logps: Tensor) -> None:
        scale = self._rescaled(logps.detach())
        if self._gradients is None:
            self._gradients = [None] * len(self._parameters(model))
        elif known := [gradient for gradient in self._gradients if gradient is not None]:
            torch._foreach_mul_(known, math.exp(self._scale - scale))
        self._scale = scale

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
        parts = [] if self._reruns is None else self._reruns.take()
        if self._gradients is None and not parts:
            return {}
        named = self._parameters(model)
        parameters, first = list(named.values()), self._anchor is None
        exact, same = self.derivative == "exact", self.anchor_batch == "same"
        kept: list[Tensor] = []
        if same and not first:
            kept, self._anchor_scale = self._anchor_on(model, parts, named)
        live = self._run_again(model, parts, parameters, twice=exact and not first)
        gradients, scale = self._taken(parameters)
        top = max(scale, self._anchor_scale)
        now, then, negative, square = math.exp(scale - top), math.exp(self._anchor_scale - top), 0, 0.0
        if first:
            kept = [torch.empty_like(g) for g in gradients]
        elif not same:
            kept = self._local_anchor(named)
        # φ (A_t − A_anchor) / e^top, for the exact gradient
        directions = [torch.empty_like(g) for g in gradients] if exact and not first else gradients
        keeps = not same and (first or self.anchor == "previous")
        for g, held, weights, along in blocks(gradients, kept, [local(p.detach()) for p in parameters], directions):
            attribution = torch._foreach_mul(g, [wide(w) for w in weights])
            inside = [self._penalised(a) for a in attribution]
            # float32 counts to 2^24
            negative += sum(int(m.sum(dtype=torch.float64 if m.numel() > 1 << 24 else None)) for m in inside)
            if not first:
                growth = attribution if now == 1 else torch._foreach_mul(attribution, now)
                growth = torch._foreach_add(growth, held, alpha=-then)
                torch._foreach_mul_(growth, inside)
                torch._foreach_mul_(g, growth)
                square += sum(float(n) ** 2 for n in torch._foreach_norm(g))
                if exact:
                    torch._foreach_copy_(along, torch._foreach_mul(growth, [wide(w) for w in weights]))
            if keeps:
                torch._foreach_copy_(held, attribution)  # in place: no third copy as large as the weights
        if same:
            kept = snapshot(parameters) if first or self.anchor == "previous" else kept
        if first or (same and self.anchor == "previous"):
            self._anchor = {name: shard_like(a, p) for (name, p), a in zip(named.items(), kept, strict=True)}
        if keeps:
            self._anchor_scale = scale
        shards = shard_device(parameters)
        total = over_shards(sum(g.numel() for g in gradients), shards)
        # |I⁻| over all regularised parameters in percent
        figures = {"negative_share": 100 * over_shards(negative, shards) / max(total, 1)} | self._scale_figure(scale)
        if not first:
            if exact:
                parameters, gradients = self._with_curvature(model, parts, live, named, gradients, directions, scale)
            squares = None if exact else square
            figures |= self.add(model, parameters, gradients, scale + top + math.log(2), squares)
        self._n_steps += 1
        return figures

    def _penalised(self, attribution: Tensor) -> Tensor:
        """1 where there is a penalty, else 0; as numbers, because a CPU is slow with booleans."""
        return torch.lt(attribution, 0, out=torch.empty_like(attribution))

    def _taken(self, parameters: Sequence[nn.Parameter]) -> tuple[list[Tensor], float]:
        """This step's g / e^scale over all ranks, and the scale; a new step then begins."""
        raw, scale, self._gradients, self._scale = self._gradients, self._scale, None, -math.inf
        assert raw is not None
        gradients = [wide(torch.zeros_like(local(p))) if g is None else g for p, g in zip(parameters, raw, strict=True)]
        sum_over_ranks(parameters, gradients)
        return gradients, scale

    def _run_again(
        self, model: nn.Module, parts: Sequence[Part], parameters: Sequence[nn.Parameter], twice: bool
    ) -> list[Tensor]:
        """Take g of these parts; with ``twice``, the last part's comes back with its graph."""
        live: list[Tensor] = []
        for part in parts:
            live = []  # one graph at a time
            logps = self._logps_again(model, part, twice)
            self._rescale(model, logps)
            live = self._differentiated(logps, parameters, model, twice)
            sums = Sums(parameters, self._gradients or [])
            for parameter, gradient in zip(parameters, live, strict=True):
                sums.add(parameter, gradient.detach().clone() if twice else gradient)
        return live

    def _logps_again(self, model: nn.Module, part: Part, twice: bool) -> Tensor:
        assert self._reruns is not None
        with torch.enable_grad(), self._as_measured(model, twice):
            return target_logps(self._reruns.run(model, part), self.target)

    def _differentiated(
        self, logps: Tensor, parameters: Sequence[nn.Parameter], model: nn.Module, twice: bool
    ) -> list[Tensor]:
        with torch.enable_grad(), self._as_measured(model, twice):
            values = self._values(logps).sum()
            return list(torch.autograd.grad(values, parameters, create_graph=twice, materialize_grads=True))

    @contextmanager
    def _as_measured(self, model: nn.Module, twice: bool) -> Iterator[None]:
        try:
            with without_dropout(model), twice_differentiable(model) if twice else nullcontext():
                yield
        except RuntimeError as error:
            if not twice or not any(text in str(error) for text in _NOT_TWICE):
                raise
            reason = str(error).splitlines()[0]
            raise UserError("regularizer.derivative", "exact", f"first_order here: {reason}") from error

    def _anchor_on(
        self, model: nn.Module, parts: Sequence[Part], named: Mapping[str, nn.Parameter]
    ) -> tuple[list[Tensor], float]:
        """The attribution at the anchor's weights on these parts, over its e^scale, and that scale."""
        weights, parameters = self._local_anchor(named), list(named.values())
        with displaced(model):
            place(parameters, weights)
            self._run_again(model, parts, parameters, twice=False)
            gradients, scale = self._taken(parameters)
        return list(torch._foreach_mul(gradients, [wide(w) for w in weights])), scale

    def _with_curvature(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        live: list[Tensor],
        named: Mapping[str, nn.Parameter],
        gradients: Sequence[Tensor],
        directions: Sequence[Tensor],
        scale: float,
    ) -> tuple[list[nn.Parameter], list[Tensor]]:
        """All trained parameters and the exact gradient: the first-order one, and H times the directions."""
        parameters, trained = list(named.values()), trained_parameters(model)
        products = [torch.zeros_like(wide(p)) for p in trained.values()]
        self._scale = scale
        for part in reversed(parts):
            if not live:  # of the last part it still is there
                live = self._differentiated(self._logps_again(model, part, True), parameters, model, True)
            with torch.enable_grad(), self._as_measured(model, True):
                total = torch.stack([(g * v.to(g.dtype)).sum() for g, v in zip(live, directions, strict=True)]).sum()
                # Not by torch.autograd.grad, which takes what has no second derivative for a constant.
                fresh = extra_gradient(total, list(trained.values()), model, keep_graph=False)
            live = []
            torch._foreach_add_(products, [wide(g) for g in fresh])
        self._scale = -math.inf
        sum_over_ranks(list(trained.values()), products)
        for name, product in zip(trained, products, strict=True):
            if name in named:
                product.add_(gradients[list(named).index(name)])
        return list(trained.values()), products

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
