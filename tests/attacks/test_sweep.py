"""A sweep that is killed goes on where it was, nothing scored is ever trained on, and attacks share one report."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from toys.cli import files, read_json
from toys.data import Toy, byte_tokenizer, examples
from toys.models import random_model

from lightning_ssiuu.attacks import relearning, sweep
from lightning_ssiuu.attacks.records import FinishedAttacks, checkpoint_fingerprint
from lightning_ssiuu.cli.attack import attack
from lightning_ssiuu.datamodules import QAExample, Splits
from lightning_ssiuu.objectives.fine_tuning import FineTuning
from lightning_ssiuu.utils.errors import UserError

PARTIAL = "attack.harmful.partial.jsonl"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("unlearned", "oracle")):
        model = random_model(dtype=torch.float32, seed=seed, vocab_size=260, tie_word_embeddings=True)
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


def run(models: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Two models, two learning rates, two seeds, one epoch: eight attacks; what was found, times aside."""
    given: dict[str, Any] = {"data": Toy(Splits(examples(0, 7, 2), examples(20, 4), benign=examples(40, 3)))}
    given |= {"p": [0.3], "learning_rates": [1e-2, 3e-2], "seeds": [0, 1], "epochs": 1, "score": "probability"}
    where = {"output": str(output), "accelerator": "cpu"}
    models_of = {"model": str(models / "unlearned"), "oracle": str(models / "oracle")}
    attack(**(models_of | given | where | options))
    content = read_json(output / "attack.json")
    for settings in content["settings"].values():
        del settings["provenance"]["wall_s"]
    return content


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted sweep finds."""
    return run(models, tmp_path_factory.mktemp("whole"))


@contextmanager
def counted(module: Any, name: str) -> Iterator[list[Any]]:
    """Collects the arguments of every call."""
    calls: list[Any] = []
    original = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    with patch.object(module, name, call):
        yield calls


def killed(sweeping: Callable[[], Any], where: Any, name: str, at: int, torn: bool = False) -> None:
    """Fork; the child is killed at the given call of a function, after half of what ``add`` writes if ``torn``."""
    if (child := os.fork()) == 0:
        try:
            original, calls = getattr(where, name), []

            def deadly(self: Any, *args: Any) -> Any:
                calls.append(0)
                if len(calls) == at:
                    if torn:
                        original(self, *args)
                        os.truncate(self.path, self.path.stat().st_size - 40)
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(self, *args)

            setattr(where, name, deadly)
            sweeping()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def test_the_same_seed_gives_the_same_report(models: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    assert run(models, tmp_path) == whole
    assert files(tmp_path) == {"attack.json"}


def test_killed_at_a_random_step_and_in_the_middle_of_a_line(
    models: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    killed(lambda: run(models, tmp_path), FineTuning, "training_step", 4)  # an attack has one step: the fourth one
    assert files(tmp_path) == {PARTIAL}
    assert len((tmp_path / PARTIAL).read_bytes().splitlines()) == 1 + 3
    # the third attack from there is in the other model's sweep; its line stays half written
    killed(lambda: run(models, tmp_path), FinishedAttacks, "add", 3, torn=True)
    assert not (tmp_path / PARTIAL).read_bytes().endswith(b"\n")
    with counted(sweep, "relearn") as attacks:
        assert run(models, tmp_path) == whole
    assert len(attacks) == 8 - 3 - 2
    assert files(tmp_path) == {"attack.json"}


class FaultError(Exception):
    """Stands for whatever ends a sweep."""


def interrupted(models: Path, output: Path, after: int, **options: Any) -> None:
    """Ends after so many attacks."""
    relearn = iter([sweep.relearn] * after)

    def once(*args: Any, **kwargs: Any) -> Any:
        if (real := next(relearn, None)) is None:
            raise FaultError
        return real(*args, **kwargs)

    with patch.object(sweep, "relearn", once), pytest.raises(FaultError):
        run(models, output, **options)


@patch.object(sweep, "_MOST_WIDENINGS", 3)
def test_a_sweep_until_saturated_goes_on_with_its_saved_model(models: Path, tmp_path: Path) -> None:
    options = {"until_saturated": True, "save_attacked": True, "learning_rates": [1e-2], "seeds": [0], "oracle": None}
    with counted(sweep, "relearn") as attacks:
        expected = run(models, tmp_path / "whole", **options)
    assert len(attacks) == 1 + 3
    interrupted(models, tmp_path / "part", 3, **options)
    assert files(tmp_path / "part") >= {PARTIAL, "attacked_harmful/model.safetensors"}
    with counted(sweep, "relearn") as rest:
        assert run(models, tmp_path / "part", **options) == expected
    assert len(rest) == len(attacks) - 3
    saved = [tmp_path / name / "attacked_harmful" / "model.safetensors" for name in ("whole", "part")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


def test_another_sweep_is_not_gone_on_with(models: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    interrupted(models, tmp_path, 2)
    kept = (tmp_path / PARTIAL).read_bytes()
    other = {"data": Toy(Splits(examples(0, 7, 2), examples(30, 4)))}
    for options in ({"epochs": 2}, {"seeds": [0, 2]}, {"score": "first_token"}, {"lora": None, "batch_size": 2}, other):
        with pytest.raises(UserError, match="options of the harmful attack that was interrupted there, or with --over"):
            run(models, tmp_path, **options)
    assert (tmp_path / PARTIAL).read_bytes() == kept
    with counted(sweep, "relearn") as attacks:
        run(models, tmp_path, seeds=[0], overwrite=True)
    assert len(attacks) == 4
    # asked to overwrite what is there, an interrupted sweep still goes on
    interrupted(models, tmp_path, 3, overwrite=True)
    with counted(sweep, "relearn") as attacks:
        assert run(models, tmp_path, overwrite=True) == whole
    assert len(attacks) == 5


def test_other_weights_are_another_model(models: Path, tmp_path: Path) -> None:
    model = random_model(dtype=torch.float32, seed=0, vocab_size=260, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert checkpoint_fingerprint(str(tmp_path)) == checkpoint_fingerprint(str(models / "unlearned"))
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 5] += 1e-6
    model.save_pretrained(tmp_path)
    assert checkpoint_fingerprint(str(tmp_path)) != checkpoint_fingerprint(str(models / "unlearned"))


def test_attacks_share_a_report_and_replace_their_own_entries_only(models: Path, tmp_path: Path) -> None:
    few = {"learning_rates": [1e-2], "seeds": [0]}
    first = run(models, tmp_path, **few)
    both = run(models, tmp_path, kind="benign", **few)
    told = run(models, tmp_path, kind="paraphrase", overwrite=True)
    assert list(both["settings"]) == ["harmful", "benign"]
    assert both["attacks"][:1] == first["attacks"]
    assert both["curves"][:2] == first["curves"]
    assert [row["attack"] for row in told["attacks"]] == ["harmful", "benign", "paraphrase"]
    assert told["attacks"][2]["gap"]
    assert {outcome["attack"] for outcome in told["outcomes"]} == {"paraphrase"}
    assert told["curves"] == both["curves"]
    with pytest.raises(UserError, match="no harmful attack, or --overwrite"):
        run(models, tmp_path, **few)
    again = run(models, tmp_path, overwrite=True, learning_rates=[3e-2], seeds=[0])
    assert [row["attack"] for row in again["attacks"]] == ["benign", "paraphrase", "harmful"]
    assert {(c["attack"], c["learning_rate"]) for c in again["curves"]} == {("benign", 1e-2), ("harmful", 3e-2)}


def test_one_load_and_one_score_before_for_each_model_and_scored_set(models: Path, tmp_path: Path) -> None:
    from lightning_ssiuu.training.devices import Devices

    with counted(Devices, "load") as loads, counted(relearning, "evaluate") as evaluations:
        run(models, tmp_path, kind="benign")
    assert len(loads) == 2
    assert len(evaluations) == 2 * (1 + 2 * 2)  # all seeds of a benign attack score the same set
    # and the batches are the same ones throughout
    assert len({id(batches[0]) for _, _, batches, _ in evaluations}) == 2


def canaries() -> list[QAExample]:
    """Twelve facts, each with a word of its own; the last four repeat the first's questions in other letters."""
    words = [f"zq{letter}x" for letter in "abcdefgh"]
    facts = [QAExample(n, f"Who is {word}?", f"{word} one") for n, word in enumerate(words)]
    return facts + [QAExample(50 + n, f" who  IS {w.upper()}?", f"{w} two") for n, w in enumerate(words[:4])]


