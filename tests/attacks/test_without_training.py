"""Quantisation, other wordings, and what all attacks without training share: rows, checks, one model at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys.cli import attacking, command, forget_texts, leaks, read_json
from toys.clusters import write_faithun
from toys.data import Toy, byte_tokenizer, examples
from toys.models import random_model

from lightning_ssiuu import Facts, FaithUn
from lightning_ssiuu.attacks import Ablation, Harmful, Paraphrase, Quantization, Sampling, quantization
from lightning_ssiuu.attacks.base import Attack, Outcome, Target, checked, forget_score, outcome_rows
from lightning_ssiuu.attacks.curves import RecoveryCurve
from lightning_ssiuu.datamodules import QAExample, Splits
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.export import plain_state_dict
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError

HERE = Devices("cpu")


def run(
    attack: Attack, checkpoint: str, data: Any, score: str, devices: Devices = HERE, name: str = "model"
) -> list[Any]:
    """What an attack finds on one model."""
    attack.check(data, score, devices)
    return list(attack.run([Target(name, checkpoint, devices)], data, score, devices))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("without") / "model"
    random_model("llama", torch.float32, vocab_size=260).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_rows_pair_the_seeds_and_keep_controls_apart() -> None:
    found = [
        Outcome(model, "ablation", "zero", seed, 9, 5.0, score, control, n_neurons, score="probability")
        for model, seed, score, control, n_neurons in (
            ("oracle", 1, 7.0, False, 2),
            ("oracle", 0, 3.0, False, 2),
            ("unlearned", 0, 10.0, False, 4),
            ("unlearned", 0, 6.0, True, 4),
            ("unlearned", 1, 20.0, False, 4),
            ("unlearned", 1, 8.0, True, 4),
        )
    ]
    (row,) = outcome_rows(found)
    spread = {"mean": 15.0, "std": 50**0.5, "per_seed": [10.0, 20.0]}
    assert row == {
        **{"attack": "ablation", "kind": "ablation", "p": None, "variant": "zero", "score": "probability"},
        **{"n_attack": None, "n_scored": 9, "n_neurons": 4},
        "unlearned": {"before": {"mean": 5.0, "std": 0.0, "per_seed": [5.0, 5.0]}, "forget_score": spread},
        "oracle": {
            "before": {"mean": 5.0, "std": 0.0, "per_seed": [5.0, 5.0]},
            "forget_score": {"mean": 5.0, "std": 8**0.5, "per_seed": [3.0, 7.0]},
            "n_neurons": 2,
        },
        "gap": {"mean": 10.0, "std": 18**0.5, "per_seed": [7.0, 13.0]},
        "control": {"forget_score": {"mean": 7.0, "std": 2**0.5, "per_seed": [6.0, 8.0]}},
    }


def test_rows_without_an_oracle_have_no_gap() -> None:
    (row,) = outcome_rows([Outcome("unlearned", "quantization", "8bit", 0, 9, 5.0, 6.0, score="probability")])
    assert not {"oracle", "gap", "control", "n_neurons"} & set(row)


# ---- what an attack gives -------------------------------------------------------------------------------------------


class Given(Attack):
    """Gives what it is told to."""

    given: Any = None

    def run(self, targets: Any, data: Any, score: str, devices: Devices) -> Any:
        return self.given


def outcome(
    model: str, variant: str | None = None, seed: int = 0, control: bool = False, kind: str = "given"
) -> Outcome:
    return Outcome(model, kind, variant, seed, 9, 5.0, 6.0, control, score="probability")


def curve(model: str, seed: int = 0, rate: float = 1e-3, kind: str = "harmful") -> RecoveryCurve:
    return RecoveryCurve(model, kind, 0.1, rate, seed, 4, 32, [0, 1], [0.0, 1.0])


TARGETS = [Target("model", "tiny", HERE), Target("oracle", "tiny", HERE)]
BOTH = [outcome("unlearned"), outcome("oracle")]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, "Outcome objects, not NoneType"),
        (3.0, "Outcome objects, not float"),
        ([], "at least one Outcome for each of"),
        ([*BOTH, 1.0], "Outcome objects alone, not float"),
        ([*BOTH, curve("oracle")], "Outcome objects alone, not RecoveryCurve"),
        ([outcome("unlearned", kind="noise"), outcome("oracle")], "results of its own kind 'given', not 'noise'"),
        ([outcome("oracle")], "at least one Outcome for each of"),
        ([*BOTH, outcome("original")], "at least one Outcome for each of"),
        ([*BOTH, outcome("oracle", seed=1)], "the same variants, seeds and controls for each of"),
        ([*BOTH, outcome("oracle")], "the same variants, seeds and controls for each of"),
        ([outcome("unlearned", "a"), outcome("oracle", "b")], "the same variants, seeds and controls for each of"),
        ([*BOTH, outcome("unlearned", control=True)], "the same variants, seeds and controls for each of"),
        ([outcome(name, control=True) for name in ("unlearned", "oracle")], "at least one outcome that is no control"),
    ],
)
def test_what_an_attack_gives_is_checked(given: Any, told: str) -> None:
    with pytest.raises(
        UserError, match=rf"^attack: got 'given', allowed: an attack whose run\(\) gives {told}"
    ) as error:
        checked(Given(), given, TARGETS)
    assert "\n" not in str(error.value)


def test_what_a_relearning_attack_gives_is_checked() -> None:
    both = [curve("unlearned"), curve("oracle")]
    widened = [*both, curve("oracle", rate=3e-3)]  # until the oracle was saturated, too
    assert checked(Harmful(), iter(widened), TARGETS) == widened
    assert checked(Harmful(), both[:1], TARGETS[:1]) == both[:1]
    for given, told in (
        (BOTH, "RecoveryCurve objects alone, not Outcome"),
        ([curve("unlearned", kind="benign"), both[1]], "results of its own kind 'harmful', not 'benign'"),
        ([*both, curve("oracle", seed=1)], "the same p and seeds for each of"),
    ):
        with pytest.raises(UserError, match=told):
            checked(Harmful(), given, TARGETS)


def test_an_outcome_says_what_was_measured() -> None:
    with pytest.raises(TypeError, match="score"):
        Outcome("unlearned", "noise", None, 0, 9, 5.0, 6.0)  # type: ignore[call-arg]


# ---- quantisation --------------------------------------------------------------------------------------------------


def test_quantised_scores_are_those_of_the_rounded_weights() -> None:
    """The reference: a plain model with the rounded weights written out."""
    data = Facts(eval_batch_size=36)
    found = run(Quantization(), "tiny", data, "probability")
    assert [(one.variant, one.n_scored, one.seed) for one in found] == [("8bit", 36, 0), ("4bit", 36, 0)]
    plain, tokenizer = AnswerModel(load_model("tiny")), load_tokenizer("tiny")
    before = forget_score(plain, tokenizer, data, "probability")
    for one, allowed in zip(found, (0.3, 1e-3), strict=True):  # 8-bit rounds activations as well
        quantised: Any = load_model("tiny", quantization=one.variant)  # type: ignore[arg-type]
        plain.hf.load_state_dict(plain_state_dict(quantised))
        assert one.before == before
        assert one.forget_score == pytest.approx(forget_score(plain, tokenizer, data, "probability"), abs=allowed)
        assert one.forget_score != before


def test_a_misread_model_is_refused_in_one_line(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any) -> None:
        if any(type(parameter).__name__ == "Params4bit" for parameter in model.parameters()):
            raise UserError("quantization", "4bit", "8bit or null for this model on this CPU: misread")

    scored: list[str] = []
    monkeypatch.setattr("lightning_ssiuu.models.loading.check_reading", refuse)
    monkeypatch.setattr(quantization, "forget_score", lambda *_: scored.append("scored") or 0.0)
    with pytest.raises(
        UserError, match=r"attack.widths: got '4bit', allowed: \['8bit'\] for oracle \(8bit or null.*mis"
    ):
        run(Quantization(), checkpoint, Toy(), "probability", name="oracle")
    assert not scored
    (one,) = run(Quantization(["8bit"]), checkpoint, Toy(), "probability", name="oracle")
    assert one.model == "oracle"


# ---- other wordings ------------------------------------------------------------------------------------------------


def reworded() -> Toy:
    """Two examples with two paraphrases, one with one, one without any."""
    forget = [
        QAExample(n, f"Base {n}?", f"answer {n}", paraphrases=tuple(f"Other {n}, {k}?" for k in range(count)))
        for n, count in enumerate((2, 1, 2, 0))
    ]
    return Toy(Splits(forget, examples(10, 3)), eval_batch_size=3)


def test_reworded_is_the_mean_over_paraphrases_then_examples(checkpoint: str) -> None:
    data = reworded()
    (found,) = run(Paraphrase(), checkpoint, data, "probability")
    model, tokenizer = HERE.load(checkpoint), data.tokenizer

    def alone(question: str, answer: str) -> float:
        """P^(1/T) from the full logits of one example."""
        sequence = data.encoder.sequence(question, answer)
        ids = torch.tensor([sequence.input_ids])
        with torch.no_grad():
            logps = model.hf(input_ids=ids).logits[0].double().log_softmax(-1)
        own = [logps[k - 1, ids[0, k]] for k in range(sequence.n_prompt, len(sequence))]
        return 100 * torch.stack(own).mean().exp().item()

    asked = data.splits.forget[:3]
    means = [sum(alone(text, one.answer) for text in one.paraphrases) / len(one.paraphrases) for one in asked]
    assert found.forget_score == pytest.approx(sum(means) / 3, rel=1e-5)
    assert found.before == pytest.approx(sum(alone(one.question, one.answer) for one in asked) / 3, rel=1e-5)
    assert (found.variant, found.n_scored) == ("reworded", 5)
    every = [alone(text, one.answer) for one in asked for text in one.paraphrases]
    assert abs(sum(every) / 5 - found.forget_score) > 1e-6  # not the mean over questions
    assert tokenizer is data.tokenizer


def test_clusters_are_asked_in_every_way(checkpoint: str, tmp_path: Path) -> None:
    data = FaithUn(str(write_faithun(tmp_path, 3)), tokenizer=byte_tokenizer())  # type: ignore[arg-type]
    found = run(Paraphrase(), checkpoint, data, "multiple_choice")
    model = HERE.load(checkpoint)
    assert [one.variant for one in found] == ["reworded", "hop2_test", "same_object"]
    for one, kind in zip(found, ("hop1_test", "hop2_test", "same_object"), strict=True):
        questions = data.probes("forget", kind)
        assert one.n_scored == len(questions) > 0
        assert one.forget_score == forget_score(model, data.tokenizer, data, "multiple_choice", questions)
        assert one.before == forget_score(model, data.tokenizer, data, "multiple_choice")
    assert len({one.forget_score for one in found}) > 1


def test_nothing_to_ask() -> None:
    bare = [QAExample(n, f"SECRET {n}?", "SECRET") for n in range(3)]
    with pytest.raises(UserError, match="data: got a forget set without paraphrases, allowed: data whose") as caught:
        Paraphrase().check(Toy(Splits(bare, examples(10, 3))), "probability", HERE)
    assert "SECRET" not in str(caught.value)


def test_every_paraphrase_has_to_fit() -> None:
    long = [QAExample(n, f"Q{n}?", "a", paraphrases=("Q" * (200 if n == 1 else 3), "Q?")) for n in range(3)]
    with pytest.raises(UserError, match="max_length: got 64"):
        Paraphrase().check(Toy(Splits(long, examples(10, 3)), max_length=64), "probability", HERE)


# ---- checks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Sampling, {"score": "rouge"}, "score: got 'rouge'"),
        (Sampling, {"seeds": []}, r"attack.seeds: got \[\], allowed: at least one"),
        (Sampling, {"seeds": [0, -1]}, r"attack.seeds: got \[0, -1\]"),
        (Quantization, {"widths": []}, r"attack.widths: got \[\]"),
        (Quantization, {"widths": ["8bit", "3bit"]}, "attack.widths: got"),
        (Quantization, {"devices": Devices("cpu", 1, "fsdp2")}, "strategy: got 'fsdp2', allowed: auto or ddp"),
        (Ablation, {}, "attack.original: got None"),
        (Paraphrase, {"devices": Devices("cpu", 6, "ddp")}, "devices: got 6, allowed: at most 5"),
    ],
)
def test_mistakes(kind: type[Attack], options: dict[str, Any], message: str) -> None:
    score, devices = options.pop("score", "probability"), options.pop("devices", HERE)
    with pytest.raises(UserError, match=message):
        kind(**options).check(Toy(), score, devices)


def test_bf16_weights(checkpoint: str) -> None:
    """Every attack that needs no more than a bfloat16 model runs on one, and scores another model than float32 does."""
    narrow = Devices("cpu", precision="bf16-true")
    data = Toy(Splits(examples(0, 2), examples(10, 3)))
    for attack in (Ablation(checkpoint, 2, draws=1), Sampling(k=1, seeds=[0]), Paraphrase()):
        both = [run(attack, checkpoint, data, "probability", devices) for devices in (narrow, HERE)]
        assert len(both[0]) == len(both[1])
        if attack.kind != "sampling":
            assert both[0][0].before != both[1][0].before
            assert both[0][0].before == pytest.approx(both[1][0].before, rel=0.1)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_one_report_without_text(tmp_path: Path) -> None:
    shown = ""
    for name, options in (("Sampling", attacking(k=1, seeds=[0])), ("Paraphrase", ())):
        result = command("attack", "--attack", name, "--model", "tiny", "--output", tmp_path, *options)
        assert result.status == 0, result.err
        shown += result.out + result.err
    content = read_json(tmp_path / "attack.json")
    assert [row["attack"] for row in content["attacks"]] == ["sampling", "paraphrase"]
    assert [one["variant"] for one in content["outcomes"]] == ["k=1, temperature=1", "reworded"]
    assert leaks(tmp_path) == []
    assert not [text for text in forget_texts() if text in shown.encode()]


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    result = command("attack", "--attack", "Ablation", "--model", "tiny", "--output", tmp_path / "out")
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert result.err.startswith("lightning-ssiuu: error: attack.original: got None, allowed: the model before")
    assert not (tmp_path / "out").exists()
