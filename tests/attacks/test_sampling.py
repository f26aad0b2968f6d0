"""Sampling: draws against hand-made distributions and a slow reference, best of k, and what must not change it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import decoders
from toys.data import Toy, byte_tokenizer, examples
from toys.models import random_model
from transformers import TopPLogitsWarper

from lightning_ssiuu.attacks import base, sampling
from lightning_ssiuu.attacks.base import Outcome, Target, outcome_rows
from lightning_ssiuu.attacks.sampling import Sampling, begins_with, sampled
from lightning_ssiuu.datamodules import QAExample, Splits
from lightning_ssiuu.evaluation.predictions import grouped
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.drawing import draw
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError

HERE = Devices("cpu")


def outcomes(checkpoint: str, data: Toy, score: str, attack: Sampling, *names: str) -> list[Outcome]:
    """What sampling finds on a model, or on it under several names."""
    return list(attack.run([Target(name, checkpoint, HERE) for name in names or ("model",)], data, score, HERE))


def toy_data(**kwargs: Any) -> Toy:
    # Short answers of different lengths: continuations of different lengths.
    forget = [QAExample(n, f"Q{n}" + "?" * n, "ab"[: 1 + n % 2]) for n in range(5)]
    return Toy(Splits(forget, examples(10, 3)), **kwargs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sampling") / "model"
    random_model("llama", torch.float32, vocab_size=260).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def rows_of(probabilities: list[float], uniforms: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.tensor(probabilities, dtype=torch.float64).log().repeat(len(uniforms), 1)
    return logits, torch.tensor(uniforms, dtype=torch.float64)


def test_draws_by_hand() -> None:
    logits, uniforms = rows_of([0.1, 0.0, 0.6, 0.3], [0.0, 0.09, 0.11, 0.69, 0.71, 1 - 2**-53])
    assert draw(logits, uniforms, 1.0).tolist() == [0, 0, 2, 2, 3, 3]
    # 0.7 takes the 0.6 and the 0.3, which is the first to reach it; they then share everything two to one
    assert draw(logits, uniforms, 1.0, top_p=0.7).tolist() == [2, 2, 2, 3, 3, 3]
    assert draw(logits, uniforms, 1.0, top_p=0.5).tolist() == [2] * 6
    assert draw(logits, uniforms, 0.0).tolist() == [2] * 6
    assert draw(logits, uniforms, 1e-6).tolist() == [2] * 6
    # squared: 0.01, 0.36, 0.09 of 0.46
    assert draw(logits[:4], torch.tensor([0.02, 0.03, 0.80, 0.81]), 0.5).tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.8])
def test_draws_have_the_right_frequencies(temperature: float, top_p: float | None) -> None:
    """Evenly spread random numbers fall on a token as often as its probability says; top-p as transformers has it."""
    logits = 2 * torch.randn(1, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n = 20_000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = draw(logits.repeat(n, 1), uniforms, temperature, top_p).bincount(minlength=12)
    scaled = logits / temperature
    if top_p is not None:
        scaled = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), scaled)
    assert ((counts / n) - scaled.softmax(-1)[0]).abs().max() <= 1 / n


def slowly(model: AnswerModel, data: Toy, row: int, seed: int, number: int, options: Sampling) -> str:
    """One sample of one example: alone, without a cache, a whole forward pass per token, in numpy."""
    example, tokenizer = data.splits.forget[row], data.tokenizer
    sequence = data.encoder.sequence(example.question, example.answer)
    ids, numbers = sequence.input_ids[: sequence.n_prompt], np.random.default_rng([seed, example.example_id, number])
    new: list[int] = []
    while len(new) < 2 * (len(sequence) - sequence.n_prompt) and tokenizer.eos_token_id not in new:
        with torch.no_grad():
            logits = model.hf(torch.tensor([ids + new])).logits[0, -1].double().numpy() / options.temperature
        p = np.exp(logits - logits.max())
        p /= p.sum()
        if options.top_p is not None:
            order = np.argsort(-p)
            p[order[np.searchsorted(p[order].cumsum(), options.top_p) + 1 :]] = 0
        new.append(int(np.searchsorted((p / p.sum()).cumsum(), numbers.random(), side="right")))
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("options", [Sampling(temperature=0.7), Sampling(temperature=1.3, top_p=0.6)])
def test_samples_are_those_of_a_slow_reference(checkpoint: str, options: Sampling) -> None:
    data, model = toy_data(eval_batch_size=3), HERE.load(checkpoint)
    parts = [batch["forget"] for batch in data.eval_dataloader("forget")]
    of_example = sampled(grouped(model, data.tokenizer, parts), replace(options, k=2, seeds=[0, 3]))
    found = {
        (row, seed, number): text
        for row, of_seed in enumerate(of_example)
        for seed, texts in zip((0, 3), of_seed, strict=True)
        for number, text in enumerate(texts)
    }
    assert found == {key: slowly(model, data, *key, options) for key in found}
    assert len(found) == 5 * 2 * 2
    assert len(set(found.values())) > 12


@pytest.mark.parametrize("score", ["rouge_l", "probability"])
def test_greedy_where_nothing_is_random(checkpoint: str, score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure itself is replaced by one that tells any two texts apart."""
    monkeypatch.setitem(sampling.ROUGE, "rouge_l", lambda text, answer: sum(map(ord, text)) / 1e6)
    monkeypatch.setattr(sampling, "begins_with", lambda text, answer: sum(map(ord, text)) / 1e6)
    for temperature in (0.0, 1e-6):
        options = Sampling(k=1, temperature=temperature, seeds=[5])
        (found,) = outcomes(checkpoint, toy_data(), score, options)
        assert found.forget_score == found.before > 0
    (found,) = outcomes(checkpoint, toy_data(), score, Sampling(k=1, seeds=[5]))
    assert found.forget_score != found.before


