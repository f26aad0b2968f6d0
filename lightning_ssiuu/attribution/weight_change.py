"""Own change: what a neuron's own changed weights cost the answer, apart from what it only passes on.

D⁻ compares a neuron's attribution before and after. It also rises in neurons that nobody touched: upstream of a changed
one (their gradient changed) and downstream (their input changed). Here the difference of the answers' log-probability
between two models is instead shared out over the *weights* that differ, by integrated gradients along the straight line
from the original's weights to the changed ones (Sundararajan et al., arXiv 1703.01365, with weights as the features):
``C = (W' − W) ⊙ ∫₀¹ ∂log P/∂W at W + t (W' − W) dt``. A weight that did not change gets exactly 0, and all C together
are log P' − log P (in a mixture of experts but for the jumps where a token changes its experts).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_ssiuu.models.answers import AnswerModel, Target, target_logps
from lightning_ssiuu.models.architectures import WRITERS, NeuronSite, head_size
from lightning_ssiuu.models.loading import evaluation_mode
from lightning_ssiuu.utils.distributed import gathered, world_size
from lightning_ssiuu.utils.errors import UserError, check_at_least

#: Kinds whose neurons of one index are one hidden unit.
HIDDEN = ("mlp_gate", "mlp_up")
#: Least share of the answers' probability that a flagged unit costs.
MINIMUM_COST = 0.1
Key = tuple[int, str]


def site_weights(model: AnswerModel, sites: Sequence[NeuronSite]) -> dict[str, Tensor]:
    """Copies on the CPU of the weights and biases of all sites' modules, by parameter name of ``model.hf``."""
    weights: dict[str, Tensor] = {}
    for name in dict.fromkeys(site.module_name for site in sites):
        own = dict(model.hf.get_submodule(name).named_parameters(recurse=False))
        if "weight" not in own or not own["weight"].is_floating_point() or own["weight"].ndim != 2:
            raise UserError("model", name, "plain weights: merge adapters, load without quantisation")
        weights |= {f"{name}.{part}": value.detach().to("cpu", copy=True) for part, value in own.items()}
    return weights


