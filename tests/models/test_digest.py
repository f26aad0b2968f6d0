"""Which weights are these: of what is loaded alone, of adapters and their base, of hub ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys.data import byte_tokenizer
from toys.models import adapted, random_model

from lightning_ssiuu.models.digest import weights_sha256
from lightning_ssiuu.models.export import save_adapter, save_pretrained
from lightning_ssiuu.models.loading import load_model, resolve_checkpoint
from lightning_ssiuu.utils.errors import UserError


def tiny(folder: Path) -> Path:
    shutil.copytree(resolve_checkpoint("tiny"), folder)
    return folder


def nudged(file: Path) -> None:
    """One weight of a file, by one bit."""
    tensors = load_file(file)
    flat = tensors[min(tensors)].view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf, dtype=flat.dtype))
    save_file(tensors, file, {"format": "pt"})


def test_of_the_weights_alone(tmp_path: Path) -> None:
    whole, copy = weights_sha256("tiny"), tiny(tmp_path / "copy")
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    names = sorted(tensors)
    file.unlink()
    places = {}
    for number, part in enumerate((names[::2], names[1::2])):  # other files, other metadata
        name = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, copy / name, {"by": "me"})
        places |= dict.fromkeys(part, name)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert weights_sha256(str(copy)) == whole
    nudged(copy / "model-0.safetensors")
    assert weights_sha256(str(copy)) != whole


@pytest.mark.parametrize("name", ["z.safetensors", "adapter_model.safetensors", "model-00001-of-00001.safetensors"])
def test_a_file_beside_the_model_does_not_speak_for_it(name: str, tmp_path: Path) -> None:
    """Another model's weights are put beside those that are loaded, under the same names."""
    copy = tiny(tmp_path / "copy")
    shutil.copy(copy / "model.safetensors", copy / name)
    nudged(copy / "model.safetensors")
    assert weights_sha256(str(copy)) != weights_sha256("tiny")
    config = json.loads((copy / "config.json").read_text())  # that names the file which is loaded
    (copy / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    assert weights_sha256(str(copy)) == weights_sha256("tiny")


def rescaled(adapter: Path, base: Path) -> None:
    options = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(options | {"lora_alpha": 2 * options["lora_alpha"]}))


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        (lambda adapter, base: nudged(adapter / "adapter_model.safetensors"), True),
        (lambda adapter, base: nudged(base / "model.safetensors"), True),
        (rescaled, True),
        (lambda adapter, base: shutil.copy(base / "model.safetensors", adapter / "z.safetensors"), False),
        (lambda adapter, base: base.rename(base.parent / "moved"), False),
    ],
)
def test_adapters_are_digested_with_their_base(
    change: Callable[[Path, Path], None], is_another: bool, tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_pretrained(random_model("llama", torch.float32, vocab_size=259), byte_tokenizer(), base)
    save_adapter(adapted(load_model(base), noise=0.3), adapter, str(base))
    before = weights_sha256(str(adapter))
    assert before not in (weights_sha256(str(base)), weights_sha256("tiny"))
    change(adapter, base)
    if not base.exists():
        options = json.loads((adapter / "adapter_config.json").read_text())
        moved = options | {"base_model_name_or_path": str(tmp_path / "moved")}
        (adapter / "adapter_config.json").write_text(json.dumps(moved))
    assert (weights_sha256(str(adapter)) != before) == is_another


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with two revisions of one model: ``main`` is the embedded one, ``v1`` another."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--name"
    for revision, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots").mkdir(exist_ok=True)
        tiny(repository / "snapshots" / commit)
    nudged(repository / "snapshots" / ("b" * 40) / "model.safetensors")
    return repository


def test_a_hub_id_is_its_revision_in_the_cache(hub: Path) -> None:
    assert weights_sha256("org/name") == weights_sha256("org/name@main") == weights_sha256("tiny")
    assert weights_sha256("org/name@v1") == weights_sha256("org/name@" + "b" * 40)
    assert weights_sha256("org/name@v1") == weights_sha256(str(hub / "snapshots" / ("b" * 40)))
    assert weights_sha256("org/name@v1") != weights_sha256("tiny")


@pytest.mark.parametrize("checkpoint", ["org/name@v2", "org/other", "org/name@v1"])
def test_what_is_not_in_the_cache_is_told_in_a_line(checkpoint: str, hub: Path) -> None:
    (hub / "snapshots" / ("b" * 40) / "model.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        weights_sha256(checkpoint, "original")
    assert (caught.value.argument, caught.value.value) == ("original", checkpoint)


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a model"):
        weights_sha256(str(tmp_path))
    copy = tiny(tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for elsewhere in ("../copy/model.safetensors", "nothing.safetensors", 7):
        (copy / "config.json").write_text(json.dumps(config | {"transformers_weights": elsewhere}))
        with pytest.raises(UserError, match="with safetensors weights"):
            weights_sha256(str(copy))
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="files that can be read"):
        weights_sha256(str(copy))
