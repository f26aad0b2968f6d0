"""A sweep that is killed goes on where it was, nothing scored is ever trained on, and attacks share one report."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any
from unittest.mock import patch

import pytest
import torch
from toys.cli import files
from toys.data import Toy, byte_tokenizer, examples
from toys.models import random_model
from toys.sweeps import PARTIAL, counted, harmful, interrupted, run

from lightning_ssiuu import Facts
from lightning_ssiuu.attacks import Benign, Harmful, Paraphrase, Sampling, finetune, sweep
from lightning_ssiuu.attacks.records import FinishedAttacks, checkpoint_fingerprint
from lightning_ssiuu.cli.attack import attack
from lightning_ssiuu.datamodules import QAExample, Splits
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives.fine_tuning import FineTuning
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted sweep finds."""
    return run(models, tmp_path_factory.mktemp("whole"))


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
    killed(lambda: run(models, tmp_path), FinishedAttacks, "add", 2)
    with counted(sweep, "relearn") as attacks:
        assert run(models, tmp_path) == whole
    assert len(attacks) == 8 - 3 - 2 - 1
    assert files(tmp_path) == {"attack.json"}


@patch.object(sweep, "_MOST_WIDENINGS", 3)
def test_a_sweep_until_saturated_goes_on_with_its_saved_model(models: Path, tmp_path: Path) -> None:
    method = harmful(until_saturated=True, learning_rates=[1e-2], seeds=[0])
    options = {"attack": method, "save_attacked": True, "oracle": None}
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

    class Another(Harmful):
        @property
        def name(self) -> str:
            return "harmful"

    changed = [{"epochs": 2}, {"seeds": [0, 2]}, {"batch_size": 2}, {"every_n_epochs": 2}, {"kind": Another}]
    others: list[dict[str, Any]] = [{"attack": harmful(**options)} for options in changed]
    others += [{"score": "first_token"}, {"data": Toy(Splits(examples(0, 7, 2), examples(30, 4)))}]
    for options in others:
        with pytest.raises(UserError, match="options of the harmful attack that was interrupted there, or with --over"):
            run(models, tmp_path, **options)
    assert (tmp_path / PARTIAL).read_bytes() == kept
    with counted(sweep, "relearn") as attacks:
        run(models, tmp_path, attack=harmful(seeds=[0]), overwrite=True)
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
    few: dict[str, Any] = {"learning_rates": [1e-2], "seeds": [0]}
    first = run(models, tmp_path, attack=harmful(**few))
    both = run(models, tmp_path, attack=harmful(Benign, **few))
    told = run(models, tmp_path, attack=Paraphrase(), overwrite=True)
    assert list(both["settings"]) == ["harmful", "benign"]
    assert both["attacks"][:1] == first["attacks"]
    assert both["curves"][:2] == first["curves"]
    assert [row["attack"] for row in told["attacks"]] == ["harmful", "benign", "paraphrase"]
    assert told["attacks"][2]["gap"]
    assert {outcome["attack"] for outcome in told["outcomes"]} == {"paraphrase"}
    assert told["curves"] == both["curves"]
    with pytest.raises(UserError, match="no harmful attack, or --overwrite"):
        run(models, tmp_path, attack=harmful(**few))
    again = run(models, tmp_path, overwrite=True, attack=harmful(learning_rates=[3e-2], seeds=[0]))
    assert [row["attack"] for row in again["attacks"]] == ["benign", "paraphrase", "harmful"]
    assert {(c["attack"], c["learning_rate"]) for c in again["curves"]} == {("benign", 1e-2), ("harmful", 3e-2)}


def test_one_load_and_one_score_before_for_each_model_and_scored_set(models: Path, tmp_path: Path) -> None:
    with counted(Devices, "load") as loads, counted(finetune, "evaluate") as evaluations:
        run(models, tmp_path, attack=harmful(Benign))
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

    with counted(FineTuning, "training_step") as steps, counted(finetune, "evaluate") as evaluations:
        options: dict[str, Any] = {"seeds": [0, 1, 2], "learning_rates": [1e-2]}
        method = harmful(Benign, **options) if kind == "benign" else harmful(p=[0.25, 0.5], **options)
        content = run(models, tmp_path, data=data, attack=method)
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
    from lightning_ssiuu.models.loading import load_model

    model, generator = load_model("tiny"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "model")
    data = Facts()
    data.tokenizer.save_pretrained(tmp_path / "model")
    method = harmful(pool="wrong", learning_rates=[1e-4])
    options: dict[str, Any] = {"data": data, "score": "all_tokens", "devices": Devices("cpu")}
    (row,) = attack(str(tmp_path / "model"), "tiny", method, **options, output=str(tmp_path))
    assert row["n_attack"] + row["n_scored"] == 24  # of 36
    assert row["unlearned"]["before"]["per_seed"] == [0.0, 0.0]
    assert row["oracle"]["before"]["per_seed"] == [100.0, 100.0]  # "tiny" knows them all
    with pytest.raises(UserError, match="pool: got 'wrong', allowed: all: the model answers no forget example wrongly"):
        attack("tiny", attack=method, **options, output=str(tmp_path / "none"))


