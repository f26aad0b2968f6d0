"""Loading: what is refused and how; tokenizers, references, sites of every architecture."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toys.data import byte_tokenizer
from toys.models import answer_model, equal, part, random_model

from lightning_ssiuu.models.loading import (
    TINY,
    context_length,
    evaluation_mode,
    frozen_reference,
    load_model,
    load_tokenizer,
    resolve_checkpoint,
)
from lightning_ssiuu.utils.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_SSIUU_CACHE", str(tmp_path / "cache"))


def saved(folder: Path, **kwargs: Any) -> Path:
    """A complete checkpoint directory."""
    random_model("llama", torch.float32, vocab_size=259).save_pretrained(folder)
    byte_tokenizer(**kwargs).save_pretrained(folder)
    return folder


def one_line(caught: Any, argument: str = "checkpoint") -> None:
    assert caught.value.argument == argument
    assert "\n" not in str(caught.value)


# ---- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_model, load_tokenizer, context_length])
@pytest.mark.parametrize(
    "name",
    ["", " ", "/no/such/model", "./no", "~/no/such", "runs/no/model", "no/such.gguf", "no-such-model", "a/b", "tiny/"],
)
def test_missing(name: str, load: Any) -> None:
    with pytest.raises(UserError) as caught:
        load(name)
    one_line(caught)


@pytest.mark.parametrize("load", [load_model, load_tokenizer, context_length])
@pytest.mark.parametrize("file", ["weights.bin", "model.safetensors", "notes.txt"])
def test_a_file_that_is_no_gguf(tmp_path: Path, file: str, load: Any) -> None:
    (tmp_path / file).write_bytes(b"nothing")
    with pytest.raises(UserError) as caught:
        load(str(tmp_path / file))
    one_line(caught)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(64), b"not a model at all"])
def test_a_broken_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "broken.gguf")
    one_line(caught)
    left = tmp_path / "cache"
    assert not left.exists() or not list(left.iterdir())


@pytest.mark.parametrize("load", [load_model, load_tokenizer, context_length])
def test_a_directory_that_is_no_model(tmp_path: Path, load: Any) -> None:
    with pytest.raises(UserError, match=r"no config\.json") as caught:
        load(tmp_path)
    one_line(caught)


@pytest.mark.parametrize("config", ["", "{", "[]", "{}", '{"model_type": "no_such_type"}', '{"model_type": "vit"}'])
def test_a_broken_config(tmp_path: Path, config: str) -> None:
    folder = saved(tmp_path / "model")
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    one_line(caught)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    state = load_model(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        load_model(folder)
    one_line(caught)


@pytest.mark.parametrize("keep", [0, 7, 1000])
def test_truncated_weights(tmp_path: Path, keep: int) -> None:
    folder = saved(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError) as caught:
        load_model(folder)
    one_line(caught)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 are missing, first model\.layers\.1\.mlp\.up_proj") as caught:
        load_model(folder)
    one_line(caught)


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        load_model(folder)
    assert not ran.exists()


def test_a_directory_given_in_several_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (folder, str(folder), "model", "./model", "~/model"):
        assert Path(resolve_checkpoint(name)).resolve() == folder
    loaded = load_model("model")
    assert loaded.dtype == torch.float32
    assert not loaded.config.use_cache
    assert load_model("model", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert context_length("model") == 128


def test_inside_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemError('must not be imported')")
    saved(package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_checkpoint("package:some_package/model") == str(package / "model")
    assert load_model("package:some_package/model").config.model_type == "llama"
    assert "some_package" not in sys.modules
    for name in (
        "package:",
        "package:some_package",
        "package:some_package/no",
        "package:no_such_package/m",
        "package:a.b/c",
    ):
        with pytest.raises(UserError) as caught:
            resolve_checkpoint(name)
        one_line(caught)


# ---- tokenizer, reference, modes ---------------------------------------------------------------------------------


def test_the_tokenizer_always_pads_right(tmp_path: Path) -> None:
    loaded = load_tokenizer(saved(tmp_path / "model", pad_token=None, padding_side="left"))
    assert loaded.pad_token_id == loaded.eos_token_id is not None
    assert loaded.padding_side == "right"
    with pytest.raises(UserError, match="end-of-sequence") as caught:
        load_tokenizer(saved(tmp_path / "other", eos_token=None))
    one_line(caught)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    one_line(caught)


def test_the_reference_shares_nothing() -> None:
    model = answer_model()
    one = part([(3, 2)])
    model(one["input_ids"], one["attention_mask"], one["labels"]).logps.sum().backward()
    model.train()
    reference = frozen_reference(model)
    mine = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert not mine & {p.data_ptr() for p in [*reference.parameters(), *reference.buffers()]}
    assert equal(model.parameters(), reference.parameters())
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
    assert not any(module.training for module in reference.modules())
    assert all(p.grad is not None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert reference.hf.lm_head.weight is reference.hf.model.embed_tokens.weight  # still tied


def test_modes_come_back_module_by_module_also_after_an_exception() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    model[1].eval()
    inside = []
    with contextlib.suppress(ZeroDivisionError), evaluation_mode(model):
        inside = [module.training for module in model.modules()]
        raise ZeroDivisionError
    assert inside == [False] * 4
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_the_embedded_model_is_a_checkpoint_like_any_other(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "copy")
    assert equal(load_model("tiny").parameters(), load_model(tmp_path / "copy").parameters())
