"""Architectures: sites, fused projections and blocks of every type, plain heads, records of one's own."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.models import EXPERTS, RECORDED, TOYS, UNRECORDED, part, random_model

from lightning_ssiuu import ARCHITECTURES, SSIUU, Architecture, UserError
from lightning_ssiuu.models.answers import AnswerModel, own_logits
from lightning_ssiuu.models.architectures import (
    KINDS,
    NeuronSite,
    architecture_of,
    feed_forward_sites,
    find_architecture,
    neuron_sites,
    select_sites,
    transformer_blocks,
    use_architecture,
)
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.models.packing import padded

QKV = KINDS[:3]


def test_every_type_has_a_toy() -> None:
    assert {random_model(name, torch.float32).config.model_type for name in RECORDED} == set(ARCHITECTURES)


# ---- sites -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_sites(name: str) -> None:
    model = random_model(name)
    record = architecture_of(model)
    assert record is not None
    sites = neuron_sites(model)
    lacks = {"mlp_gate"} if name[:3] in ("gpt", "fal", "sta") else set()
    lacks |= {"mlp_gate", "mlp_up", "mlp_down"} if name in EXPERTS else set()
    kinds = [kind for kind in KINDS if kind not in lacks]
    assert [site.key for site in sites] == [(layer, kind) for layer in range(2) for kind in kinds]
    narrow = {"falcon": 8, "falcon_mq": 4}.get(name, 8 if "num_key_value_heads" in TOYS[name][1] else 16)
    hidden = 64 if name == "gpt2" else 24
    expected = {"attn_q": 16, "attn_k": narrow, "attn_v": narrow, "attn_o": 16, "mlp_gate": hidden, "mlp_up": hidden}
    shapes: dict[str, torch.Size] = {}
    for module_name in {site.module_name for site in sites}:
        hook = lambda _m, _a, out, key=module_name: shapes.__setitem__(key, out.shape)  # noqa: E731
        model.get_submodule(module_name).register_forward_hook(hook)
    model(input_ids=part([(3, 2)])["input_ids"])
    for site in sites:
        assert site.width == (expected | {"mlp_down": 16})[site.kind]
        *rows, width = shapes[site.module_name]
        assert rows == [1, 5]
        assert site.select(torch.zeros(1, 5, width)).shape[-1] == site.width
    # Every projection of a block is a site's: none was forgotten but those of experts.
    block = transformer_blocks(model)[0]
    linear = {n for n, m in block.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    if name in EXPERTS:
        linear = {n for n in linear if not n.startswith("mlp.")}
    assert linear == set(record.modules.values())


def split_by_hand(name: str, block: Any, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V of a fused projection's output [1, L, width], as transformers' own code cuts them."""
    if name.startswith("falcon"):
        query, key, value = (x.flatten(2) for x in block.self_attention._split_heads(output))
        if name == "falcon":  # every key-value head stands there once for each of its two queries
            key, value = (x.view(1, -1, 2, 2, 4)[:, :, :, 0].flatten(2) for x in (key, value))
        return query, key, value
    if name == "gpt_neox":
        return tuple(x.flatten(2) for x in output.view(1, -1, 4, 12).chunk(3, -1))  # type: ignore[return-value]
    if name == "phi3":
        return output[..., :16], output[..., 16:24], output[..., 24:]
    return output.split(16, dim=2)  # type: ignore[return-value]  # gpt2


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "falcon", "falcon_mq", "falcon_rw"])
def test_columns_of_fused_projections_are_those_that_the_model_cuts(name: str) -> None:
    model = random_model(name)
    by_key = {site.key: site for site in neuron_sites(model)}
    module: Any = model.get_submodule(by_key[1, "attn_q"].module_name)
    output = module(torch.randn(1, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    parts = split_by_hand(name, transformer_blocks(model)[1], output)
    for kind, expected in zip(QKV, parts, strict=True):
        assert torch.equal(by_key[1, kind].select(output), expected)


def test_columns_of_gate_and_up_are_those_that_the_model_cuts() -> None:
    model = random_model("phi3")
    by_key = {site.key: site for site in neuron_sites(model)}
    mlp: Any = transformer_blocks(model)[0].mlp
    x = torch.randn(1, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    output = mlp.gate_up_proj(x)
    hidden = by_key[0, "mlp_up"].select(output) * mlp.activation_fn(by_key[0, "mlp_gate"].select(output))
    assert torch.equal(mlp.down_proj(hidden), mlp(x))


@pytest.mark.parametrize("name", EXPERTS)
def test_what_is_no_site_of_experts_is_said_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    from lightning_ssiuu.models import architectures

    architectures._tell.cache_clear()
    model = random_model(name)
    with caplog.at_level("INFO"):
        neuron_sites(model)
        neuron_sites(model)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{name}: no neurons of the kinds mlp_up, mlp_down")
    with pytest.raises(UserError, match="feed-forward"):
        feed_forward_sites(model)


# ---- plain heads -------------------------------------------------------------------------------------------------

CAPPED = [
    ("gemma2", {"final_logit_softcapping": 30.0}),
    ("gemma2", {"final_logit_softcapping": 1000.0}),
    ("gemma3_text", {"final_logit_softcapping": 30.0}),
    ("granite", {"logits_scaling": 4.0}),
    ("granite", {"logits_scaling": 1.001}),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), CAPPED)
def test_whoever_calls_a_head_plain_that_is_not_gets_the_models_own_logits(
    name: str, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    plain = Architecture("model.layers", "model.norm", {"mlp_up": "mlp.up_proj"}, plain_head=True)
    monkeypatch.setitem(ARCHITECTURES, name, plain)
    hf, some = random_model(name, dtype, **options), part([(3, 2), (2, 4)])
    if name != "granite":
        hf.lm_head.weight.data *= 1e-3  # so small that the cap does not show in what the model says now
    elif dtype == torch.bfloat16 and options.get("logits_scaling") == 1.001:
        pytest.skip("less than bfloat16 tells apart")
    with caplog.at_level("INFO"):
        model = AnswerModel(hf)
    assert not model.plain_head
    assert [said for record in caplog.records if "logits" in (said := record.getMessage())] == [
        f"{name}: the model's own logits are not its unembedding's alone; all are computed."
    ]
    rows, positions = (some["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    full = hf(input_ids=some["input_ids"], attention_mask=some["attention_mask"]).logits
    with padded(model):
        answers = model(some["input_ids"], some["attention_mask"], some["labels"])
    assert torch.equal(answers.logits, full[rows, positions])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(set(RECORDED) - {"gemma2"}))
def test_plain_heads_are_found_plain_and_nothing_is_left_behind(name: str, dtype: torch.dtype) -> None:
    hf = random_model(name, dtype).train()
    before = {key: value.clone() for key, value in hf.state_dict().items()}
    state, modules = torch.get_rng_state(), {key: dict(vars(module)) for key, module in hf.named_modules()}
    assert AnswerModel(hf).plain_head
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in hf.state_dict().items())
    assert all(p.grad is None for p in hf.parameters())
    assert all(vars(module).keys() == modules[key].keys() for key, module in hf.named_modules())
    assert all(module.training for module in hf.modules())


def test_own_logits_are_the_head_s_with_all_that_comes_after_it() -> None:
    hf = random_model("gemma2")
    hidden = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(own_logits(hf, hidden), 3 * (hf.lm_head(hidden) / 3).tanh())
    ids = part([(3, 2)])["input_ids"]
    assert torch.equal(own_logits(hf, hf.model(ids).last_hidden_state), hf(ids).logits)


def test_weights_without_values_are_believed_and_broken_ones_are_not() -> None:
    with torch.device("meta"):
        assert AnswerModel(random_model("llama", torch.float32)).plain_head
    hf = random_model("llama", torch.float32)
    for value in (float("nan"), float("inf"), 0.0):
        broken = copy.deepcopy(hf)
        broken.lm_head.weight.data.fill_(value)
        assert not AnswerModel(broken).plain_head
    assert AnswerModel(load_model("tiny", quantization="8bit")).plain_head


# ---- records of one's own ----------------------------------------------------------------------------------------

LLAMA = dataclasses.asdict(ARCHITECTURES["llama"])


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"modules": {}}, "architecture.modules"),
        ({"modules": {"mlp_in": "mlp.up_proj"}}, "architecture.modules"),
        ({"modules": {"attn_q": "qkv", "attn_k": "qkv", "attn_v": "qkv"}}, "architecture.modules"),
        ({"modules": {"attn_q": "q", "attn_k": "kv", "attn_v": "kv"}, "fused": "by_kind"}, "architecture.modules"),
        ({"modules": {"mlp_up": "fc", "mlp_down": "fc"}}, "architecture.modules"),
        ({"fused": "thirds"}, "architecture.fused"),
        ({"norm": "model.norm"}, "architecture"),
    ],
)
def test_records_that_are_none(changes: dict[str, Any], argument: str) -> None:
    with pytest.raises(UserError) as caught:
        find_architecture({**LLAMA, **changes})
    assert caught.value.argument == argument
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "argument", "given"),
    [
        ({"blocks": "model.blocks"}, "architecture", "model.blocks"),
        ({"blocks": "model.norm"}, "architecture.blocks", "model.norm"),
        ({"final_norm": "model.ln_f"}, "architecture", "model.ln_f"),
        ({"modules": {"mlp_up": "mlp.fc"}}, "architecture", "model.layers.0.mlp.fc"),
        ({"modules": {"mlp_up": "mlp.act_fn"}}, "architecture", "model.layers.0.mlp.act_fn"),
        ({"modules": dict.fromkeys(QKV, "self_attn.q_proj"), "fused": "by_head"}, "architecture.fused", "128 outputs"),
    ],
)
def test_records_of_another_model(changes: dict[str, Any], argument: str, given: str) -> None:
    record = find_architecture({**LLAMA, **changes})
    with pytest.raises(UserError, match=given) as caught:
        load_model("tiny", architecture=record)
    assert caught.value.argument == argument
    assert "\n" not in str(caught.value)


