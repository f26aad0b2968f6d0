"""Neuron attribution: activation × gradient of the answer's probability, for all sites from one backward pass.

Source: arXiv 2509.22263, Eq. 1 and Sec. 3. ``A[i, k] = h[i, k] · ∂P(y|x)/∂h[i, k]`` for neuron i at input token k. Per
example the positive influence of a neuron is its maximum over tokens, the negative influence its minimum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_ssiuu.errors import UserError
from lightning_ssiuu.functional.losses import Answers
from lightning_ssiuu.models import AnswerModel, evaluation_mode
from lightning_ssiuu.ranks import gathered, world_size
from lightning_ssiuu.sites import NeuronSite

Target = Literal["sequence", "length_normalised", "log_probability"]
TARGETS: tuple[Target, ...] = ("sequence", "length_normalised", "log_probability")


def target_logps(answers: Answers, target: Target) -> Tensor:
    """Log of the probability that is attributed: ``[B]`` values in nats.

    Every attribution of P carries the factor P. Where unlearning has pushed P to almost nothing, all attributions
    are almost nothing, negative ones included: D⁻ then vanishes although nothing was erased. ``"log_probability"`` has
    no such factor, but its gradient grows as P falls, also for a model that never knew the answer.

    Args:
        answers: A forward pass.
        target: ``"sequence"`` for P(y|x), the paper's; ``"length_normalised"`` for P(y|x)^{1/T}, T the number of answer
            tokens, comparable between lengths; ``"log_probability"`` for log P(y|x) / T.

    Raises:
        UserError: If the target is unknown.

    Example:
        >>> answers = Answers(torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor([0, 0]), 1)
        >>> target_logps(answers, "sequence").exp(), target_logps(answers, "length_normalised").exp()
        (tensor([0.0625]), tensor([0.2500]))
    """
    if target not in TARGETS:
        raise UserError("target", target, f"one of {list(TARGETS)}")
    return answers.logps if target == "sequence" else answers.mean_logps


@dataclass
class NeuronAttribution:
    """Attributions of all neurons, aggregated over examples as they stream by.

    The influence variation needs three means per neuron, nothing per example, so memory does not grow with the data.
    Vectors are float64, concatenated over sites in the order of ``sites``.

    Args:
        sites: Where the neurons are.
        maximum: ``[n_neurons]`` sum over examples of max_k A.
        positive: ``[n_neurons]`` sum over examples of max(max_k A, 0).
        minimum: ``[n_neurons]`` sum over examples of min_k A.
        n_examples: Number of examples seen.
        log_probabilities: The target's log-probability of each example (nats).

    Example:
        >>> site = NeuronSite("mlp_up", 0, "up", 2)
        >>> attribution = NeuronAttribution.empty([site])
        >>> attribution.add({site.key: torch.tensor([[1.0, -2.0]])}, {site.key: torch.tensor([[0.5, -3.0]])})
        >>> attribution.mean_maximum, attribution.mean_positive
        (tensor([ 1., -2.], dtype=torch.float64), tensor([1., 0.], dtype=torch.float64))
    """

    sites: Sequence[NeuronSite]
    maximum: Tensor
    positive: Tensor
    minimum: Tensor
    n_examples: int = 0
    log_probabilities: list[float] = field(default_factory=list)

    @classmethod
    def empty(cls, sites: Sequence[NeuronSite]) -> NeuronAttribution:
        """Nothing seen yet."""
        zeros = torch.zeros(sum(site.width for site in sites), dtype=torch.float64)
        return cls(sites, zeros.clone(), zeros.clone(), zeros.clone())

    def add(self, maxima: Mapping[tuple[int, str], Tensor], minima: Mapping[tuple[int, str], Tensor]) -> None:
        """Add a batch: per site ``[B, width]`` maxima and minima over tokens."""
        high = torch.cat([maxima[site.key].double().cpu() for site in self.sites], dim=1)
        low = torch.cat([minima[site.key].double().cpu() for site in self.sites], dim=1)
        self.maximum += high.sum(0)
        self.positive += high.clamp(min=0).sum(0)
        self.minimum += low.sum(0)
        self.n_examples += len(high)

    @property
    def mean_maximum(self) -> Tensor:
        """``[n_neurons]`` mean over examples of max_k A."""
        return self.maximum / max(self.n_examples, 1)

    @property
    def mean_positive(self) -> Tensor:
        """``[n_neurons]`` mean over examples of max(max_k A, 0)."""
        return self.positive / max(self.n_examples, 1)

    @property
    def mean_minimum(self) -> Tensor:
        """``[n_neurons]`` mean over examples of min_k A."""
        return self.minimum / max(self.n_examples, 1)

    def over_ranks(self) -> NeuronAttribution:
        """The same with the examples of all ranks, when there are several (each rank must call it)."""
        if world_size() == 1:
            return self
        shares = gathered((self.maximum, self.positive, self.minimum, self.n_examples))
        total = NeuronAttribution(self.sites, *(sum(values) for values in zip(*shares, strict=True)))
        total.log_probabilities = [value for share in gathered(self.log_probabilities) for value in share]
        return total

    def by_site(self, values: Tensor) -> dict[tuple[int, str], Tensor]:
        """Cut a ``[n_neurons]`` vector into the sites' parts."""
        return dict(zip([s.key for s in self.sites], values.split([s.width for s in self.sites]), strict=True))