def test_neither_batches_nor_other_seeds_change_a_sample(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sampling.ROUGE, "rouge_l", lambda text, answer: sum(map(ord, text)) / 1e6)

    def scores(eval_batch_size: int, seeds: list[int], k: int = 3) -> list[float]:
        data = toy_data(eval_batch_size=eval_batch_size)
        found = outcomes(checkpoint, data, "rouge_l", Sampling(k, seeds=seeds))
        assert [one.seed for one in found] == seeds
        return [one.forget_score for one in found]

    expected = scores(5, [0, 1])
    assert scores(2, [0, 1]) == expected
    assert scores(5, [1]) == expected[1:]
    assert expected[0] != expected[1]
    # The first samples are the same ones whatever k is, so more never find less.
    rising = [scores(5, [0], k)[0] for k in (1, 3)]
    assert rising[0] < rising[1] == expected[0]


def texts(evaluated: Any, options: Any) -> list[list[list[str]]]:
    """Sample 1 of example 0 and sample 0 of example 2 give the answer, half of it is in sample 1 of example 1."""
    said = [["no", "The red fox."], ["a fox", "red"], ["the RED fox was", "fox"]]
    return [[said[example]] * 2 for each in evaluated for example in each.part["example_id"].tolist()]


@pytest.mark.parametrize(
    ("score", "expected"),
    [("rouge_l", 100 * (1 + 1 / 3 + 1) / 3), ("all_tokens", 100 * 2 / 3), ("probability", 100 * 2 / 3)],
)
def test_best_of_k_by_hand(checkpoint: str, monkeypatch: pytest.MonkeyPatch, score: str, expected: float) -> None:
    monkeypatch.setattr(sampling, "sampled", texts)
    forget = [QAExample(n, f"Who is it, {n}?", "the red fox") for n in range(3)]
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    data = Toy(Splits(forget, examples(10, 3)), tokenizer, eval_batch_size=2)
    monkeypatch.setattr(base, "load_tokenizer", lambda checkpoint: tokenizer)
    found = outcomes(checkpoint, data, score, Sampling(k=2, seeds=[0, 7]), "model", "oracle")
    (row,) = outcome_rows(found)
    assert row["variant"] == "k=2, temperature=1"
    assert row["score"] == ("rouge_l" if score == "rouge_l" else "answer_given")
    assert row["unlearned"]["forget_score"]["per_seed"] == pytest.approx([expected] * 2)
    assert row["unlearned"]["before"]["per_seed"] == [0.0, 0.0]  # a random model's greedy words
    assert row["gap"]["per_seed"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (" Paris.", "paris", True),
        ("Parisian", "Paris", False),
        ("It is Paris", "Paris", False),
        ("new  york-city!", "New York", True),
        ("ÉCOLE normale", "école", True),
        ("", "Paris", False),
        ("Paris", "Paris, France", False),
        ("$$ or so", "$$", True),
        ("5 $$", "$$", False),
    ],
)
def test_begins_with(text: str, answer: str, expected: bool) -> None:
    assert begins_with(text, answer) is expected


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"k": 0}, "attack.k"),
        ({"k": 1.5}, "attack.k"),
        ({"temperature": -1.0}, "attack.temperature"),
        ({"temperature": float("nan")}, "attack.temperature"),
        ({"top_p": 0.0}, "attack.top_p"),
        ({"top_p": 1.1}, "attack.top_p"),
    ],
)
def test_mistakes(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(UserError, match=argument):
        Sampling(**options)


def test_the_variant_names_all_options() -> None:
    assert [Sampling().variant, Sampling(4, 0.7, 0.9).variant] == [
        "k=8, temperature=1",
        "k=4, temperature=0.7, top_p=0.9",
    ]


def test_text_stays_inside(checkpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = Toy(Splits(examples(0, 2), examples(10, 3)))
    found = outcomes(checkpoint, data, "rouge_l", Sampling(k=1, seeds=[0]))
    shown = "".join(capfd.readouterr()) + repr(found) + repr(outcome_rows(found))
    assert "SECRET" not in shown