def test_a_record_goes_before_the_type_s_and_stays_with_copies() -> None:
    record = Architecture("model.layers", "model.norm", {"mlp_up": "mlp.up_proj"})
    hf = random_model("llama")
    use_architecture(hf, record)
    for model in (hf, copy.deepcopy(hf)):
        assert [site.kind for site in neuron_sites(model)] == ["mlp_up"] * 2
        assert not AnswerModel(model).plain_head


def test_an_option_is_a_name_an_import_path_or_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_records.py").write_text(
        "from lightning_ssiuu import Architecture\n"
        "PHI = Architecture('model.layers', 'model.norm', {'mlp_up': 'mlp.up_proj'})\nOTHER = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    record = find_architecture("my_records.PHI")
    assert isinstance(record, Architecture)
    assert SSIUU(architecture="my_records.PHI").architecture is record is find_architecture(record)
    assert find_architecture("gpt2") is ARCHITECTURES["gpt2"]
    assert find_architecture(dataclasses.asdict(record)) == record
    for name in ("my_records.OTHER", "my_records.NONE", "no_records.PHI", "phi", ""):
        with pytest.raises(UserError) as caught:
            SSIUU(architecture=name)
        assert caught.value.argument == "architecture"
        assert "\n" not in str(caught.value)


# ---- selecting -------------------------------------------------------------------------------------------------


