"""Attacks that leave the weights alone on two processes against one: the same outcomes, and nothing waits for ever."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tokenizers import decoders
from toys.data import Toy, byte_tokenizer, examples
from toys.models import random_model, widened
from toys.ranks import ranks

from lightning_ssiuu import Facts
from lightning_ssiuu.attacks import (
    Ablation,
    EmbeddingAttack,
    LayerProbes,
    Paraphrase,
    Quantization,
    Sampling,
    SoftPrompt,
    SuffixSearch,
    UnlearningDepth,
)
from lightning_ssiuu.attacks.base import Target
from lightning_ssiuu.datamodules import Splits
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.training import devices
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.distributed import rank

STRATEGIES = ("ddp", "fsdp2")
KINDS = ("ablation", "sampling", "paraphrase", "layer_probes", "unlearning_depth")
#: Not with weights that are cut over ranks, and how far rounding may move them.
WHOLE = {"quantization": 1e-4, "soft_prompt": 1e-6, "suffix_search": 1e-9, "embedding_attack": 1e-6}


def _odd_data() -> Toy:
    """Sets that nothing divides, and one example with a second paraphrase: fewer than there are ranks."""
    forget = [replace(one, answer=f"{one.example_id}") for one in examples(0, 7, 2)]
    forget[2] = replace(forget[2], paraphrases=("SECRET first?", "SECRET second?"))
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()  # a suffix has to be read back
    return Toy(Splits(forget, examples(20, 5, 2)), tokenizer, eval_batch_size=3)


def _load_model(checkpoint: str, dtype: Any, *args: Any, **kwargs: Any) -> Any:
    """In the type that was saved, float64, which the attacks do not offer."""
    return widened(load_model(checkpoint, "auto", *args, **kwargs))


def _work(folder: Path, n_devices: int, *strategies: Any) -> int:
    """Every attack under every strategy; outcomes of every rank in ``<strategy>.<devices>.<rank>``."""
    for strategy in strategies:
        where = Devices("cpu", n_devices, strategy)
        targets = [Target("model", str(folder / "unlearned"), where)]
        original = str(folder / "original")
        attacks: Any = [
            (Ablation(original, 5, alpha=0.1, draws=1), "truth_ratio_forget"),
            (Sampling(k=2, top_p=0.9, seeds=[3]), "rouge_l"),
            (Paraphrase(), "probability"),
            (LayerProbes(seeds=[0]), "probability"),
        ]
        if not where.sharded:
            soft = SoftPrompt(seeds=[0], steps=2, n_vectors=2)
            suffix = SuffixSearch(seeds=[0], steps=1, n_tokens=2, candidates=3)
            attacks += [(attack, "probability") for attack in (soft, suffix, EmbeddingAttack("Yes", steps=2))]
        with where.launched():
            found = []
            with patch.object(devices, "load_model", _load_model):
                for attack, score in attacks:
                    attack.check(_odd_data(), score, where)
                    found += attack.run(targets, _odd_data(), score, where)
                both = [*targets, Target("oracle", str(folder / "oracle"), where)]
                found += UnlearningDepth(original, 0.0).run(both, _odd_data(), "probability", where)
            if not where.sharded:
                found += Quantization(["4bit"]).run([Target("model", "tiny", where)], Facts(), "probability", where)
            text = json.dumps([asdict(one) for one in found])
            (folder / f"{strategy}.{n_devices}.{rank()}").write_text(text, encoding="utf-8")
    return 0


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without")
    for seed, name in enumerate(("original", "unlearned", "oracle")):
        random_model(seed=seed, vocab_size=260, tie_word_embeddings=True).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    _work(folder, 1, "auto")
    end = ranks(partial(_work, folder, 2, *STRATEGIES), folder / "processes", 240)
    assert end.status == 0, end.err[-3000:]
    assert end.left == []
    assert "SECRET" not in end.err
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_outcomes(results: Path, strategy: str) -> None:
    expected = json.loads((results / "auto.1.0").read_text(encoding="utf-8"))
    first, second = (json.loads((results / f"{strategy}.2.{n}").read_text(encoding="utf-8")) for n in (0, 1))
    assert first == second  # both ranks know everything
    assert {one["kind"] for one in expected} == {*KINDS, *WHOLE}
    if strategy == "fsdp2":
        expected = [one for one in expected if one["kind"] not in WHOLE]
    assert len(first) == len(expected)
    for given, one in zip(first, expected, strict=True):
        for key in ("before", "forget_score"):
            tolerance = WHOLE.get(one["kind"], 1e-9)
            assert given.pop(key) == pytest.approx(one.pop(key), rel=tolerance, abs=1e-12)
        assert given == one


def test_the_attacks_did_something(results: Path) -> None:
    found = json.loads((results / "auto.1.0").read_text(encoding="utf-8"))
    ablated = [one for one in found if one["kind"] == "ablation"]
    assert all(one["n_neurons"] > 3 for one in ablated)
    assert len({one["forget_score"] for one in ablated}) == len(ablated) == 2 * 2
    moved = [one for one in found if one["kind"] not in ("ablation", "sampling")]
    assert all(one["forget_score"] != one["before"] for one in moved if one["kind"] != "layer_probes")
