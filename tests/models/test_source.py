"""Models as people have them: in memory, copied or in place; adapters on their base; revision, attention, dtype."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from toys.data import byte_tokenizer
from toys.models import adapted, bare_trainer, equal, random_model, weights
from toys.training import fit, ssiuu

from lightning_ssiuu import NPO, SSIUU, Facts, GradientDifference, SavePretrained, UnlearningModule, UserError
from lightning_ssiuu.attacks.records import checkpoint_fingerprint
from lightning_ssiuu.models.export import save_adapter, save_pretrained
from lightning_ssiuu.models.loading import (
    check_loadable,
    context_length,
    hub_options,
    load_model,
    load_tokenizer,
    resolve_checkpoint,
)
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.models.meta import blueprint
from lightning_ssiuu.objectives import objectives

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def trained(**options: Any) -> Any:
    """An objective after two steps on the embedded data."""
    torch.manual_seed(0)
    module = NPO(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), **options)
    bare_trainer(2).fit(module, Facts(batch_size=4, retain_batch_size=4))
    return module


# ---- a model in memory -------------------------------------------------------------------------------------------


def test_a_copy_is_trained_and_the_original_stays() -> None:
    hf, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    hf.config.use_cache, hf.training = True, True
    before, grads = [p.detach().clone() for p in hf.parameters()], [p.requires_grad for p in hf.parameters()]
    module = trained(model=hf, tokenizer=tokenizer)
    assert equal(weights(module), weights(trained()))  # bit for bit what a checkpoint gives
    assert equal(hf.parameters(), before)
    assert (hf.config.use_cache, hf.training, hf.config._attn_implementation) == (True, True, "sdpa")
    assert [p.requires_grad for p in hf.parameters()] == grads
    assert module.tokenizer is not tokenizer


def test_in_place_trains_the_model_itself() -> None:
    hf = load_model("tiny")
    module = trained(model=hf, tokenizer=load_tokenizer("tiny"), in_place=True)
    assert module.model.hf is hf
    assert equal(hf.parameters(), [p.detach() for p in trained().model.hf.parameters()])
    with pytest.raises(UserError, match="in_place: got True, allowed: false where the original model is needed"):
        module.build(torch.device("cpu"))


def test_every_objective_takes_a_model() -> None:
    hf, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    expected = logits(hf)
    for kind in objectives().values():
        module = kind(model=hf, tokenizer=tokenizer)
        module.configure_model()
        assert torch.equal(logits(module.model.hf), expected), kind
        assert module.model.hf is not hf
        for backbone in module._backbone:
            assert backbone.model is module.model


def test_new_adapters_on_a_model_in_memory() -> None:
    options = {"lora": LoRA(r=2), "model": load_model("tiny"), "tokenizer": load_tokenizer("tiny")}
    assert equal(weights(trained(**options)), weights(trained(lora=LoRA(r=2))))
    assert not hasattr(options["model"], "peft_config")


def test_a_model_of_peft_is_merged() -> None:
    wrapped = peft.get_peft_model(load_model("tiny"), peft.LoraConfig(r=2, init_lora_weights=False))
    expected = logits(wrapped)
    module = SSIUU(model=wrapped, tokenizer=load_tokenizer("tiny"))
    module.configure_model()
    assert torch.allclose(logits(module.model.hf), expected, atol=1e-5)
    assert not hasattr(module.model.hf, "peft_config")
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert any("lora_A" in name for name, _ in wrapped.named_parameters())  # theirs still has them


def test_a_model_keeps_its_type_unless_told() -> None:
    hf = load_model("tiny", torch.bfloat16)
    for dtype, expected in ((None, torch.bfloat16), ("auto", torch.bfloat16), ("float32", torch.float32)):
        module = NPO(model=hf, tokenizer=load_tokenizer("tiny"), dtype=dtype)
        module.configure_model()
        assert {parameter.dtype for parameter in module.parameters()} == {expected}


def test_a_second_model_is_the_one_given() -> None:
    """What NPO compares with, as a frozen copy."""
    given = {"model": load_model("tiny"), "tokenizer": load_tokenizer("tiny")}
    expected = weights(trained(reference="second_model"))
    assert equal(weights(trained(reference="second_model", **given)), expected)


def test_a_checkpoint_of_such_a_run_wants_the_model_again(tmp_path: Path) -> None:
    given = {"model": load_model("tiny"), "tokenizer": load_tokenizer("tiny")}
    module = NPO(**given)
    trainer = bare_trainer(1)
    trainer.fit(module, Facts(batch_size=4, retain_batch_size=4))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(UserError, match="load_from_checkpoint"):
        UnlearningModule.load_from_checkpoint(tmp_path / "run.ckpt")
    again = UnlearningModule.load_from_checkpoint(tmp_path / "run.ckpt", **given)
    assert equal(weights(again), weights(module))


def broken(model: Any) -> Any:
    model.model.norm.weight.data[0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("model", lambda: {"model": "tiny", "tokenizer": load_tokenizer("tiny")}),
        ("model", lambda: {"model": load_model("tiny").model, "tokenizer": load_tokenizer("tiny")}),
        ("model", lambda: {"model": blueprint("tiny", torch.float32, None), "tokenizer": load_tokenizer("tiny")}),
        ("model", lambda: {"model": broken(load_model("tiny")), "tokenizer": load_tokenizer("tiny")}),
        ("tokenizer", lambda: {"model": load_model("tiny")}),
        ("tokenizer", lambda: {"model": random_model(vocab_size=100), "tokenizer": load_tokenizer("tiny")}),
        ("tokenizer", lambda: {"tokenizer": load_tokenizer("tiny")}),
        ("in_place", lambda: {"in_place": True}),
        ("revision", lambda: {"model": load_model("tiny"), "tokenizer": load_tokenizer("tiny"), "revision": "v1"}),
        ("revision", lambda: {"revision": "v1"}),
        ("revision", lambda: {"checkpoint": "org/name@v1", "revision": "v2"}),
        ("dtype", lambda: {"dtype": "int8"}),
        ("checkpoint", lambda: {"attn_implementation": "nothing"}),
    ],
)
def test_what_is_refused(argument: str, options: Any) -> None:
    with pytest.raises(UserError) as caught:
        GradientDifference(**options()).configure_model()
    assert caught.value.argument == argument


# ---- options of loading ------------------------------------------------------------------------------------------


def test_attention_and_type_are_passed_on() -> None:
    module = GradientDifference(attn_implementation="eager", dtype="bfloat16")
    module.configure_model()
    assert module.model.hf.config._attn_implementation == "eager"
    assert not module.model.packs
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert GradientDifference(dtype="auto").source.torch_dtype() == torch.float32


def test_a_revision_goes_wherever_the_checkpoint_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, Any]] = []
    import transformers

    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        kind = getattr(transformers, name)
        load = kind.from_pretrained

        def loaded(source: str, *args: Any, name: str = name, load: Any = load, **options: Any) -> Any:
            asked.append((name, source, options.pop("revision", None)))
            return load(resolve_checkpoint("tiny"), *args, **options)

        monkeypatch.setattr(kind, "from_pretrained", loaded)
    module = GradientDifference(checkpoint="org/name", revision="v1.0")
    assert module.checkpoint == "org/name@v1.0"
    module.configure_model()
    load_tokenizer(module.checkpoint)
    of_the_hub = {(name, revision) for name, source, revision in asked if source == "org/name"}
    assert of_the_hub == {(name, "v1.0") for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM")}


def test_a_directory_may_have_an_at_sign(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path / "a@b")
    assert hub_options(tmp_path / "a@b") == (str(tmp_path / "a@b"), {})


# ---- adapters on their base --------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_pretrained(random_model("llama", torch.float32, vocab_size=259), byte_tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def test_a_directory_of_adapters_is_a_checkpoint(base: Path, tmp_path: Path) -> None:
    model = adapted(load_model(base), noise=0.3)
    save_adapter(model, tmp_path / "adapter", str(base))
    plain = load_model(tmp_path / "adapter")
    assert torch.allclose(logits(plain), logits(model), atol=1e-5)
    assert (logits(plain) - logits(load_model(base))).abs().max() > 1e-3
    assert type(plain) is type(load_model(base))
    assert not hasattr(plain, "peft_config")
    assert load_tokenizer(tmp_path / "adapter").get_vocab() == load_tokenizer(base).get_vocab()
    assert context_length(tmp_path / "adapter") == context_length(base)
    check_loadable(tmp_path / "adapter")
    module = ssiuu(checkpoint=str(tmp_path / "adapter"), lora=LoRA(r=2))
    module.configure_model()
    assert torch.allclose(logits(module.model.hf), logits(model), atol=1e-5)
    save_adapter(module.model.hf, tmp_path / "second", module.checkpoint)  # adapters on adapters
    assert torch.allclose(logits(load_model(tmp_path / "second")), logits(model), atol=1e-5)


def test_adapters_of_peft_itself(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another rank, DoRA, rsLoRA; and a base that lies beside them."""
    monkeypatch.chdir("/")
    options = {"r": 3, "use_dora": True, "use_rslora": True, "init_lora_weights": False, "target_modules": "all-linear"}
    wrapped = peft.get_peft_model(load_model(base), peft.LoraConfig(**options))
    wrapped.peft_config["default"].base_model_name_or_path = "../base"
    wrapped.save_pretrained(tmp_path / "adapter")
    assert torch.allclose(logits(load_model(tmp_path / "adapter")), logits(wrapped), atol=1e-4)


