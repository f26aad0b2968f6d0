"""The meta-evaluation's figures by hand, and the command on models whose knowledge is known."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from toys.cli import command, read_json
from toys.json_files import undocumented

from lightning_ssiuu.cli.meta_evaluate import _models
from lightning_ssiuu.evaluation.meta import faithfulness, joint, quantization_robustness, relearning_robustness
from lightning_ssiuu.models.export import save_pretrained
from lightning_ssiuu.models.loading import TINY, load_model, load_tokenizer


def test_faithfulness_is_the_share_of_pairs_in_the_right_order() -> None:
    knowing, ignorant = [90.0, 30.0, 30.0, 5.0], [30.0, 10.0, 40.0]
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(knowing, ignorant)]
    assert faithfulness(knowing, ignorant) == pytest.approx(100 * sum(pairs) / len(pairs))
    assert faithfulness([1.0], [0.0]) == 100
    assert faithfulness([0.0], [1.0]) == 0


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((10.0, 50.0, 5.0, 15.0), 25.0),  # rises four times as much as the oracle
        ((10.0, 20.0, 5.0, 25.0), 100.0),  # less than the oracle
        ((10.0, 8.0, 5.0, 15.0), 100.0),  # does not rise
        ((10.0, 30.0, 5.0, 4.0), 0.0),  # the oracle's falls
    ],
)
def test_relearning(scores: tuple[float, float, float, float], expected: float) -> None:
    assert relearning_robustness(*scores) == pytest.approx(expected)


def test_quantization_and_the_harmonic_mean() -> None:
    assert [quantization_robustness(*pair) for pair in ((10.0, 40.0), (40.0, 10.0), (0.0, 0.0), (0.0, 5.0))] == [
        *(25.0, 100.0),
        *(100.0, 0.0),
    ]
    assert joint([25.0, 100.0]) == pytest.approx(40.0)


def test_the_command_judges_scores_by_models(tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(TINY, models / "b" / "model")
    model = load_model("tiny")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_pretrained(model, load_tokenizer("tiny"), tmp_path / "noise")
    given = ("--knowing", f"[tiny, {models}]", "--ignorant", f"[{tmp_path / 'noise'}]")
    few = ("--unlearned", f"[{tmp_path / 'noise'}]", "--quantization", "8bit", "--p", "0.1", "--batch_size", "2")
    scores = ("--scores", "[probability, all_tokens]", "--inverted", "[all_tokens]", "--output", tmp_path / "out")
    result = command("meta-evaluate", *given, *few, *scores)
    assert result.status == 0, result.err
    content = read_json(tmp_path / "out" / "meta_evaluation.json")
    assert not undocumented(tmp_path)
    assert content["n"] == {"knowing": 2, "ignorant": 1, "unlearned": 1}
    found = content["scores"]
    assert (found["probability"]["faithfulness"], found["all_tokens"]["faithfulness"]) == (100.0, 0.0)
    assert found["probability"]["relearning"] == 100.0  # the oracle itself rises as much as itself
    assert content["relearned"]["unlearned[0]"] == content["relearned"]["ignorant[0]"]
    assert content["relearned"]["ignorant[0]"]["after"] != content["relearned"]["ignorant[0]"]["before"]
    assert set(content["quantized"]) == {"unlearned[0]"}
    assert set(found["probability"]) == {"faithfulness", "relearning", "quantization", "robustness", "overall"}
    assert set(content["relearned"]) == {"unlearned[0]", "ignorant[0]"}
    for options, told in (
        (("--knowing", "[tiny, tiny]", "--ignorant", "[tiny]"), "knowing: got 'tiny', allowed: each model once"),
        (("--knowing", f"[{tmp_path / 'out'}]", "--ignorant", "[tiny]"), "a model, or a directory of models or runs"),
        ((*given, "--p", "2"), "allowed"),
        (("--knowing", "[tiny]", "--ignorant", "[tiny]"), "ignorant: got 'tiny', allowed: models that are not among"),
        ((*given, "--scores", "[]"), "scores: got [], allowed: at least one"),
    ):
        refused = command("meta-evaluate", *options, "--output", tmp_path / "other")
        assert (refused.status, refused.err.count("\n")) == (2, 1), refused.err
        assert told in refused.err
    assert not (tmp_path / "other").exists()


def test_a_run_is_its_model_and_not_what_an_attack_left_beside_it(tmp_path: Path) -> None:
    for place in ("one/model", "one/attacked_harmful", "two/model", "bare"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").touch()
    assert _models("knowing", [str(tmp_path / "one")]) == [str(tmp_path / "one" / "model")]
    found = [str(tmp_path / place) for place in ("bare", "one/model", "two/model")]
    assert _models("knowing", [str(tmp_path)]) == found
