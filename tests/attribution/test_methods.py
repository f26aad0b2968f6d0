"""Further attribution methods: against the definition, against Captum, complete where they promise it, tidy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from toys.attribution import Broken, completeness, hooks, mixed_modes, scaled
from toys.cli import ROOT
from toys.models import answer_model, part

from lightning_ssiuu.attribution.ablation import ablation_attribution
from lightning_ssiuu.attribution.activation_gradient import NeuronAttribution, neuron_attribution
from lightning_ssiuu.attribution.integrated_gradients import integrated_gradients
from lightning_ssiuu.attribution.methods import METHODS, attribution_method
from lightning_ssiuu.attribution.micro_batches import pass_bytes
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import NeuronSite, neuron_sites, select_sites
from lightning_ssiuu.models.packing import padded
from lightning_ssiuu.utils.errors import UserError

BATCH = part([(4, 2), (3, 1)], 3)


@pytest.fixture(scope="module")
def llama() -> AnswerModel:
    return answer_model()


def few(model: AnswerModel) -> list[NeuronSite]:
    return select_sites(neuron_sites(model.hf), ["layer0.attn_k", "layer0.mlp_up", "layer1.attn_v", "layer1.mlp_down"])


def probability(model: AnswerModel, one: Any, target: str = "sequence") -> Tensor:
    with torch.no_grad(), padded(model):
        answers = model(*(one[name] for name in ("input_ids", "attention_mask", "labels")))
    return answers.logps.exp() if target == "sequence" else answers.mean_logps


# ---- integrated gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target", "path"),
    [
        ("llama", "sequence", "site"),
        ("llama", "sequence", "joint"),
        ("gpt2", "sequence", "site"),
        ("gpt2", "log_probability", "joint"),
    ],
)
def test_integrated_gradients_are_complete(name: str, target: Any, path: Any) -> None:
    model = answer_model(name)
    sites = few(model)
    checks = completeness(model, BATCH, sites, target, steps=24, path=path)
    assert [list(check.sites) for check in checks] == ([[site] for site in sites] if path == "site" else [sites])
    for check in checks:
        assert check.difference.abs().min() > 0
        torch.testing.assert_close(check.attributed, check.difference, rtol=1e-4, atol=1e-9)
        assert check.error <= 1e-4 * check.difference.abs().max() + 1e-9
    (one,) = completeness(model, BATCH, sites[-1:], target, steps=24)
    module = model.hf.get_submodule(sites[-1].module_name)
    handle = module.register_forward_hook(lambda _module, _args, output: output * 0)
    try:
        zero = probability(model, BATCH, target)
    finally:
        handle.remove()
    torch.testing.assert_close(one.difference, probability(model, BATCH, target) - zero, rtol=1e-9, atol=1e-12)


def test_few_steps_are_less_complete(llama: AnswerModel) -> None:
    errors = [sum(c.error for c in completeness(llama, BATCH, few(llama), steps=steps)) for steps in (1, 4, 12)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_integrated_gradients_of_a_long_answer() -> None:
    """P(x) is no float32 and differs by orders of magnitude along the path."""
    model, one = answer_model(), part([(3, 60)])
    (check,) = completeness(model, one, select_sites(neuron_sites(model.hf), ["layer1.mlp_down"]), steps=64)
    assert 0 < check.difference.abs().max() < 1e-60
    torch.testing.assert_close(check.attributed / check.difference, torch.ones(1).double(), rtol=1e-3, atol=0)


def test_one_step_in_the_middle_is_a_gradient_there(llama: AnswerModel) -> None:
    """One Gauss-Legendre step is α = 1/2; of a site whose α changes nothing downstream but linearly, it is exact."""
    (site,) = select_sites(neuron_sites(llama.hf), ["layer0.mlp_up"])
    module = llama.hf.get_submodule(site.module_name)
    handle = module.register_forward_hook(lambda _module, _args, output: output * 0.5)
    try:
        expected = neuron_attribution(llama, [BATCH], [site])  # of h/2, hence half of h's
    finally:
        handle.remove()
    got = integrated_gradients(llama, [BATCH], [site], steps=1)
    torch.testing.assert_close(got.maximum, 2 * expected.maximum)
    torch.testing.assert_close(got.minimum, 2 * expected.minimum)


def test_joint_path_of_one_site_is_its_own(llama: AnswerModel) -> None:
    sites = few(llama)[:1]
    own, joint = (integrated_gradients(llama, [BATCH], sites, steps=5, path=path) for path in ("site", "joint"))
    assert torch.equal(own.maximum, joint.maximum)
    two = METHODS["joint_integrated_gradients"](llama, [BATCH], few(llama)[:2], steps=5)
    assert not torch.allclose(two.by_site(two.maximum)[sites[0].key], own.maximum, rtol=1e-3)


# ---- ablation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["all", "each"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ablation_by_hand(name: str, tokens: Any) -> None:
    model, one = answer_model(name), part([(4, 2)], 3)
    sites = few(model)
    result = ablation_attribution(model, [one], sites, tokens=tokens, rows=7)
    maxima, minima = result.by_site(result.maximum), result.by_site(result.minimum)
    whole = probability(model, one).item()
    for site in sites:
        for neuron in (0, 5, site.width - 1):
            lost = []
            for positions in [range(6)] if tokens == "all" else [[k] for k in range(5)]:
                stack = [scaled(model, site, neuron, k, 0.0) for k in positions]
                for zeroed in stack:
                    zeroed.__enter__()
                lost.append(whole - probability(model, one).item())
                for zeroed in reversed(stack):
                    zeroed.__exit__(None, None, None)
            assert maxima[site.key][neuron].item() == pytest.approx(max(lost), rel=1e-9, abs=1e-15)
            assert minima[site.key][neuron].item() == pytest.approx(min(lost), rel=1e-9, abs=1e-15)
    assert result.log_probabilities == pytest.approx([math.log(whole)])


def test_ablation_of_the_logarithm(llama: AnswerModel) -> None:
    one, (site, *_) = part([(4, 2)], 3), few(llama)
    result = ablation_attribution(llama, [one], [site], "log_probability")
    before = probability(llama, one, "log").item()
    handle = llama.hf.get_submodule(site.module_name).register_forward_hook(
        lambda _module, _args, output: output.index_fill(-1, torch.tensor([3]), 0.0)
    )
    try:
        after = probability(llama, one, "log").item()
    finally:
        handle.remove()
    assert result.maximum[3].item() == pytest.approx(before - after, rel=1e-9)


def test_gradient_is_the_first_order_of_ablation_of_small_neurons() -> None:
    """Where activations are small, the answer is nearly linear in them and the methods agree."""
    model, one = answer_model(), part([(4, 2)], 3)
    sites = select_sites(neuron_sites(model.hf), ["layer1.mlp_down"])
    model.hf.get_submodule(sites[0].module_name).weight.data *= 1e-4
    by_gradient = neuron_attribution(model, [one], sites)
    for result in (ablation_attribution(model, [one], sites, tokens="each"), integrated_gradients(model, [one], sites)):
        torch.testing.assert_close(result.maximum, by_gradient.maximum, rtol=1e-2, atol=1e-12)
        torch.testing.assert_close(result.minimum, by_gradient.minimum, rtol=1e-2, atol=1e-12)


def test_ablation_of_a_long_answer() -> None:
    model, one = answer_model(dtype=torch.float32), part([(3, 60)])
    result = ablation_attribution(model, [one], few(model)[:1])
    assert (result.maximum != 0).all()
    assert result.maximum.abs().max() < 1e-60


# ---- all of them -------------------------------------------------------------------------------------------------

#: As the registry has them, made quick.
QUICK: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"steps": 3},
    "joint_integrated_gradients": {"steps": 3},
}


def method(name: str, **kwargs: Any) -> Callable[..., NeuronAttribution]:
    return partial(METHODS[name], **QUICK.get(name, {}), **kwargs)


@pytest.mark.parametrize("name", METHODS)
def test_padding_order_and_budget_change_nothing(name: str, llama: AnswerModel) -> None:
    sites = few(llama)
    rows = [part([lengths], seed) for seed, lengths in enumerate([(4, 2), (9, 1), (2, 3)])]
    expected = method(name)(llama, rows, sites)
    backwards = method(name)(llama, rows[::-1], sites)
    budget = pass_bytes(llama.hf, sites, 3, 10, 8, extra=200)
    joined = method(name, memory_budget=budget)(llama, rows, sites)
    for other in (backwards, joined):
        for field in ("maximum", "positive", "minimum"):
            left, right = getattr(other, field), getattr(expected, field)
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-9 * right.abs().max().item())
        assert other.n_examples == 3
    assert joined.log_probabilities == pytest.approx(expected.log_probabilities)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_left_behind(name: str) -> None:
    model = answer_model(attention_dropout=0.5)
    sites = few(model)
    modes = mixed_modes(model)
    first = method(name)(model, [BATCH], sites)
    assert hooks(model) == 0
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    again = method(name)(model, [BATCH], sites)  # without dropout
    assert torch.equal(first.maximum, again.maximum)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backward", [False, True])
def test_exceptions_leave_nothing_behind(name: str, backward: bool) -> None:
    if backward and name == "ablation":
        pytest.skip("makes no backward pass")
    model = answer_model()
    sites = [site for site in neuron_sites(model.hf) if site.key[0] == 0]
    model.hf.model.layers[1].mlp = Broken(model.hf.model.layers[1].mlp, backward)
    modes = mixed_modes(model)
    with pytest.raises(ZeroDivisionError):
        method(name)(model, [BATCH], sites)
    assert hooks(model) == 0
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_by_name(llama: AnswerModel) -> None:
    sites, one = few(llama), [BATCH]
    by_name = attribution_method("log_probability", "sequence", "1GB")(llama, one, sites)
    assert torch.equal(by_name.maximum, neuron_attribution(llama, one, sites, "log_probability").maximum)
    default = attribution_method(None, "length_normalised")(llama, one, sites)
    assert torch.equal(default.maximum, neuron_attribution(llama, one, sites, "length_normalised").maximum)
    own: Any = lambda *_: None  # noqa: E731
    assert attribution_method(own) is own
    path = f"{neuron_attribution.__module__}.neuron_attribution"
    by_path = attribution_method(path, "length_normalised")(llama, one, sites)  # is given the target
    assert torch.equal(by_path.maximum, default.maximum)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: attribution_method("shap", argument="attribution.method"), r"attribution\.method"),
        (lambda: attribution_method("lightning_ssiuu.nowhere.method"), "method.*import path"),
        (lambda: attribution_method("lightning_ssiuu.utils.errors.nothing"), "method.*import path"),
        (lambda: attribution_method("ablation", "token"), "target"),  # type: ignore[arg-type]
        (lambda: attribution_method(None, memory_budget="much", argument="a.method"), r"a\.memory_budget"),
        (lambda: integrated_gradients(answer_model(), [], [], steps=0), "steps"),
        (lambda: integrated_gradients(answer_model(), [], [], path="way"), "path"),  # type: ignore[arg-type]
        (lambda: ablation_attribution(answer_model(), [], [], tokens="some"), "tokens"),  # type: ignore[arg-type]
        (lambda: ablation_attribution(answer_model(), [], [], rows=0), "rows"),
        (lambda: ablation_attribution(answer_model(), [BATCH], [], memory_budget=9), "memory_budget"),
    ],
)
def test_errors(call: Any, argument: str) -> None:
    with pytest.raises(UserError, match=argument):
        call()


# ---- Captum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["gradient", "path"])
def test_captum_agrees(by: str, llama: AnswerModel, monkeypatch: pytest.MonkeyPatch) -> None:
    captum = pytest.importorskip("captum.attr")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from captum_model import FromEmbeddings

    wrapped = FromEmbeddings(llama, BATCH).eval()
    embeddings = llama.hf.get_input_embeddings()(BATCH["input_ids"]).detach()
    inside = torch.tensor([[True] * 5 + [False], [True] * 3 + [False] * 3])
    for site in neuron_sites(llama.hf):
        module = llama.hf.get_submodule(site.module_name)
        if by == "gradient":
            with padded(llama):
                theirs = captum.LayerGradientXActivation(wrapped, module).attribute(embeddings)
            ours = neuron_attribution(llama, [BATCH], [site])
        else:
            # Its path starts at the layer's output for a zero input: zero too, in a model without biases.
            with padded(llama):
                theirs = captum.LayerIntegratedGradients(wrapped, module).attribute(embeddings, n_steps=8)
            ours = integrated_gradients(llama, [BATCH], [site], steps=8)
        values = theirs.detach().masked_fill(~inside.unsqueeze(-1), torch.nan)
        torch.testing.assert_close(ours.maximum, values.nan_to_num(-math.inf).amax(1).sum(0), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(ours.minimum, values.nan_to_num(math.inf).amin(1).sum(0), rtol=1e-6, atol=1e-12)


def test_copies(llama: AnswerModel) -> None:
    result = neuron_attribution(llama, [BATCH], few(llama))
    assert torch.equal(copy.deepcopy(result).mean_minimum, result.mean_minimum)
