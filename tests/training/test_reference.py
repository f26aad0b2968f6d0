"""What the original model says about training examples: from disk, from a second model, from the same one unadapted."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError
from torch import Tensor
from toys.data import Toy, byte_tokenizer, examples
from toys.models import bare_trainer, equal, random_model

from lightning_ssiuu.datamodules import Splits
from lightning_ssiuu.models.answers import AnswerModel, Answers, Part
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.training.reference import Observation, reference_folder, reference_logits, reference_logps
from lightning_ssiuu.utils.errors import UserError


class Comparing(UnlearningModule):
    """Keeps what it was told about each example."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.told: list[tuple[Tensor, Tensor, Answers]] = []

    def references(self) -> dict[str, Observation]:
        observed = {"forget/logps": reference_logps, "forget/logits": reference_logits}
        return super().references() | observed

    def forget_loss(self, batch: Part) -> Tensor:
        logps, logits = self.original("forget/logps", batch), self.original("forget/logits", batch)
        self.told.append((logps, logits, self.original_model(batch)))
        assert not logps.requires_grad
        return (self.answers(batch).logps - logps).mean()

    def original_model(self, batch: Part) -> Answers:
        with torch.no_grad():
            return self.untouched(batch["input_ids"], batch["attention_mask"], batch["labels"])


def trained(
    folder: Path,
    steps: int = 3,
    resume: str | None = None,
    dropout: float = 0.0,
    splits: Splits | None = None,
    **kwargs: Any,
) -> Comparing:
    module = Comparing(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **kwargs)
    options = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    model = random_model("gpt2", torch.float64, vocab_size=260, **options)
    if module.lora is not None:
        module.lora.attach(model)
    object.__setattr__(module, "untouched", AnswerModel(random_model("gpt2", torch.float64, vocab_size=260)))
    module.adopt(AnswerModel(model), byte_tokenizer())
    data = Toy(splits, tokenizer=byte_tokenizer(), batch_size=2)
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = bare_trainer(steps, devices=1, default_root_dir=folder, callbacks=[keep], enable_checkpointing=True)
    trainer.fit(module, data, ckpt_path=resume)
    return module


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_SSIUU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "options",
    [{}, {"reference": "second_model"}, {"lora": LoRA(r=2)}, {"dropout": 0.3}, {"retain": "kl"}],
    ids=str,
)
def test_every_source_tells_what_the_untouched_model_says(tmp_path: Path, options: dict[str, Any]) -> None:
    module = trained(tmp_path, **options)
    assert len(module.told) == 3
    for logps, logits, answers in module.told:
        torch.testing.assert_close(logps, answers.logps, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logits, answers.logits, rtol=1e-12, atol=1e-12)
    folders = list((tmp_path / "cache" / "references").glob("*")) if (tmp_path / "cache").exists() else []
    assert len(folders) == (0 if "lora" in options or "reference" in options else 1)


@pytest.mark.parametrize(("size", "files"), [(1, 1), (1 << 20, 1), (1, 3)])
def test_values_lie_in_few_files_in_whatever_order_the_ids_are(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, size: int, files: int
) -> None:
    """Two observations of a set that is looked at 16 examples at a time."""
    monkeypatch.setattr("lightning_ssiuu.training.reference._SHARD", size)
    some = examples(0, 5) if files == 1 else examples(0, 40)
    module = trained(tmp_path, splits=Splits(some[::-1], examples(100, 7)))
    for logps, logits, answers in module.told:
        torch.testing.assert_close(logps, answers.logps, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logits, answers.logits, rtol=1e-12, atol=1e-12)
    assert len(list(cache.rglob("*.safetensors"))) == 2 * files + 1


def test_a_second_run_reads_what_the_first_one_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained(tmp_path)
    monkeypatch.setattr("lightning_ssiuu.training.reference.store", None)
    second = trained(tmp_path)
    assert first.reference_key == second.reference_key
    assert equal([logps for logps, *_ in first.told], [logps for logps, *_ in second.told])
    assert (reference_folder(str(first.reference_key)).stat().st_mode & 0o077) == 0


