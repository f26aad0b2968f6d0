"""A model and its own tokenizer; generation settings stored with a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from toys.cli import FAST, command, files, refused
from toys.data import Toy, byte_tokenizer
from toys.models import random_model
from toys.training import FewFacts
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lightning_ssiuu.datamodules.encoding import Encoder
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.runs import check_tokenizers
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.checks import tokenizers_differ
from lightning_ssiuu.models.export import save_pretrained
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.utils.errors import UserError


def saved(folder: Path, rows: int, tokenizer: Any = None) -> str:
    """A checkpoint with so many embeddings and a tokenizer of 259 tokens: 256 bytes, end, beginning, padding."""
    random_model("llama", torch.float32, vocab_size=rows).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("rows", [100, 256, 257])
def test_tokens_beyond_the_embeddings(rows: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^checkpoint: got .*own tokenizer \({rows} embeddings, but \d+ tokens up to"):
        load_tokenizer(saved(tmp_path, rows))


def test_a_padding_token_beyond_the_embeddings_never_reaches_them(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 258)
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 256
    data = Toy(tokenizer=checkpoint, eval_batch_size=4)
    model = AnswerModel(load_model(checkpoint))
    for batch in data.eval_dataloader("test"):
        part = batch["test"]
        assert part["input_ids"].max() < 258
        predictions = Predictions(model, data.tokenizer, part)
        assert predictions.answers.logps.isfinite().all()
        assert len(predictions.generations) == len(part["input_ids"])


def test_added_special_tokens_may_lie_beyond_as_an_images_place_does(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    loaded = load_tokenizer(saved(tmp_path / "special", 259, tokenizer))
    Encoder(loaded)
    with pytest.raises(UserError, match=r"^template: got of one's own with <image>, allowed: .* of \(259\)$"):
        Encoder(loaded, "<image>{question}")
    tokenizer.add_tokens(["word"])
    with pytest.raises(UserError, match=r"259 embeddings, but 1 tokens up to id 260"):
        load_tokenizer(saved(tmp_path / "word", 259, tokenizer))


def unlike() -> dict[str, Any]:
    """Tokenizers of the byte tokenizer's size, by what they differ in."""
    letters = sorted(byte_tokenizer().get_vocab(), key=byte_tokenizer().get_vocab().__getitem__)
    vocabulary = {letter: number for number, letter in enumerate([letters[1], letters[0], *letters[2:]])}
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [])), **names)
    return {
        "another vocabulary": swapped,
        "other tokens that begin or end a text": byte_tokenizer(eos_token="<bos>", bos_token="<eos>"),
        "another way to split text": byte_tokenizer(bos=True),
    }


@pytest.mark.parametrize("difference", unlike())
def test_tokenizers_that_differ(difference: str, tmp_path: Path) -> None:
    other = unlike()[difference]
    assert tokenizers_differ(byte_tokenizer(), byte_tokenizer(chat="{{ messages }}", pad_token="<eos>")) is None
    assert tokenizers_differ(byte_tokenizer(), other) == difference
    checkpoint = saved(tmp_path, 259, other)
    with pytest.raises(UserError, match=rf"^oracle: got .* same tokenizer as the others, not {difference}"):
        check_tokenizers({"oracle": checkpoint}, Toy())


def test_data_with_a_tokenizer_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_data.py").write_text(
        "from lightning_ssiuu import Facts\n"
        "class Stubborn(Facts):\n"
        "    def __init__(self, tokenizer='tiny', **kwargs):\n"
        f"        super().__init__(tokenizer={saved(tmp_path / 'other', 259)!r}, **kwargs)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = ("--trainer.default_root_dir", tmp_path / "run")
    result = command("fit", "--model", "SSIUU", "--data", "my_own_data.Stubborn", *FAST, *run)
    refused(result, "data.tokenizer", "Stubborn", "not another vocabulary")
    assert not files(tmp_path / "run")


STORED = {
    "repetition_penalty": {"repetition_penalty": 5.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "suppress_tokens": {"suppress_tokens": list(range(3, 900))},
    "beams": {"num_beams": 3, "length_penalty": -5.0},
    "sampling": {"do_sample": True, "temperature": 50.0},
    "forced": {"forced_eos_token_id": 7, "min_new_tokens": 12},
    "short": {"max_new_tokens": 1, "max_length": 3},
}


@pytest.mark.parametrize("name", STORED)
def test_greedy_means_greedy(name: str, tmp_path: Path) -> None:
    model = load_model("tiny")
    model.generation_config.update(**STORED[name])
    model.save_pretrained(tmp_path)
    load_tokenizer("tiny").save_pretrained(tmp_path)
    data = FewFacts(n=4)
    part = next(iter(data.eval_dataloader("forget")))["forget"]
    plain, stored = (AnswerModel(load_model(checkpoint)) for checkpoint in ("tiny", tmp_path))
    greedy = Predictions(plain, data.tokenizer, part).generations
    assert Predictions(stored, data.tokenizer, part).generations == greedy
    save_pretrained(stored.hf, data.tokenizer, tmp_path / "again")  # what was stored is the model's own all the same
    kept = json.loads((tmp_path / "again" / "generation_config.json").read_text(encoding="utf-8"))
    assert STORED[name].items() <= kept.items()


def test_stored_settings_would_act(tmp_path: Path) -> None:
    """The test above could fail: left alone, the library lets them act."""
    model = load_model("tiny")
    part = next(iter(FewFacts(n=4).eval_dataloader("forget")))["forget"]
    ids = part["input_ids"][:1, :6]
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    model.generation_config.update(**STORED["suppress_tokens"])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.generate(ids, max_new_tokens=12, do_sample=False).tolist() != plain.tolist()