@dataclass
class OwnChange:
    """What the changed weights of every neuron do to the answers' log-probability: mean over examples, in nats.

    Negative values cost the answer; everything is 0 where nothing changed. ``rows`` are, per site ``[width]``, of the
    neuron's incoming weights and bias; ``columns``, per site of kind attn_o and mlp_down ``[inputs]``, of the weights
    that each unit before it writes through. Such a weight lies in a row and in a column; it counts where more changed
    (mean square). ``head_size`` says what value channel an input of attn_o comes from.
    """

    sites: Sequence[NeuronSite]
    rows: dict[Key, Tensor]
    columns: dict[Key, Tensor]
    head_size: int
    n_examples: int = 0

    def over_ranks(self) -> OwnChange:
        """The mean over the examples of all ranks, when there are several (each rank must call it)."""
        if world_size() == 1:
            return self
        counts, rows, columns = zip(*gathered((self.n_examples, self.rows, self.columns)), strict=True)

        def mean(values: Sequence[dict[Key, Tensor]]) -> dict[Key, Tensor]:
            shares = [{k: n * v for k, v in share.items()} for n, share in zip(counts, values, strict=True)]
            return {key: torch.stack([share[key] for share in shares]).sum(0) / sum(counts) for key in shares[0]}

        return OwnChange(self.sites, mean(rows), mean(columns), self.head_size, sum(counts))

    def costs(self, minimum_cost: float = MINIMUM_COST) -> bool:
        """Whether the change of any unit costs more than this share of the answers' probability."""
        return any(bool((effect < math.log1p(-minimum_cost)).any()) for effect in self.units().values())

    def units(self) -> dict[Key, Tensor]:
        """Effect of the units of every site, ``[width]`` each; nothing is counted twice but the twins gate and up.

        A hidden unit of a feed-forward network is its gate row, its up row and its down-projection *column*; a value
        channel of a head is its row and the attn_o columns that read it. Both neurons of a hidden unit get its effect.
        Query, key and output neurons are their rows.
        """
        effects = dict(self.rows)
        for layer in dict.fromkeys(site.layer for site in self.sites):
            hidden = [(layer, kind) for kind in HIDDEN if (layer, kind) in self.rows]
            if hidden:
                unit = torch.stack([self.rows[key] for key in hidden]).sum(0)
                effects |= dict.fromkeys(hidden, unit + self.columns.get((layer, "mlp_down"), 0))
            if (layer, "attn_v") in self.rows and (layer, "attn_o") in self.columns:
                row = self.rows[layer, "attn_v"]
                # Query heads that share a value head are neighbours.
                readers = self.columns[layer, "attn_o"].view(len(row) // self.head_size, -1, self.head_size)
                effects[layer, "attn_v"] = row + readers.sum(1).flatten()
        return effects


def own_change(
    model: AnswerModel,
    original: Mapping[str, Tensor],
    parts: Sequence[Mapping[str, Tensor]],
    sites: Sequence[NeuronSite],
    target: Target = "length_normalised",
    points: int = 8,
) -> OwnChange:
    """Share the change of the answers' log-probability out over the neurons whose weights changed.

    ``original`` are the :func:`site_weights` of the original; other weights are taken from ``model``, which has to be
    whole on this process. Costs ``points`` forward and backward passes per batch (midpoint rule), and memory for one
    gradient and one sum of each weight that changed. The model is not touched: interpolated weights are put in its
    place only inside the passes.
    """
    check_at_least("points", points, 1)
    changed = {name: value for name, value in model.hf.named_parameters() if name in original}
    if {name: v.shape for name, v in changed.items()} != {name: v.shape for name, v in original.items()}:
        raise UserError("original", "weights of another model", "site_weights of a model with the same sites")
    steps = {name: value.detach().cpu() - original[name].to(value.dtype) for name, value in changed.items()}
    sums = {name: torch.zeros_like(step, dtype=torch.float32) for name, step in steps.items() if step.any()}
    n_examples = sum(len(part["labels"]) for part in parts)
    if not n_examples:
        raise UserError("parts", "nothing", "at least one example")
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.enable_grad():
        for point in range(points if sums else 0):
            back = 1 - (point + 0.5) / points
            between = {n: (changed[n].detach() - back * steps[n].to(device)).requires_grad_() for n in sums}
            for part in parts:
                inputs = {name: part[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
                placed = {f"hf.{name}": value for name, value in between.items()}
                answers = torch.func.functional_call(model, placed, kwargs={**inputs, "share": True})
                gradients = torch.autograd.grad(target_logps(answers, target).sum(), list(between.values()))
                for name, gradient in zip(between, gradients, strict=True):
                    sums[name].add_(gradient.float().cpu(), alpha=1 / (points * n_examples))
    shares = {name: (total.double() * steps[name].double()) for name, total in sums.items()}
    return _gather(model, sites, shares, steps, n_examples)


def _gather(
    model: AnswerModel,
    sites: Sequence[NeuronSite],
    shares: Mapping[str, Tensor],
    steps: Mapping[str, Tensor],
    n_examples: int,
) -> OwnChange:
    rows, columns = {}, {}
    # A writer's weight matrix is also read column by column: column j is what the unit j before it writes.
    for site in sites:
        module = model.hf.get_submodule(site.module_name)
        row = torch.zeros(site.width, dtype=torch.float64)
        if (share := shares.get(f"{site.module_name}.weight")) is not None:
            straight = isinstance(module, nn.Linear)  # Conv1D: [in, out]
            share, step = (m if straight else m.T for m in (share, steps[f"{site.module_name}.weight"]))
            if site.kind in WRITERS:
                changed = step.double().square()
                to_row = changed.mean(1, keepdim=True) > changed.mean(0, keepdim=True)
                columns[site.key] = share.masked_fill(to_row, 0.0).sum(0)
                share = share.masked_fill(~to_row, 0.0)
            row += site.select(share.sum(1))
        if (bias := shares.get(f"{site.module_name}.bias")) is not None:
            row += site.select(bias)
        rows[site.key] = row
    return OwnChange(sites, rows, columns, head_size(model.hf.config), n_examples)


@dataclass(frozen=True)
class OwnFlag:
    """A flagged unit: the kinds of its neurons (gate and up for a hidden unit, else one), and their index in the site.

    ``cost`` are the nats per example that its own change takes from the forget answers.
    """

    layer: int
    kinds: tuple[str, ...]
    index: int
    cost: float

    @property
    def share(self) -> float:
        """The cost as a share of the answers' (geometric mean) probability, in [0, 1]."""
        return -torch.tensor(-self.cost, dtype=torch.float64).expm1().item()


def own_flags(
    forget: OwnChange, retain: OwnChange, alpha: float = 1e-3, minimum_cost: float = MINIMUM_COST
) -> list[OwnFlag]:
    """Flag units whose own change costs the forget answers more than retain shows, and a minimum.

    The threshold of a kind of module is the (1 − alpha) quantile over all its neurons, in all layers, of the cost on
    the retain set, where nothing was to be unlearned: alpha is the false-positive rate. ``minimum_cost`` is a share of
    the answers' probability. Largest cost first; none where nothing changed.
    """
    if not 0 < alpha < 1:
        raise UserError("alpha", alpha, "a false-positive rate in (0, 1)")
    if not 0 <= minimum_cost < 1:
        raise UserError("minimum_cost", minimum_cost, "a share of the probability in [0, 1)")
    costs, usual = ({key: -effect for key, effect in change.units().items()} for change in (forget, retain))
    flags = []
    for kind in dict.fromkeys(site.kind for site in forget.sites):
        if kind == "mlp_up" and any(k == "mlp_gate" for _, k in costs):
            continue  # the same units
        keys = [site.key for site in forget.sites if site.kind == kind]
        on_retain = torch.cat([usual[key] for key in keys]).clamp(min=0).sort().values
        quantile = on_retain[math.ceil((1 - alpha) * (len(on_retain) - 1))].item()
        for key in keys:
            kinds = tuple(k for k in HIDDEN if (key[0], k) in costs) if kind in HIDDEN else (kind,)
            for index in (costs[key] > max(quantile, -math.log1p(-minimum_cost))).nonzero().flatten().tolist():
                flags.append(OwnFlag(key[0], kinds, index, costs[key][index].item()))
    return sorted(flags, key=lambda flag: -flag.cost)
