"""Own change of neurons: complete on every architecture, weights shared out by hand, units put back and taken away."""

from __future__ import annotations

import copy

import pytest
import torch
from confirming import confirmed, put_back
from torch import nn
from toys.models import EXPERTS, RECORDED, random_model

from lightning_ssiuu.attribution.weight_change import (
    OwnChange,
    OwnFlag,
    own_change,
    own_flags,
    site_weights,
)
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import NeuronSite, neuron_sites
from lightning_ssiuu.models.packing import padded
from lightning_ssiuu.utils.errors import UserError

IDS = torch.tensor([[5, 6, 7, 8], [9, 6, 3, 4], [2, 8, 8, 5]])
PART = {
    "input_ids": IDS,
    "attention_mask": torch.ones_like(IDS),
    "labels": torch.cat([torch.full((3, 2), -100), IDS[:, 2:]], 1),
}


def pair(architecture: str) -> tuple[AnswerModel, dict[str, torch.Tensor], AnswerModel]:
    """A random model, its weights, and the model with every site's weights moved."""
    # A token that changes its experts on the way is a jump, which no weight is given: all experts take part.
    options = {"num_experts_per_tok": 4} if architecture in EXPERTS else {}
    model = AnswerModel(random_model(architecture, torch.float64, **options))
    original = site_weights(model, neuron_sites(model.hf))
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for name in original:
        value = changed.hf.get_parameter(name).data
        value += 0.05 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return model, original, changed


def total(change: OwnChange) -> float:
    return sum(values.sum().item() for values in (*change.rows.values(), *change.columns.values()))


@pytest.mark.parametrize("architecture", RECORDED)
def test_all_effects_together_are_the_change_of_log_probability(architecture: str) -> None:
    model, original, changed = pair(architecture)
    sites = neuron_sites(model.hf)
    change = own_change(changed, original, [PART], sites, "sequence", points=12)
    with torch.no_grad():
        difference = (changed(**PART).logps - model(**PART).logps).mean().item()
    assert abs(difference) > 0.01
    assert total(change) == pytest.approx(difference, rel=0.02)  # of the midpoint rule
    # Units count every weight once, but for a hidden unit that has two neurons
    units = change.units()
    once = sum(values.sum().item() for (_, kind), values in units.items() if kind != "mlp_gate")
    assert once == pytest.approx(total(change), rel=1e-9)


def test_batches_are_averaged_over_examples_and_nothing_is_touched() -> None:
    model, original, changed = pair("llama")
    sites = neuron_sites(model.hf)
    before = {name: value.clone() for name, value in changed.state_dict().items()}
    whole = own_change(changed, original, [PART], sites, points=2)
    parts = [{name: value[rows] for name, value in PART.items()} for rows in (slice(0, 1), slice(1, 3))]
    split = own_change(changed, original, parts, sites, points=2)
    for key, values in whole.rows.items():
        torch.testing.assert_close(split.rows[key], values, rtol=1e-4, atol=1e-9)
    assert all(torch.equal(before[name], value) for name, value in changed.state_dict().items())
    assert all(p.grad is None for p in changed.parameters())
    assert whole.over_ranks() is whole


def test_a_writers_weight_counts_where_more_changed() -> None:
    model = AnswerModel(random_model("llama", torch.float64))
    sites = neuron_sites(model.hf)
    original = site_weights(model, sites)
    down = model.hf.model.layers[1].mlp.down_proj.weight.data
    down[:, 5] += 0.3
    column = own_change(model, original, [PART], sites, points=2)
    assert column.columns[1, "mlp_down"].nonzero().flatten().tolist() == [5]
    assert not column.rows[1, "mlp_down"].any()
    assert column.units()[1, "mlp_gate"].nonzero().flatten().tolist() == [5]
    down[3, :] += 0.3
    both = own_change(model, original, [PART], sites, points=2)
    assert both.rows[1, "mlp_down"].nonzero().flatten().tolist() == [3]
    assert both.columns[1, "mlp_down"].nonzero().flatten().tolist() == [5]


def test_value_channels_of_shared_heads_by_hand() -> None:
    # Two value heads of two channels, each read by two query heads: columns 0–3 read head 0, columns 4–7 head 1.
    sites = [NeuronSite("attn_v", 0, "v", 4), NeuronSite("attn_o", 0, "o", 3)]
    rows = {(0, "attn_v"): torch.tensor([0.0, 0.0, 0.5, 0.0]), (0, "attn_o"): torch.tensor([0.0, -9.0, 0.0])}
    columns = {(0, "attn_o"): torch.tensor([1.0, 2.0, 10.0, 20.0, 100.0, 200.0, 1000.0, 2000.0])}
    units = OwnChange(sites, rows, columns, head_size=2).units()
    assert units[0, "attn_v"].tolist() == [11.0, 22.0, 1100.5, 2200.0]
    assert units[0, "attn_o"].tolist() == [0.0, -9.0, 0.0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "phi3", "falcon", "falcon_mq"])