@pytest.mark.parametrize(
    "selected",
    [None, 3, [], "ab", (examples(0, 2), None), (examples(0, 2), [1, 2]), (examples(0, 2), examples(2, 2), [])],
)
def test_a_selection_is_two_lists_of_examples(selected: Any) -> None:
    class Odd(Harmful):
        def select(self, forget: Any, p: Any, rng: Any) -> Any:
            return selected

    told = r"^attack: got 'odd', allowed: select\(\) that returns attacked and scored examples$"
    with pytest.raises(UserError, match=told):
        Odd(seeds=[0]).cells(Toy())


def test_a_score_of_ones_own_tells_wrong_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
        from torchmetrics import MeanMetric
        from lightning_ssiuu.evaluation.scores import SCORES, Score
        right, mean = SCORES["all_tokens"], Score(MeanMetric, SCORES["probability"].measure)
    """
    (tmp_path / "scores_of_ones_own.py").write_text(dedent(source), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    Harmful(pool="wrong").check(Facts(), "scores_of_ones_own.right", Devices("cpu"))
    with pytest.raises(UserError, match=r"^attack\.pool: .* all with score 'scores_of_ones_own\.mean'"):
        Harmful(pool="wrong").check(Facts(), "scores_of_ones_own.mean", Devices("cpu"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"pool": "wrong", "score": "probability"},
            "attack.pool: got 'wrong', allowed: all with score 'probability': wrong",
        ),
        ({"pool": "wrong", "score": "rouge_l"}, "attack.pool: got 'wrong'"),
        ({"pool": "right"}, "attack.pool: got 'right', allowed: one of"),
        ({"kind": Sampling, "save_attacked": True}, "save_attacked: got True, allowed: false with attack Sampling"),
        ({"kind": Paraphrase, "save_attacked": True}, "save_attacked: got True"),
        ({"kind": Sampling, "seeds": []}, "attack.seeds: got"),
        ({"seeds": []}, "attack.seeds: got"),
        ({"p": []}, "attack.p: got"),
        ({"p": [0.01]}, "attack.p: got 0.01, allowed: a fraction that leaves"),
        ({"seeds": [-1]}, "attack.seeds: got -1, allowed: at least 0"),
        ({"batch_size": 0}, "attack.batch_size: got 0"),
        ({"epochs": 0}, "attack.epochs: got 0"),
        ({"every_n_epochs": 0}, "attack.every_n_epochs: got 0"),
        ({"patience": 0}, "attack.patience: got 0"),
        ({"kind": Benign, "benign_size": 0}, "attack.benign_size: got 0"),
        ({"kind": Benign, "benign_path": "gone.json"}, "attack.benign_path: got"),
        ({"lora": LoRA(r=2), "devices": Devices("cpu", 1, "fsdp2")}, "attack.lora: got 'adapters', allowed: null"),
    ],
)
def test_mistakes(models: Path, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    command = {name: options.pop(name) for name in ("score", "save_attacked", "devices") if name in options}
    kind = options.pop("kind", Harmful)
    with pytest.raises(UserError, match=f"^{told}"):
        run(
            models,
            tmp_path,
            attack=kind(**options) if kind in (Sampling, Paraphrase) else harmful(kind, **options),
            **command,
        )
    assert files(tmp_path) == set()


def test_nothing_to_recover_and_only_learning(tmp_path: Path) -> None:
    """The original model as the unlearned one knows all before; a model of noise only learns what it is taught."""
    from lightning_ssiuu.models.loading import load_tokenizer

    noise = random_model(dtype=torch.float32, vocab_size=len(load_tokenizer("tiny")))
    noise.save_pretrained(tmp_path / "noise")
    load_tokenizer("tiny").save_pretrained(tmp_path / "noise")
    method = harmful(learning_rates=[3e-4], seeds=[0], epochs=2)
    (row,) = attack("tiny", str(tmp_path / "noise"), method, score="probability", output=str(tmp_path))
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
