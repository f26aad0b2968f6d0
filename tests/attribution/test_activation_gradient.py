"""Neuron attribution (arXiv 2509.22263, Eq. 1): by hand, by central differences, and what it must leave alone."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.attribution import Broken, hooks, mixed_modes, scaled
from toys.models import RECORDED, answer_model, part

from lightning_ssiuu.attribution.activation_gradient import NeuronAttribution, neuron_attribution
from lightning_ssiuu.models.answers import Answers, input_positions
from lightning_ssiuu.models.architectures import KINDS, NeuronSite, neuron_sites, select_sites
from lightning_ssiuu.utils.errors import UserError

# ---- by hand -----------------------------------------------------------------------------------------------------


class Summing(nn.Module):
    """Token k gives h[k] = (2 e_k, -e_k); the answer's logit is c · (sum of h up to the token before it), against 0."""

    packing = None

    def __init__(self, c: tuple[float, float]) -> None:
        super().__init__()
        self.hf = nn.Module()
        self.hf.embed = nn.Embedding(5, 1)
        self.hf.embed.weight.data = torch.tensor([[0.0], [1.0], [-0.5], [0.25], [100.0]])
        self.hf.linear = nn.Linear(1, 2, bias=False)
        self.hf.linear.weight.data = torch.tensor([[2.0], [-1.0]])
        self.hf.get_input_embeddings = lambda: self.hf.embed
        self.c = torch.tensor(c)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Answers:
        summed = self.hf.linear(self.hf.embed(input_ids)).cumsum(1) @ self.c
        rows, position = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        z = summed[rows, position]
        return Answers(torch.stack([z, z * 0], -1), torch.zeros_like(rows), rows, len(labels))


