"""Whatever a model was trained with, what is saved is a plain transformers directory of the same function."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from toys.models import EXPERTS, TOYS, adapted, equal, part, random_model
from toys.training import fit, ssiuu
from transformers import AutoModelForCausalLM

from lightning_ssiuu.callbacks import SavePretrained
from lightning_ssiuu.models.export import plain_bytes, plain_state_dict, save_adapter, save_pretrained
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.utils.errors import UserError


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(part([(4, 2), (2, 3)])["input_ids"]).logits


def stored(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a mapping


def saved(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Save, and load as somebody would who has neither peft nor bitsandbytes."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_json_string()
    trains = [p.requires_grad for p in model.parameters()]
    save_pretrained(model, load_tokenizer("tiny"), folder)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert equal(before.values(), after.values())
    assert trains == [p.requires_grad for p in model.parameters()]
    assert config == model.config.to_json_string()
    assert {file.name for file in folder.iterdir() if "token" not in file.name and "chat" not in file.name} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert not any(word in (folder / "config.json").read_text() for word in ("quantization", "lora", "peft"))
    assert sum(tensor.nbytes for tensor in stored(folder).values()) == plain_bytes(model)
    with monkeypatch.context() as patch:
        for package in ("peft", "bitsandbytes"):
            patch.setitem(sys.modules, package, None)
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("name", TOYS)
def test_adapters_are_merged(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(random_model(name, torch.float32, tie_word_embeddings=name == "gpt2")).eval()
    plain = saved(model, tmp_path / "model", monkeypatch)
    assert type(plain) is type(model)
    assert (logits(plain) - logits(model)).abs().max() < 1e-5
    assert (logits(random_model(name, torch.float32)) - logits(model)).abs().max() > 0.1
    # The tied head is written once, another one is.
    head = {n for n in stored(tmp_path / "model") if n in ("lm_head.weight", "embed_out.weight")}
    assert len(head) == (0 if name == "gpt2" else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_weights_are_unpacked(
    quantization: Any, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(load_model("tiny", dtype, quantization), noise=0.02)
    plain = saved(model, tmp_path / "model", monkeypatch)
    assert {p.dtype for p in plain.parameters()} == {dtype}
    assert stored(tmp_path / "model").keys() == load_model("tiny").state_dict().keys() - {"lm_head.weight"}

    def error(mode: bool) -> float:
        expected = logits(model.train(mode)).float()
        return ((logits(plain).float() - expected).norm() / expected.norm()).item()

    # As in training. In scoring, 8-bit layers round what goes into them to 8 bits as well: 1.5 % were measured.
    assert error(True) < (1e-5 if dtype == torch.float32 else 0.03)
    assert error(False) < (1e-5 if dtype == torch.float32 and quantization == "4bit" else 0.05)


def test_a_quantised_gpt2_gets_its_shapes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model("gpt2", torch.float32, tie_word_embeddings=True, n_embd=64).save_pretrained(tmp_path / "gpt2")
    for quantization in ("8bit", "4bit"):
        model = adapted(load_model(tmp_path / "gpt2", quantization=quantization)).train()
        plain = saved(model, tmp_path / quantization, monkeypatch)
        assert (logits(plain) - logits(model)).abs().max() < 1e-5


def test_experts_beside_quantised_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model("qwen2_moe", torch.float32, hidden_size=64).save_pretrained(tmp_path / "experts")
    for quantization in ("8bit", "4bit"):
        model = adapted(load_model(tmp_path / "experts", quantization=quantization), noise=0.02).train()
        plain = saved(model, tmp_path / quantization, monkeypatch)
        assert (logits(plain) - logits(model)).abs().max() < 1e-5


def test_plain_models_are_written_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("tiny")
    plain = saved(model, tmp_path / "model", monkeypatch)
    assert equal(plain.parameters(), model.parameters())
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    state = plain_state_dict(model)
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    assert list(state) == list(model.state_dict())
    # A weight kept in a wider type than the others stays in it.
    model.bfloat16().model.norm.float()
    kinds = {name: tensor.dtype for name, tensor in plain_state_dict(model).items()}
    assert {name for name, kind in kinds.items() if kind != torch.bfloat16} == {"model.norm.weight"}


def test_adapters_alone_go_back_on_their_base(tmp_path: Path) -> None:
    for name, targets in (("llama", ["down_proj"]), ("gpt2", ["c_proj"]), *((name, None) for name in EXPERTS)):
        model = adapted(random_model(name, torch.float32), target_modules=targets)
        folder = tmp_path / name
        save_adapter(model, folder, "some/base")
        assert {file.name for file in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        assert peft.PeftConfig.from_pretrained(folder).base_model_name_or_path == "some/base"
        again = peft.PeftModel.from_pretrained(random_model(name, torch.float32), folder)
        assert torch.equal(logits(again), logits(model))


# ---- the callback ------------------------------------------------------------------------------------------------


def test_a_run_with_adapters_saves_both(tmp_path: Path) -> None:
    module = ssiuu(lora=LoRA(r=2), quantization="8bit")
    fit(module, [SavePretrained(adapter=True)], tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model_adapter"}
    hf = module.model.hf.train()
    assert (logits(load_model(tmp_path / "model")) - logits(hf)).abs().max() < 1e-5
    tensors = [path.stat().st_size for path in tmp_path.rglob("*.safetensors")]
    assert 0 < sum(tensors) - plain_bytes(hf, adapter=True) < 20_000  # the files' headers
    again = peft.PeftModel.from_pretrained(load_model("tiny", quantization="8bit"), tmp_path / "model_adapter").train()
    assert (logits(again) - logits(hf)).abs().max() < 1e-5


def test_no_adapters_to_save(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"saving\.adapter: got True, allowed: false without lora"):
        fit(ssiuu(), [SavePretrained(adapter=True)], tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_room_is_asked_for_unpacked_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("tiny", quantization="4bit")
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert held < plain_bytes(load_model("tiny")) == plain_bytes(model)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=plain_bytes(model) - 1))
    with pytest.raises(UserError, match=r"trainer\.default_root_dir.*MB free"):
        fit(ssiuu(lora=LoRA(r=1), quantization="4bit"), [SavePretrained()], tmp_path, 1)


# ---- weights that lie elsewhere ----------------------------------------------------------------------------------


def sharded(rank: int, folder: Path, answers: Any) -> None:
    """One of two ranks, each with half of every weight."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    whole, cut = (adapted(random_model("gpt2", torch.float32, tie_word_embeddings=True)) for _ in range(2))
    for block in cut.transformer.h:
        fully_shard(block)
    fully_shard(cut)
    size = plain_bytes(cut, adapter=True) - plain_bytes(whole, adapter=True)
    state, expected = plain_state_dict(cut), plain_state_dict(whole)
    same = state.keys() == expected.keys() and equal(state.values(), expected.values())
    save_pretrained(cut, load_tokenizer("tiny"), folder / "model")
    save_adapter(cut, folder / "adapter", "base")
    answers.put((rank, size, len(state), same, type(cut).__name__, (folder / "model").exists()))
    dist.barrier()
    dist.destroy_process_group()


def test_shards_are_gathered_by_all_ranks_and_written_by_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # everything is imported already
    answers = context.Queue()
    ranks = [context.Process(target=sharded, args=(rank, tmp_path, answers), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    first, second = sorted(answers.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(30)
    assert [process.exitcode for process in ranks] == [0, 0]
    whole = adapted(random_model("gpt2", torch.float32, tie_word_embeddings=True))
    assert first == (0, 0, len(plain_state_dict(whole)), True, "FSDPGPT2LMHeadModel", True)
    assert second[:3] == (1, 0, 0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(whole)
    assert (logits(loaded) - logits(whole.eval())).abs().max() < 1e-5
    again = peft.PeftModel.from_pretrained(
        random_model("gpt2", torch.float32, tie_word_embeddings=True), tmp_path / "adapter"
    )
    assert torch.equal(logits(again), logits(whole))