def test_other_weights_are_another_reference(tmp_path: Path) -> None:
    key = trained(tmp_path).reference_key
    model = AnswerModel(random_model("gpt2", torch.float64, seed=1, vocab_size=260))
    module = Comparing(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    object.__setattr__(module, "untouched", model)
    module.adopt(model, byte_tokenizer())
    bare_trainer(1, devices=1).fit(module, Toy(tokenizer=byte_tokenizer(), batch_size=2))
    assert module.reference_key != key


@pytest.mark.parametrize("changed", ["question", "answer"])
def test_other_text_under_the_same_ids_is_another_reference(tmp_path: Path, changed: str) -> None:
    key = trained(tmp_path / "a").reference_key
    others = [replace(e, **{changed: getattr(e, changed)[::-1]}) for e in examples(0, 5)]
    module = trained(tmp_path / "b", splits=Splits(others, examples(10, 7), examples(20, 3)))
    assert module.reference_key != key
    for logps, logits, answers in module.told:
        torch.testing.assert_close(logps, answers.logps, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logits, answers.logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("source", ["cached", "second_model"])
def test_the_second_model_is_apart_and_unchanged(tmp_path: Path, source: Any) -> None:
    module = trained(tmp_path, reference=source)
    names = [name for name, _ in module.named_parameters()]
    assert names == [f"model.{name}" for name, _ in module.model.named_parameters()]
    if source == "second_model":
        second: AnswerModel = module._reference.model  # type: ignore[union-attr]
        storages = {p.data_ptr() for p in module.parameters()}
        assert not storages & {p.data_ptr() for p in second.parameters()}
        assert not any(p.requires_grad for p in second.parameters())
        assert equal(second.parameters(), module.untouched.parameters())
        optimised = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
        assert not optimised & {id(p) for p in second.parameters()}
    assert not equal(module.model.parameters(), module.untouched.parameters())


def test_a_resumed_run_hears_the_original_and_not_its_own_checkpoint(tmp_path: Path, cache: Path) -> None:
    whole = trained(tmp_path / "a", steps=4)
    half = trained(tmp_path / "b", steps=2)
    again = trained(tmp_path / "b", steps=4, resume=str(tmp_path / "b" / "step=2.ckpt"))
    assert again.reference_key == half.reference_key
    assert equal(again.model.parameters(), whole.model.parameters())
    shutil.rmtree(cache)
    with pytest.raises(UserError, match=r"ckpt_path: .* reference is still there .* second_model"):
        trained(tmp_path / "b", steps=5, resume=str(tmp_path / "b" / "step=2.ckpt"))


def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTNING_SSIUU_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"LIGHTNING_SSIUU_CACHE: got .* allowed: a directory that can be written"):
        trained(tmp_path)


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("lightning_ssiuu.training.reference.save_file", full)
    with pytest.raises(UserError, match=r"LIGHTNING_SSIUU_CACHE: got .* a directory to write to \(.*No space left"):
        trained(tmp_path)
    assert not list((tmp_path / "cache" / "references").iterdir())


def test_of_two_runs_at_once_the_first_one_s_values_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one's folder appears just before this one's would."""
    rename, moved = Path.rename, []

    def late(self: Path, target: Path) -> Path:
        if self.name.startswith(".partial-"):
            shutil.copytree(self, target)
            moved.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    module = trained(tmp_path)
    assert moved == [reference_folder(str(module.reference_key))]
    assert list((tmp_path / "cache" / "references").iterdir()) == moved


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match=r"reference: got 'third', allowed: one of \['cached', 'second_model'\]"):
        Comparing(reference="third")
    with pytest.raises(UserError, match=r"retain: got 'none', allowed: one of \['nll', 'kl'\]"):
        Comparing(retain="none")