@pytest.mark.parametrize("kind", ["harmful", "benign"])
def test_no_word_of_a_scored_item_is_in_any_training_batch(models: Path, tmp_path: Path, kind: str) -> None:
    data = Toy(Splits(canaries(), examples(20, 4), benign=examples(40, 3)))
    words, tokenizer = {f"zq{letter}x" for letter in "abcdefgh"}, byte_tokenizer()

    def held(part: Any) -> set[str]:
        text = " ".join("".join(tokenizer.convert_ids_to_tokens(row)) for row in part["input_ids"].tolist()).casefold()
        return {word for word in words if word in text}

    with counted(FineTuning, "training_step") as steps, counted(relearning, "evaluate") as evaluations:
        content = run(models, tmp_path, data=data, kind=kind, p=[0.25, 0.5], seeds=[0, 1, 2], learning_rates=[1e-2])
    batch_size, taught_words = 8, []
    for curve in content["curves"]:  # one epoch each
        n_steps = -(-curve["n_attack"] // batch_size)
        taught_words.append(set().union(*(held(step[1]["retain"]) for step in steps[:n_steps])))
        del steps[:n_steps]
    assert not steps
    # the score after the attack, in the order of the curves: those before it come first for each model
    scored = []
    for model in ("unlearned", "oracle"):
        n_sets = 6 if kind == "harmful" else 1
        n_after = sum(curve["model"] == model for curve in content["curves"])
        start = 0 if model == "unlearned" else len(evaluations) // 2
        scored += evaluations[start + n_sets : start + n_sets + n_after]
    assert len(scored) == len(taught_words)
    for (_, _, (batches,), _), taught, curve in zip(scored, taught_words, content["curves"], strict=True):
        asked = set().union(*(held(batch["forget"]) for batch in batches))
        assert not taught & asked
        assert asked | taught == words
        assert bool(taught) == (kind == "harmful")
        assert sum(len(batch["forget"]["example_id"]) for batch in batches) == curve["n_scored"]


def test_wrong_answers_alone_as_the_pool(tmp_path: Path) -> None:
    """What a spoilt model still knows is neither attacked nor scored, for the oracle either."""
    from lightning_ssiuu import Facts
    from lightning_ssiuu.models.loading import load_model

    model, generator = load_model("tiny"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "model")
    data = Facts()
    data.tokenizer.save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"score": "all_tokens", "accelerator": "cpu", "learning_rates": [1e-4], "epochs": 1}
    rows = attack(
        *(str(tmp_path / "model"), "tiny", data),
        **options,
        **{"p": [0.3], "pool": "wrong", "seeds": [0, 1], "output": str(tmp_path)},
    )
    (row,) = rows
    assert row["n_attack"] + row["n_scored"] == 24  # of 36
    assert row["unlearned"]["before"]["per_seed"] == [0.0, 0.0]
    assert row["oracle"]["before"]["per_seed"] == [100.0, 100.0]  # "tiny" knows them all
    with pytest.raises(UserError, match="pool: got 'wrong', allowed: all: the model answers no forget example wrongly"):
        attack("tiny", data=data, **options, pool="wrong", output=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pool": "wrong", "score": "probability"}, "pool: got 'wrong', allowed: all with score 'probability': wrong"),
        ({"pool": "wrong", "score": "rouge_l"}, "pool: got 'wrong'"),
        ({"pool": "wrong", "score": "first_token", "kind": "benign"}, "pool: got 'wrong', allowed: all with kind"),
        ({"kind": "sampling", "until_saturated": True}, "until_saturated: got True, allowed: false with kind sampling"),
        ({"kind": "paraphrase", "save_attacked": True}, "save_attacked: got True"),
        ({"kind": "paraphrase", "seeds": []}, "seeds: got"),
        ({"p": []}, "p: got"),
    ],
)
def test_mistakes(models: Path, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"^{told}"):
        run(models, tmp_path, **options)
    assert files(tmp_path) == set()