#: Signature of an attribution method: model, batches (parts of a batch) and sites in, aggregated attributions out.
AttributionMethod = Callable[[AnswerModel, Iterable[Mapping[str, Tensor]], Sequence[NeuronSite]], NeuronAttribution]


def neuron_attribution(
    model: AnswerModel,
    parts: Iterable[Mapping[str, Tensor]],
    sites: Sequence[NeuronSite],
    target: Target = "sequence",
) -> NeuronAttribution:
    """Attribute the answers' probability to every neuron (arXiv 2509.22263, Eq. 1): one forward, one backward a batch.

    ∂P/∂h is taken as P · ∂log P/∂h, with P applied last, per example, so that a tiny P scales and never underflows
    inside the backward pass. Tokens that are no input to a prediction (the last answer token, padding) do not count.
    The model's ``.grad`` fields, mode and hooks are as before on return, also after an exception.

    Args:
        model: The model; its parameters need not require gradients.
        parts: Batches of ``input_ids, attention_mask, labels``, each ``[B, L]``.
        sites: From :func:`lightning_ssiuu.sites.neuron_sites`.
        target: See :func:`target_logps`.

    Returns:
        Aggregates in units of probability (P is in [0, 1]), or of nats per token for ``"log_probability"``; positive
        values push the answer up.

    Example:
        >>> from lightning_ssiuu.models import load_model
        >>> from lightning_ssiuu.sites import neuron_sites
        >>> model = AnswerModel(load_model("tiny"))
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> part = {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": torch.tensor([[-100, -100, 7, 8]])}
        >>> attribution = neuron_attribution(model, [part], neuron_sites(model.hf))
        >>> attribution.n_examples, bool((attribution.maximum >= attribution.minimum).all())
        (1, True)
    """
    result = NeuronAttribution.empty(sites)
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for part in parts:
            tensors = {name: part[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
            _attribute_batch(model, tensors, sites, target, result)
    return result


def input_positions(attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Which tokens are inputs to the prediction of some answer token: ``[B, L]`` bool.

    Example:
        >>> input_positions(torch.tensor([[1, 1, 1, 0]]), torch.tensor([[-100, -100, 7, -100]]))
        tensor([[ True,  True, False, False]])
    """
    answer_follows = (labels[:, 1:] != -100).flip(1).cumsum(1).flip(1) > 0
    inside = torch.cat([answer_follows, torch.zeros_like(answer_follows[:, :1])], dim=1)
    return inside & attention_mask.bool()


def _attribute_batch(
    model: AnswerModel,
    part: Mapping[str, Tensor],
    sites: Sequence[NeuronSite],
    target: Target,
    result: NeuronAttribution,
) -> None:
    outside = ~input_positions(part["attention_mask"], part["labels"])
    maxima: dict[tuple[int, str], Tensor] = {}
    minima: dict[tuple[int, str], Tensor] = {}

    def reduce_tokens(site: NeuronSite, activation: Tensor, gradient: Tensor) -> None:
        # Runs inside the backward pass, so that an activation's gradient lives no longer than its own step.
        wide = torch.promote_types(activation.dtype, torch.float32)
        product = site.select(activation.detach()).to(wide) * site.select(gradient).to(wide)
        hidden = outside.unsqueeze(-1)
        maxima[site.key] = product.masked_fill(hidden, -torch.inf).amax(1)
        minima[site.key] = product.masked_fill(hidden, torch.inf).amin(1)

    with torch.enable_grad(), _captured(model, sites, reduce_tokens) as start:
        answers = model(**part)
        logps = target_logps(answers, target)
        # Examples do not interact, so the gradient of the sum holds each example's own gradient. Asking for the
        # embeddings' gradient alone leaves the parameters out of the graph walk: no .grad is touched.
        torch.autograd.grad(logps.sum(), start)
    logps = logps.detach().double()
    factor = (torch.ones_like(logps) if target == "log_probability" else logps.exp()).unsqueeze(-1)
    result.add(
        {key: value.double() * factor for key, value in maxima.items()},
        {key: value.double() * factor for key, value in minima.items()},
    )
    result.log_probabilities += logps.tolist()


@contextmanager
def _captured(
    model: AnswerModel,
    sites: Sequence[NeuronSite],
    reduce_tokens: Callable[[NeuronSite, Tensor, Tensor], None],
) -> Iterator[list[Tensor]]:
    """Hooks on embeddings and sites for one pass; yields the list that will hold the embeddings' output."""
    start: list[Tensor] = []
    handles = []
    by_module: dict[str, list[NeuronSite]] = {}
    for site in sites:
        by_module.setdefault(site.module_name, []).append(site)

    def begin(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_(True)
        start.append(leaf)
        return leaf

    def watch(module_sites: list[NeuronSite]) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
            # Detached: a hook that held its own tensor would keep it, and the graph behind it, alive for ever.
            activation = output.detach()

            def on_gradient(gradient: Tensor) -> None:
                for site in module_sites:
                    reduce_tokens(site, activation, gradient)

            output.register_hook(on_gradient)

        return hook

    try:
        handles.append(model.hf.get_input_embeddings().register_forward_hook(begin))
        for name, module_sites in by_module.items():
            handles.append(model.hf.get_submodule(name).register_forward_hook(watch(module_sites)))
        yield start
    finally:
        for handle in handles:
            handle.remove()
