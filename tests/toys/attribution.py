"""What the tests of several attribution methods share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_ssiuu.attribution.activation_gradient import captured
from lightning_ssiuu.attribution.aggregation import NeuronAttribution
from lightning_ssiuu.attribution.integrated_gradients import Path, _along_path, _groups, _nodes
from lightning_ssiuu.models.answers import AnswerModel, Target, target_logps
from lightning_ssiuu.models.architectures import NeuronSite
from lightning_ssiuu.models.loading import evaluation_mode


def add(
    result: NeuronAttribution,
    maxima: Mapping[tuple[int, str], Tensor],
    minima: Mapping[tuple[int, str], Tensor],
    logs: Tensor | None = None,
) -> None:
    """Add a batch of ``[B, width]`` values per site, with the ``[B]`` logarithms of the examples' factors (None: 0)."""
    n_examples = len(maxima[result.sites[0].key])
    factors = result.factors(torch.zeros(n_examples) if logs is None else logs)
    for site in result.sites:
        result.add_site(site, maxima[site.key], minima[site.key], factors)
    result.n_examples += n_examples


@contextmanager
def scaled(model: AnswerModel, site: NeuronSite, neuron: int, token: int, factor: float) -> Iterator[None]:
    """Multiply one neuron's activation at one token."""
    column = neuron if site.columns is None else int(site.columns[neuron])

    def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, token, column] *= factor
        return output

    handle = model.hf.get_submodule(site.module_name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def hooks(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def mixed_modes(model: nn.Module) -> list[bool]:
    """Evaluation here, training there: as after freezing one block's dropout."""
    model.train()
    model.hf.model.layers[0].eval()
    return [module.training for module in model.modules()]


class Broken(nn.Module):
    """Fails in the forward or in the backward pass."""

    def __init__(self, inner: nn.Module, backward: bool) -> None:
        super().__init__()
        self.inner, self.backward = inner, backward

    def forward(self, x: Tensor) -> Tensor:
        if not self.backward:
            raise ZeroDivisionError
        out = self.inner(x)
        out.register_hook(self.fail)
        return out

    def fail(self, gradient: Tensor) -> None:
        raise ZeroDivisionError


@dataclass(frozen=True)
class Completeness:
    """Whether attributions add up to what they explain, for one path.

    Args:
        sites: Whose activations the path scales.
        attributed: ``[B]`` sum of A over their neurons and all tokens.
        difference: ``[B]`` F(x) − F(their activations set to zero).
    """

    sites: Sequence[NeuronSite]
    attributed: Tensor
    difference: Tensor

    @property
    def error(self) -> float:
        """Largest gap of an example, in units of F."""
        return (self.attributed - self.difference).abs().max().item()


def completeness(
    model: AnswerModel,
    part: Mapping[str, Tensor],
    sites: Sequence[NeuronSite],
    target: Target = "sequence",
    steps: int = 16,
    path: Path = "site",
) -> list[Completeness]:
    """Check what :func:`integrated_gradients` promises: one entry per site, or one for all under ``path="joint"``."""
    nodes = _nodes(steps)
    part = {name: part[name] for name in ("input_ids", "attention_mask", "labels")}
    checks = []
    with evaluation_mode(model):
        whole = _value(model, part, [], target, 1.0)
        for group in _groups(sites, path):
            values, logs = _along_path(model, part, group, target, nodes)
            total = sum(value.double().sum((1, 2)) for value in values.values()) * logs.exp()
            checks.append(Completeness(group, total, whole - _value(model, part, group, target, 0.0)))
    return checks


def _value(
    model: AnswerModel, part: Mapping[str, Tensor], sites: Sequence[NeuronSite], target: Target, scale: float
) -> Tensor:
    """``[B]`` F with the sites' activations scaled, float64."""
    with torch.enable_grad(), captured(model, sites, lambda *_: None, scale):
        logps = target_logps(model(**part), target).detach().double()
    return logps if target == "log_probability" else logps.exp()
