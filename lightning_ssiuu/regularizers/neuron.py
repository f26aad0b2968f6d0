"""SSIUU's regulariser at the level of neurons: through activations, whatever weights are trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ssiuu.models.answers import Answers, input_positions, target_logps
from lightning_ssiuu.models.architectures import WRITERS, NeuronSite, neuron_sites, select_sites
from lightning_ssiuu.models.packing import apart
from lightning_ssiuu.regularizers.attribution_penalty import AttributionPenalty
from lightning_ssiuu.regularizers.reruns import Reruns, without_dropout
from lightning_ssiuu.training.gradients import extra_gradient, sum_over_ranks
from lightning_ssiuu.training.shards import reshard, trained_parameters, wide
from lightning_ssiuu.utils.distributed import world_size
from lightning_ssiuu.utils.errors import UserError, check_choice

Tokens = Literal["min", "sum"]


#: By site what of h (graph attached) and ∂log P/∂h makes the attribution: [B, 1 or L, width], at least float32.
Pairs = list[tuple[Tensor, Tensor]]


class NeuronAttributionRegularizer(AttributionPenalty):
    """Adds ``Σ_i 2λ (A_{t,i} − A_anchor,i) ∂A_{t,i}/∂φ`` over the neurons i whose attribution A_t is negative.

    A neuron's attribution is aggregated as in the diagnosis D⁻ (arXiv 2509.22263, Eqs. 1 to 5), which the attribution
    callback measures: per example the minimum over its tokens of ``h ∂P/∂h``. Over examples, micro-batches and ranks it
    is summed, so that λ means what it does at parameter level. With ``tokens: sum`` it is summed over tokens as well:
    that is the sum of ``φ ∂P/∂φ`` over the neuron's own weights and bias, :class:`AttributionRegularizer`'s attribution
    row by row. ∂P/∂h and the choice of the token are held constant (first order, Eqs. 13 and 14): ``∂A/∂φ = Σ_b
    ∂P_b/∂h · ∂h/∂φ`` reaches every trained weight before the neuron, also adapters on a frozen or quantised base.

    Each optimiser step runs the model on its forget parts once more (with several micro-batches twice, but for the
    last), without dropout, with two backward passes and the sites' activations and their gradients in memory.

    Args:
        tokens: ``"min"`` or ``"sum"``, see above.
        **kwargs: As :class:`~lightning_ssiuu.regularizers.attribution_penalty.AttributionPenalty`; ``modules``
            restricts the neurons that are held, not the weights that are changed, None means all sites.

    Example:
        >>> NeuronAttributionRegularizer(0.1, weight_mode="relative", modules=["mlp_up"]).tokens
        'min'
    """

    def __init__(self, weight: float = 1e-3, *, tokens: Tokens = "min", **kwargs: Any) -> None:
        super().__init__(weight, **kwargs)
        check_choice("regularizer.tokens", tokens, Tokens)
        self.tokens = tokens
        self._reruns = Reruns()
        self._anchor: Tensor | None = None  # A / e^anchor_scale of all neurons, in the order of the sites

    def prepare(self, module: Any) -> None:
        self._sites(module.model)  # refuses modules that name nothing

    def collect(self, model: nn.Module, answers: Answers, part: Mapping[str, Tensor]) -> None:
        if self.weight != 0:
            self._reruns.keep(answers, part)

    def apply(self, model: nn.Module) -> dict[str, float]:
        if not (parts := self._reruns.take()):
            return {}
        sites, passes = self._sites(model), list[tuple[Tensor, Pairs]]()
        attribution = torch.zeros(())
        with without_dropout(model), torch.enable_grad():
            for part in parts:
                passes.clear()  # one graph at a time
                passes.append(self._run(model, part, sites))
                before, self._scale = self._scale, self._rescaled(passes[0][0].detach())
                attribution = self._attribution(*passes[0]) + math.exp(before - self._scale) * attribution
            if world_size() > 1:
                dist.all_reduce(attribution)
            scale, top = self._scale, max(self._scale, self._anchor_scale)
            push = self._push(attribution, top)
            gradients: list[Tensor] = []
            # The first step only measures; later ones have the last part's graph still.
            for part in reversed(parts) if self._anchor is not None else ():
                total = self._total(*(passes.pop() if passes else self._run(model, part, sites)), push)
                parameters = list(trained_parameters(model).values())
                fresh = [wide(g) for g in extra_gradient(total, parameters, model, keep_graph=False)]
                reshard(model)
                gradients = gradients or [torch.zeros_like(g) for g in fresh]
                torch._foreach_add_(gradients, fresh)
        figures = {"negative_share": 100 * (attribution < 0).float().mean().item()} | self._scale_figure(scale)
        if gradients:
            sum_over_ranks(parameters, gradients)
            figures |= self.add(model, parameters, gradients, scale + top + math.log(2))
        if self._anchor is None or self.anchor == "previous":
            self._anchor, self._anchor_scale = attribution, scale
        self._scale = -math.inf
        self._n_steps += 1
        return figures

    def _sites(self, model: Any) -> list[NeuronSite]:
        sites = neuron_sites(getattr(model, "hf", model))
        return sites if self.modules is None else select_sites(sites, self.modules, "regularizer.modules")

    def _run(self, model: Any, part: Mapping[str, Tensor], sites: Sequence[NeuronSite]) -> tuple[Tensor, Pairs]:
        """The target's log-probabilities ``[B]``, graph attached, and what makes the attributions."""
        with _outputs(model.hf, sites) as outputs:
            answers = self._reruns.run(model, part)
        logps = target_logps(answers, self.target)
        # Examples do not interact, so the gradient of the sum holds each example's own.
        gradients = torch.autograd.grad(logps.sum(), list(outputs.values()), retain_graph=True)
        by_module = {name: (outputs[name], gradient) for name, gradient in zip(outputs, gradients, strict=True)}
        outside, pairs = ~input_positions(part["attention_mask"], part["labels"]).unsqueeze(-1), Pairs()
        packing = model.packing
        for site in sites:
            output, gradient = (apart(site.select(tensor), packing) for tensor in by_module[site.module_name])
            output, gradient = output if output.dtype == torch.float64 else output.float(), wide(gradient)
            if self.tokens == "sum":
                pairs.append((output, gradient.masked_fill(outside, 0)))
            else:
                token = (output.detach() * gradient).masked_fill(outside, torch.inf).argmin(1, keepdim=True)
                pairs.append((output.gather(1, token), gradient.gather(1, token)))
        return logps, pairs

    @torch.no_grad()
    def _attribution(self, logps: Tensor, pairs: Pairs) -> Tensor:
        """``Σ_b A_b / e^scale`` of this rank's examples, ``[n_neurons]``."""
        factor = self._factors(wide(logps))[:, None, None]
        return torch.cat([(output * gradient * factor).sum((0, 1)) for output, gradient in pairs])

    def _push(self, attribution: Tensor, top: float) -> Tensor:
        """``(A_t − A_anchor) / e^top`` where A_t is negative; nothing to the first step."""
        if self._anchor is None:
            return torch.zeros_like(attribution)
        if self._anchor.shape != attribution.shape:
            allowed = "those of the run that is resumed: its anchor belongs to other neurons"
            raise UserError("regularizer.modules", self.modules, allowed)
        anchor = self._anchor.to(attribution)
        growth = math.exp(self._scale - top) * attribution - math.exp(self._anchor_scale - top) * anchor
        return growth * (attribution < 0)

    def _total(self, logps: Tensor, pairs: Pairs, push: Tensor) -> Tensor:
        """``Σ_i push_i A_i / e^scale`` of this rank's examples, all but h constant: its gradient is the penalty's."""
        factor = self._factors(wide(logps))[:, None, None]
        # Zero times the answers: FSDP2 gathers a layer's weights when a gradient comes to the layer's output.
        total = 0 * logps.sum()
        for (output, gradient), held in zip(pairs, push.split([h.shape[-1] for h, _ in pairs]), strict=True):
            total = total + (output * (gradient * factor * held)).sum()
        return total


@contextmanager
def _outputs(hf: Any, sites: Sequence[NeuronSite]) -> Iterator[dict[str, Tensor]]:
    """Outputs of modules in the forward pass inside, graph attached, also where nothing before them is trained."""
    outputs: dict[str, Tensor] = {}

    def begin(_module: nn.Module, _args: object, output: Tensor) -> None:
        output.requires_grad_(True)

    def keep(site: NeuronSite, _module: nn.Module, _args: object, output: Tensor) -> Tensor | None:
        outputs[site.module_name] = output
        # A block may add to what is written to the residual stream in place.
        return output.clone() if site.kind in WRITERS else None

    with ExitStack() as hooks:
        hooks.enter_context(hf.get_input_embeddings().register_forward_hook(begin))
        for name, site in {site.module_name: site for site in sites}.items():
            hooks.enter_context(hf.get_submodule(name).register_forward_hook(partial(keep, site)))
        yield outputs
