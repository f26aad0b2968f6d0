"""``privacy``: every attack against loops over single answers, and the command."""

from __future__ import annotations

import math
import zlib
from itertools import product
from pathlib import Path

import pytest
import torch
from toys.cli import command, read_json, write_rows
from toys.data import Toy
from toys.json_files import undocumented

from lightning_ssiuu.datamodules.splits import QAExample
from lightning_ssiuu.evaluation.metrics.truth_ratio import forget_quality
from lightning_ssiuu.evaluation.privacy import Measured, compare_with_oracle, measure
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model, load_tokenizer

ATTACKS = ["gradient_norm", "loss", "min_k", "min_k_plus_plus", "zlib"]


@pytest.fixture(scope="module")
def models() -> dict[str, AnswerModel]:
    """The tiny model, and the same with noise."""
    noisy = load_model("tiny")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in noisy.parameters():
            weight += 0.1 * weight.std() * torch.randn_like(weight)
    return {"model": AnswerModel(load_model("tiny")), "oracle": AnswerModel(noisy)}


@pytest.fixture(scope="module")
def data() -> Toy:
    return Toy(tokenizer=load_tokenizer("tiny"), eval_batch_size=3)


@pytest.fixture(scope="module")
def measured(models: dict[str, AnswerModel], data: Toy) -> dict[str, Measured]:
    return {name: measure(model, data, data.splits.test, 0.5, True) for name, model in models.items()}


def by_hand(model: AnswerModel, data: Toy, example: QAExample) -> dict[str, float]:
    """Scores of one answer."""
    sequence = data.encoder.sequence(example.question, example.answer)
    ids, start = torch.tensor(sequence.input_ids), sequence.n_prompt
    model.hf.zero_grad()
    logps = model.hf(ids.unsqueeze(0)).logits[0, start - 1 : -1].log_softmax(-1)
    own = logps.gather(1, ids[start:].unsqueeze(1)).squeeze(1)
    own.mean().backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None))
    model.hf.zero_grad(set_to_none=True)
    logps, own = logps.detach(), own.detach()
    mean = (logps.exp() * logps).sum(1)
    standard = (own - mean) / ((logps.exp() * logps.square()).sum(1) - mean.square()).sqrt()
    n = max(1, int(0.5 * len(own)))
    loss = own.mean().item()
    text = data.tokenizer.decode(sequence.input_ids[start:-1])
    return {
        "gradient_norm": -norm,
        "loss": loss,
        "min_k": own.sort().values[:n].mean().item(),
        "min_k_plus_plus": standard.sort().values[:n].mean().item(),
        "zlib": loss / len(zlib.compress(text.encode())),
    }


def auc(members: list[float], others: list[float]) -> float:
    """Percent of pairs in which the member scores higher."""
    return 100 * sum((a > b) + 0.5 * (a == b) for a, b in product(members, others)) / len(members) / len(others)


def test_attacks_equal_loops(models: dict[str, AnswerModel], data: Toy, measured: dict[str, Measured]) -> None:
    sets = {"forget": data.splits.forget, "test": data.splits.test}
    for name, model in models.items():
        hand = {split: [by_hand(model, data, example) for example in sets[split]] for split in sets}
        assert list(measured[name].scores) == ATTACKS
        for attack in ATTACKS:
            values = {split: [one[attack] for one in hand[split]] for split in sets}
            for split in sets:
                found = measured[name].scores[attack][split].tolist()
                assert found == pytest.approx(values[split], rel=2e-3), (attack, split)
            assert measured[name].auc()[attack] == pytest.approx(auc(values["forget"], values["test"]))
        assert all(parameter.grad is None for parameter in model.parameters())


def test_against_the_oracle(measured: dict[str, Measured]) -> None:
    ours, theirs = measured["model"], measured["oracle"]
    found = compare_with_oracle(ours, theirs)
    gain = {s: (ours.scores["loss"][s] - theirs.scores["loss"][s]).tolist() for s in ("forget", "test")}
    assert found["reference_auc"] == pytest.approx(auc(gain["forget"], gain["test"]))
    for attack in ATTACKS:
        a, b = ours.auc()[attack], theirs.auc()[attack]
        expected = math.nan if b == 100 else 100 * (b - a) / (100 - b)
        assert found["privleak"][attack] == pytest.approx(expected, nan_ok=True)
    assert len(ours.ratios) == 5
    assert found["forget_quality"] == forget_quality(ours.ratios, theirs.ratios)
    itself = compare_with_oracle(ours, ours)
    assert (itself["reference_auc"], itself["forget_quality"]) == (50, 1)


def test_without_gradients_or_options(models: dict[str, AnswerModel]) -> None:
    plain = Toy(tokenizer=load_tokenizer("tiny"), multiple_choice=False)
    found = measure(models["model"], plain, plain.splits.test, 0.4, False)
    assert list(found.scores) == ATTACKS[1:]
    assert compare_with_oracle(found, found)["forget_quality"] is None


def test_command(tmp_path: Path) -> None:
    others = [{"question": f"Who wrote book {n}?", "answer": f"Author {n}"} for n in range(6)]
    path = write_rows(tmp_path / "others.jsonl", others)
    out = tmp_path / "out"
    given = ("privacy", "--model", "tiny", "--output", out, "--nonmembers", path, "--gradient_norm", "false")
    result = command(*given, "--oracle", "tiny")
    assert result.status == 0, result.err
    content = read_json(out / "privacy.json")
    assert not undocumented(out)
    assert (content["n_forget"], content["n_nonmembers"], content["nonmembers"]) == (36, 6, "given")
    assert content["forget_quality"] == 1
    assert content["reference_auc"] == 50
    assert content["membership_auc"]["model"] == content["membership_auc"]["oracle"]
    assert content["membership_auc"]["model"]["loss"] == 100  # it knows the ones and has never heard of the others
    again = command(*given)
    assert (again.status, "a directory without privacy.json" in again.err) == (2, True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--k", "0"), "k: got 0.0"),
        (("--oracle", "/no/such"), "oracle: got '/no/such'"),
        (("--nonmembers", "/no/such.json"), "nonmembers: got '/no/such.json'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, options: tuple[str, ...], named: str) -> None:
    result = command("privacy", "--model", "tiny", "--output", tmp_path / "out", *options)
    assert (result.status, named in result.err, result.err.count("\n")) == (2, True, 1), result.err
    assert not (tmp_path / "out").exists()