def test_another_base_is_another_model(base: Path, tmp_path: Path) -> None:
    save_adapter(adapted(load_model(base)), tmp_path / "adapter", str(base))
    before = checkpoint_fingerprint(str(tmp_path / "adapter"))
    assert before == checkpoint_fingerprint(str(tmp_path / "adapter"))
    torch.manual_seed(1)
    other = random_model("llama", torch.float32)
    other.model.norm.weight.data += 1
    save_pretrained(other, byte_tokenizer(), base)
    assert checkpoint_fingerprint(str(tmp_path / "adapter")) != before


def change(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: change(folder, base_model_name_or_path="/no/such"), "adapters on a model that is there"),
        (lambda folder: change(folder, base_model_name_or_path=None), "names their base_model_name_or_path"),
        (lambda folder: change(folder, base_model_name_or_path=str(folder)), "in a circle"),
        (lambda folder: change(folder, r=5), "adapters that fit the model they name"),
        (lambda folder: change(folder, target_modules=["q_proj"]), "tensors do not"),
        (lambda folder: change(folder, base_model_name_or_path="tiny"), "adapters that fit the model they name"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "weights in adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "valid JSON"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "adapters that fit"),
    ],
)
def test_adapters_that_do_not_fit(spoil: Any, said: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(adapted(load_model(base)), folder, str(base))
    spoil(folder)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert caught.value.argument == "checkpoint"
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_adapters_are_not_quantised(base: Path, tmp_path: Path) -> None:
    save_adapter(adapted(load_model(base)), tmp_path / "adapter", str(base))
    with pytest.raises(UserError, match="quantization: got '8bit', allowed: null with a directory of adapters"):
        load_model(tmp_path / "adapter", quantization="8bit")


# ---- what a run saves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_run_saves_adapters_alone(options: dict[str, Any], tmp_path: Path) -> None:
    module = ssiuu(lora=LoRA(r=2, options=options))
    fit(module, [SavePretrained(merged=False)], tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"model_adapter"}
    assert (logits(load_model(tmp_path / "model_adapter")) - logits(module.model.hf)).abs().max() < 1e-5
    assert (tmp_path / "model_adapter" / "tokenizer.json").is_file()
    shutil.move(tmp_path / "model_adapter", tmp_path / "elsewhere")
    assert load_tokenizer(tmp_path / "elsewhere").get_vocab() == module.tokenizer.get_vocab()


def test_adapters_alone_need_adapters(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        fit(ssiuu(), [SavePretrained(merged=False)], tmp_path, 1)
    assert caught.value.argument == "saving.merged"


# ---- options of peft ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}])
def test_options_of_peft_are_merged_as_they_compute(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(name, torch.float32)
    original = logits(model)
    LoRA(r=2, options=options).attach(model)
    assert torch.allclose(logits(model), original, atol=1e-5)  # training starts at the original
    moved = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.manual_seed(0)
    for parameter in moved:
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert (logits(model) - original).abs().max() > 1e-2
    save_pretrained(model, byte_tokenizer(), tmp_path / "model")
    assert torch.allclose(logits(load_model(tmp_path / "model")), logits(model), atol=1e-5)
    save_adapter(model, tmp_path / "adapter", "some/base")
    again = peft.PeftModel.from_pretrained(random_model(name, torch.float32), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_dora_is_not_for_quantised_weights() -> None:
    with pytest.raises(UserError, match=r"lora\.options\.use_dora: got True, allowed: false beside quantised weights"):
        NPO(quantization="8bit", lora=LoRA(r=2, options={"use_dora": True}))
    model = load_model("tiny", quantization="8bit")
    with pytest.raises(UserError, match=r"lora\.options\.use_dora"):
        LoRA(r=2, options={"use_dora": True}).attach(model)


def test_the_scale_of_rslora() -> None:
    model = LoRA(r=4, alpha=8.0, options={"use_rslora": True}).attach(random_model())
    assert model.model.layers[0].self_attn.q_proj.scaling == {"default": 4.0}


def test_some_layers_and_ranks() -> None:
    options = {"layers_to_transform": [1], "rank_pattern": {"q_proj": 1}}
    model = LoRA(r=3, options=options).attach(random_model())
    shapes = {name: p.shape[0] for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name}
    assert all(".layers.1." in name for name in shapes)
    assert {name.split(".")[-4]: rank for name, rank in shapes.items()}["q_proj"] == 1
    assert set(shapes.values()) == {1, 3}


@pytest.mark.parametrize(
    ("options", "argument", "said"),
    [
        ({"use_dorra": True}, "lora.options.use_dorra", "did you mean 'use_dora'?"),
        ({"lora_alpha": 3}, "lora.options.lora_alpha", "lora.alpha"),
        ({"init_lora_weights": "pissa"}, "lora.options.init_lora_weights", "original model exactly"),
        ({"bias": "all"}, "lora.options", "other weights would train"),
        ({"modules_to_save": ["lm_head"]}, "lora.options", "other weights would train"),
        ({"lora_bias": True}, "lora.options", "other weights would train"),
        ({"layers_to_transform": [77]}, "lora.options", "options that fit a qwen2"),
        ({"bias": "some"}, "lora.options", "got bias='some'"),
        ({"use_dora": True, "use_kasa": 3}, "lora.options.use_kasa", "an argument of peft.LoraConfig"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], argument: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        LoRA(r=2, options=options).attach(random_model("qwen2"))
    assert caught.value.argument == argument
    assert said in str(caught.value)