@pytest.mark.parametrize("kind", ["attn_q", "attn_v", "attn_o", "mlp_up", "mlp_down"])
def test_a_unit_is_put_back_and_nothing_else(architecture: str, kind: str) -> None:
    model, original, changed = pair(architecture)
    sites = neuron_sites(model.hf)
    kinds = ("mlp_gate", "mlp_up") if kind == "mlp_up" and architecture in ("llama", "phi3") else (kind,)
    flag = OwnFlag(1, kinds, 3, 0.0)
    with put_back(changed, original, flag, sites):
        same = sum(int((changed.hf.get_parameter(name) == value).sum()) for name, value in original.items())
    hidden, inner = 16, next(site.width for site in sites if site.kind == "mlp_up")
    groups = {"llama": 2, "phi3": 2, "falcon": 2, "falcon_mq": 4}.get(architecture, 1)
    bias = 0 if architecture in ("llama", "phi3") else 1
    expected = {
        "attn_q": hidden + bias,
        "attn_v": hidden + bias + groups * hidden,
        "attn_o": hidden + bias,
        "mlp_up": len(kinds) * (hidden + bias) + hidden,
        "mlp_down": inner + bias,
    }[kind]
    assert same == expected


def test_weights_return_after_an_exception() -> None:
    model, original, changed = pair("llama")
    before = {name: value.clone() for name, value in changed.state_dict().items()}
    flag = OwnFlag(0, ("attn_v",), 3, 0.0)

    def broken() -> None:
        with put_back(changed, original, flag, neuron_sites(model.hf)):
            assert not torch.equal(before["hf.model.layers.0.self_attn.v_proj.weight"], _value(changed))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert all(torch.equal(before[name], value) for name, value in changed.state_dict().items())


def _value(model: AnswerModel) -> torch.Tensor:
    return model.hf.model.layers[0].self_attn.v_proj.weight


def test_threshold_is_the_quantile_of_retain_for_the_kind() -> None:
    sites = [NeuronSite("attn_q", layer, "q", 1000) for layer in range(2)]
    generator = torch.Generator().manual_seed(0)

    def drawn() -> OwnChange:
        rows = {site.key: -torch.rand(1000, generator=generator).double() for site in sites}
        return OwnChange(sites, rows, {}, 1)

    forget, retain = drawn(), drawn()
    limit = torch.cat(list(retain.rows.values())).neg().quantile(0.9, interpolation="higher")
    flags = own_flags(forget, retain, alpha=0.1, minimum_cost=0.0)
    assert len(flags) == int((torch.cat(list(forget.rows.values())).neg() > limit).sum())
    assert len(flags) == pytest.approx(200, abs=60)
    assert flags[0].share == pytest.approx(1 - torch.tensor(-flags[0].cost).exp().item())
    few = own_flags(forget, retain, alpha=0.1, minimum_cost=0.62)  # of at most 1 − 1/e
    assert {(f.layer, f.index) for f in few} < {(f.layer, f.index) for f in flags}
    assert min(flag.share for flag in few) > 0.62


def test_a_hidden_unit_is_flagged_by_what_it_writes() -> None:
    sites = [NeuronSite("mlp_up", 0, "up", 3), NeuronSite("mlp_down", 0, "down", 2)]
    rows = {site.key: torch.zeros(site.width) for site in sites}
    changes = [OwnChange(sites, rows, {(0, "mlp_down"): torch.tensor([0, cost, 0])}, 1) for cost in (-0.5, -0.1)]
    assert own_flags(*changes) == [OwnFlag(0, ("mlp_up",), 1, 0.5)]


def test_sequences_that_begin_alike_change_nothing() -> None:
    model, original, changed = pair("llama")
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 4], [5, 6, 9, 1]])
    part = PART | {"input_ids": ids, "labels": torch.cat([torch.full((3, 2), -100), ids[:, 2:]], 1)}
    sites, seen = neuron_sites(model.hf), list[int]()
    changed.register_forward_hook(
        lambda module, *_: seen.append(0 if module.packing is None else len(module.packing.flat))
    )
    shared = own_change(changed, original, [part], sites, points=2)
    with padded(changed):
        apart = own_change(changed, original, [part], sites, points=2)
    assert seen == [4, 4, 0, 0]  # of 9: 5 6 7, and 9
    for ours, theirs in ((shared.rows, apart.rows), (shared.columns, apart.columns)):
        assert ours.keys() == theirs.keys()
        for key, values in ours.items():
            torch.testing.assert_close(values, theirs[key], rtol=1e-4, atol=1e-7)  # sums are kept in float32


def test_what_users_can_get_wrong() -> None:
    model, original, changed = pair("llama")
    sites = neuron_sites(model.hf)
    with pytest.raises(UserError, match="points"):
        own_change(changed, original, [PART], sites, points=0)
    with pytest.raises(UserError, match="parts"):
        own_change(changed, original, [], sites)
    with pytest.raises(UserError, match="original"):
        own_change(changed, {name: value[:1] for name, value in original.items()}, [PART], sites)
    change = own_change(changed, original, [PART], sites, points=1)
    for options, argument in (({"alpha": 0.0}, "alpha"), ({"minimum_cost": 1.0}, "minimum_cost")):
        with pytest.raises(UserError, match=argument):
            own_flags(change, change, **options)
    assert confirmed(changed, original, [], [PART], sites) == []
    model.hf.model.layers[0].mlp.up_proj = nn.Sequential(model.hf.model.layers[0].mlp.up_proj)
    with pytest.raises(UserError, match="merge adapters"):
        site_weights(model, sites)