HAND = {
    # token 4 is what must not count: the answer itself and padding, whose activation is a hundred times the others'
    "input_ids": torch.tensor([[1, 2, 3, 4], [2, 4, 4, 4]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    "labels": torch.tensor([[-100, -100, -100, 0], [-100, 0, -100, -100]]),
}


def test_closed_form() -> None:
    c = (0.3, 0.8)
    result = neuron_attribution(Summing(c), [HAND], [NeuronSite("mlp_up", 0, "linear", 2)])  # type: ignore[arg-type]
    # z = (2 c0 − c1) Σ e; P = σ(z); A[i, k] = h[i, k] c_i P (1 − P)
    p = [1 / (1 + math.exp(-(2 * 0.3 - 0.8) * e)) for e in (1 - 0.5 + 0.25, -0.5)]
    d = [x * (1 - x) for x in p]
    first = [[0.6 * d[0], -0.3 * d[0], 0.15 * d[0]], [-0.8 * d[0], 0.4 * d[0], -0.2 * d[0]]]
    second = [[-0.3 * d[1]], [0.4 * d[1]]]
    expected = [
        [max(first[i]) + max(second[i]) for i in range(2)],
        [max(*first[i], 0) + max(*second[i], 0) for i in range(2)],
        [min(first[i]) + min(second[i]) for i in range(2)],
    ]
    for got, want in zip((result.maximum, result.positive, result.minimum), expected, strict=True):
        assert got.tolist() == pytest.approx(want, rel=1e-5)
    assert result.n_examples == 2
    assert result.log_probabilities == pytest.approx([math.log(x) for x in p], rel=1e-5)
    assert result.mean_maximum.tolist() == pytest.approx([x / 2 for x in expected[0]], rel=1e-5)
    assert result.mean_positive.tolist() == pytest.approx([x / 2 for x in expected[1]], rel=1e-5)
    assert result.mean_minimum.tolist() == pytest.approx([x / 2 for x in expected[2]], rel=1e-5)


def test_input_positions() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100, 5, -100, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    assert input_positions(mask, labels).tolist() == [[True, True, True, False, False], [True] + [False] * 4]


# ---- central differences -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sequence", "length_normalised"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3", "gemma3_text", "phi3", "falcon", "falcon_mq"])
def test_central_differences(name: str, target: Any) -> None:
    model, one = answer_model(name), part([(4, 2)], 3)
    tensors = {k: one[k] for k in ("input_ids", "attention_mask", "labels")}
    sites = neuron_sites(model.hf)
    assert {site.kind for site in sites} == set(KINDS) - ({"mlp_gate"} if name[:3] in ("gpt", "fal") else set())
    result = neuron_attribution(model, [one], sites, target)
    maxima, minima = result.by_site(result.maximum), result.by_site(result.minimum)
    eps = 1e-4
    for site, neuron in ((s, n) for s in sites for n in (0, s.width // 2 + 1, s.width - 1)):
        by_token = []
        for token in range(5):
            values = []
            for sign in (1, -1):
                with scaled(model, site, neuron, token, 1 + sign * eps), torch.no_grad():
                    answers = model(**tensors)
                    logp = answers.logps if target == "sequence" else answers.logps / 2
                    values.append(logp.exp().item())
            by_token.append((values[0] - values[1]) / (2 * eps))
        size = max(map(abs, by_token)) + 1e-9
        assert maxima[site.key][neuron].item() == pytest.approx(max(by_token), abs=1e-5 * size), site
        assert minima[site.key][neuron].item() == pytest.approx(min(by_token), abs=1e-5 * size), site


@pytest.mark.parametrize("name", RECORDED)
def test_a_batch_with_padding_equals_its_examples_alone(name: str) -> None:
    model = answer_model(name)
    sites = neuron_sites(model.hf)
    both = part([(3, 5), (2, 1)], 1)
    alone = [
        {k: v[row : row + 1, :length] for k, v in both.items() if k != "example_id"} for row, length in ((0, 8), (1, 3))
    ]
    a, b = neuron_attribution(model, [both], sites), neuron_attribution(model, alone, sites)
    # the attention of some architectures computes its softmax in float32
    for left, right in ((a.maximum, b.maximum), (a.positive, b.positive), (a.minimum, b.minimum)):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-9 * right.abs().max().item())
    assert a.n_examples == b.n_examples == 2
    assert a.log_probabilities == pytest.approx(b.log_probabilities, rel=1e-6)


def test_a_tiny_probability_scales_and_does_not_vanish() -> None:
    model, one = answer_model(dtype=torch.float32), part([(3, 60)])
    result = neuron_attribution(model, [one], neuron_sites(model.hf))
    assert result.log_probabilities[0] < -150  # no float32
    assert 0 < result.maximum.max() < 1e-60
    assert (result.maximum != 0).double().mean() > 0.99


# ---- fused projections -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "falcon", "falcon_mq", "falcon_rw"])
def test_fused_sites_cut_the_shared_output(name: str) -> None:
    model, one = answer_model(name), part([(3, 2), (4, 1)])
    sites = neuron_sites(model.hf)
    sites = [site for site in sites if site.kind.startswith("attn")]
    width = sum(s.width for s in sites if s.layer == 0 and s.columns is not None)
    assert width == model.hf.get_submodule(sites[0].module_name).weight.numel() // 16
    queries = [s.module_name for s in sites if s.kind == "attn_q"]
    whole = [NeuronSite("attn_q", layer, name, width) for layer, name in enumerate(queries)]
    uncut = neuron_attribution(model, [one], whole)
    cut = neuron_attribution(model, [one], sites)
    for site in (s for s in sites if s.columns is not None):
        for field in ("maximum", "minimum"):
            expected = uncut.by_site(getattr(uncut, field))[site.layer, "attn_q"][site.columns]
            assert torch.equal(cut.by_site(getattr(cut, field))[site.key], expected)
    for layer in range(2):
        columns = torch.cat([s.columns for s in sites if s.layer == layer and s.columns is not None])
        assert sorted(columns.tolist()) == list(range(width))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_what_the_neurons_of_q_k_v_do_in_the_attention(name: str) -> None:
    """A query neuron of head h at token t changes row t of head h's weights, a key neuron column t, a value none."""
    model, ids, token, head_dim = answer_model(name, num_key_value_heads=4), torch.arange(3, 9)[None], 3, 4
    model.hf.set_attn_implementation("eager")

    def attention() -> Tensor:
        with torch.no_grad():
            return model.hf(input_ids=ids, output_attentions=True).attentions[0][0]

    usual = attention()
    for kind, neuron in itertools.product(("attn_q", "attn_k", "attn_v"), (0, 5, 15)):
        (site,) = select_sites(neuron_sites(model.hf), [f"layer0.{kind}"])
        with scaled(model, site, neuron, token, 5.0):
            changed = (attention() - usual).abs() > 1e-9
        expected = torch.zeros_like(changed)
        if kind == "attn_q":
            expected[neuron // head_dim, token, : token + 1] = True
        elif kind == "attn_k":
            # a row with one key more or less is normalised anew, as a whole
            for row in range(token, 6):
                expected[neuron // head_dim, row, : row + 1] = True
        assert torch.equal(changed, expected), (kind, neuron)


# ---- what it must leave alone ------------------------------------------------------------------------------------


def test_frozen_parameters_gradients_hooks_and_modes() -> None:
    model, one = answer_model(attention_dropout=0.5), part([(3, 2)])
    sites = neuron_sites(model.hf)
    expected = neuron_attribution(model.eval(), [one], sites)
    grads = []
    for number, p in enumerate(model.parameters()):
        p.grad = torch.randn_like(p) if number % 2 else None
        grads.append((p.grad, None if p.grad is None else p.grad.clone()))
    modes = mixed_modes(model)
    with torch.no_grad():
        free = neuron_attribution(model, [one], sites)
    assert modes == [module.training for module in model.modules()]
    for p, (grad, value) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, value)
    model.requires_grad_(False)
    frozen = neuron_attribution(model, [one], sites)
    assert hooks(model) == 0
    for other in (free, frozen):
        assert torch.equal(other.maximum, expected.maximum)
        assert torch.equal(other.minimum, expected.minimum)


@pytest.mark.parametrize("backward", [False, True])
def test_exceptions_leave_nothing_behind(backward: bool) -> None:
    model, one = answer_model(), part([(3, 2)])
    sites = neuron_sites(model.hf)
    model.hf.model.layers[1].mlp = Broken(model.hf.model.layers[1].mlp, backward)
    inside = [site for site in sites if site.key not in {(1, k) for k in ("mlp_gate", "mlp_up", "mlp_down")}]
    modes = mixed_modes(model)
    with pytest.raises(ZeroDivisionError):
        neuron_attribution(model, [one], inside)
    assert hooks(model) == 0
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_errors() -> None:
    model, one = answer_model(), part([(3, 2)])
    with pytest.raises(UserError, match="target"):
        neuron_attribution(model, [one], neuron_sites(model.hf), "token")  # type: ignore[arg-type]
    assert hooks(model) == 0


def test_nothing_seen() -> None:
    empty = NeuronAttribution.empty([NeuronSite("mlp_up", 0, "up", 3)])
    assert empty.mean_maximum.tolist() == [0, 0, 0]
    assert empty.over_ranks() is empty


def test_activations_are_freed_without_the_garbage_collector() -> None:
    model, one = answer_model(), part([(3, 2), (4, 3)])
    sites, alive = neuron_sites(model.hf), []
    handles = [
        model.hf.get_submodule(site.module_name).register_forward_hook(
            lambda _module, _args, output: alive.append(weakref.ref(output))
        )
        for site in sites
    ]
    gc.collect()
    gc.disable()
    try:
        neuron_attribution(model, [one], sites)
        assert len(alive) == len(sites)
        assert [ref() for ref in alive if ref() is not None] == []
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()