def test_sites_of_something_else() -> None:
    for model in (nn.Linear(2, 2), random_model(UNRECORDED)):
        with pytest.raises(UserError) as caught:
            neuron_sites(model)
        assert caught.value.argument == "checkpoint"


SITES = [NeuronSite(kind, layer, f"{layer}.{kind}", 2) for layer in (0, 1, 11) for kind in KINDS]


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        (["mlp_up"], [(0, "mlp_up"), (1, "mlp_up"), (11, "mlp_up")]),
        (["layer1"], [(1, kind) for kind in KINDS]),
        (["layer11.attn_q"], [(11, "attn_q")]),
        (["layer0.mlp_up", "layer0.attn_q", "layer0.mlp_up"], [(0, "attn_q"), (0, "mlp_up")]),
        ([], []),
    ],
)
def test_select(selectors: list[str], expected: list[Any]) -> None:
    assert [site.key for site in select_sites(SITES, selectors)] == expected


@pytest.mark.parametrize(
    "selector",
    [
        "",
        "layer",
        "layer2",
        "layer-1",
        "mlp",
        "MLP_UP",
        "layer0.mlp",
        "layer2.mlp_up",
        "0.mlp_up",
        "layer0.mlp_up.x",
        ".*",
    ],
)
def test_selectors_that_select_nothing(selector: str) -> None:
    with pytest.raises(UserError) as caught:
        select_sites(SITES, ["mlp_up", selector], "here")
    assert caught.value.argument == "here"


@pytest.mark.parametrize("selector", ["layer0mlp_up", ".mlp_up", "layer0."])
def test_the_point_stands_between_layer_and_kind(selector: str) -> None:
    with pytest.raises(UserError):
        select_sites(SITES, [selector])
