"""Methods from activations alone: the values by hand, in any batches, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from toys.attribution import Broken, hooks, mixed_modes
from toys.models import answer_model, part

from lightning_ssiuu.attribution.activations import from_activations
from lightning_ssiuu.attribution.methods import attribution_method
from lightning_ssiuu.attribution.micro_batches import pass_bytes
from lightning_ssiuu.models.answers import input_positions
from lightning_ssiuu.models.architectures import neuron_sites
from lightning_ssiuu.models.packing import padded

BATCH = part([(4, 2), (7, 1), (2, 3)], 3)


@from_activations
def mean_absolute(values: Tensor, counted: Tensor) -> Tensor:
    return (values.abs() * counted).sum(1) / counted.sum(1)


@from_activations
def itself(values: Tensor, counted: Tensor) -> Tensor:
    return values


def seen_by_hooks(model: Any, sites: Any) -> dict[tuple[int, str], Tensor]:
    seen: dict[tuple[int, str], Tensor] = {}

    def keep(site: Any, _module: object, _args: object, output: Tensor) -> None:
        seen[site.key] = site.select(output)

    handles = [model.hf.get_submodule(s.module_name).register_forward_hook(partial(keep, s)) for s in sites]
    with torch.no_grad(), padded(model):
        model.eval()(BATCH["input_ids"], BATCH["attention_mask"], BATCH["labels"])
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_by_hand(name: str) -> None:
    model = answer_model(name)
    sites = neuron_sites(model.hf)
    counted = input_positions(BATCH["attention_mask"], BATCH["labels"])
    means, extreme = mean_absolute(model, [BATCH], sites), itself(model, [BATCH], sites)
    assert means.n_examples == extreme.n_examples == 3
    for key, values in seen_by_hooks(model, sites).items():
        rows = [example[inside].double() for example, inside in zip(values, counted, strict=True)]
        for found in (means.maximum, means.minimum, means.positive):
            torch.testing.assert_close(means.by_site(found)[key], sum(row.abs().mean(0) for row in rows))
        torch.testing.assert_close(extreme.by_site(extreme.maximum)[key], sum(row.amax(0) for row in rows))
        torch.testing.assert_close(extreme.by_site(extreme.minimum)[key], sum(row.amin(0) for row in rows))


def test_a_path_is_given_target_and_budget() -> None:
    model = answer_model()
    sites = neuron_sites(model.hf)
    method: Callable[..., Any] = attribution_method(f"{__name__}.mean_absolute", "length_normalised", "1GB")
    assert method.keywords == {"target": "length_normalised", "memory_budget": 10**9}  # type: ignore[attr-defined]
    whole = method(model, [BATCH], sites)
    cut = mean_absolute(model, [BATCH], sites, memory_budget=pass_bytes(model.hf, sites, 1, 8, 3))
    torch.testing.assert_close(cut.maximum, whole.maximum)
    assert max(whole.log_probabilities) > max(cut.log_probabilities)  # P^{1/T} against P


@pytest.mark.parametrize("broken", [False, True])
def test_nothing_is_left_behind(broken: bool) -> None:
    model = answer_model()
    sites = [site for site in neuron_sites(model.hf) if site.layer == 0]
    if broken:
        model.hf.model.layers[1].mlp = Broken(model.hf.model.layers[1].mlp, backward=False)
    modes = mixed_modes(model)
    if broken:
        with pytest.raises(ZeroDivisionError):
            mean_absolute(model, [BATCH], sites)
    else:
        mean_absolute(model, [BATCH], sites)
    assert hooks(model) == 0
    assert modes == [module.training for module in model.modules()]