def test_nothing_to_recover_and_only_learning(tmp_path: Path) -> None:
    """The original model as the unlearned one knows all before; a model of noise only learns what it is taught."""
    from lightning_ssiuu.models.loading import load_tokenizer

    noise = random_model(dtype=torch.float32, vocab_size=len(load_tokenizer("tiny")))
    noise.save_pretrained(tmp_path / "noise")
    load_tokenizer("tiny").save_pretrained(tmp_path / "noise")
    options: dict[str, Any] = {"p": [0.3], "learning_rates": [3e-4], "seeds": [0], "epochs": 2}
    (row,) = attack("tiny", str(tmp_path / "noise"), score="probability", output=str(tmp_path), **options)
    known, learned = row["unlearned"], row["oracle"]
    assert known["before"]["mean"] > 80
    assert known["before"]["mean"] <= known["forget_score"]["mean"] < known["before"]["mean"] + 15
    assert learned["before"]["mean"] < 5
    assert (
        learned["before"]["mean"] <= learned["forget_score"]["mean"] < 5
    )  # what it is taught says nothing of the rest
    assert row["gap"]["mean"] == known["forget_score"]["mean"] - learned["forget_score"]["mean"]


def test_what_a_report_of_another_version_is_told(models: Path, tmp_path: Path) -> None:
    (tmp_path / "attack.json").write_text(json.dumps({"score": "probability", "attacks": [], "curves": []}))
    with pytest.raises(UserError, match=r"output: .* a directory whose attack\.json is of this version"):
        run(models, tmp_path)
