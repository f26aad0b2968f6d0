"""Hidden states: the Unlearning Depth Score by its limits and a slow reference, probes on planted directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys.data import Toy, byte_tokenizer, examples
from toys.models import answer_model, part, random_model

from lightning_ssiuu.attacks import LayerProbes, UnlearningDepth, layer_probes
from lightning_ssiuu.attacks.base import Target, outcome_rows
from lightning_ssiuu.attacks.layer_probes import Pairs, differences, probe
from lightning_ssiuu.attacks.unlearning_depth import _without_end, erased_shares
from lightning_ssiuu.datamodules import QAExample, Splits
from lightning_ssiuu.models.hidden_states import answers_with_all_hidden, answers_with_hidden, with_hidden
from lightning_ssiuu.models.packing import padded
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError

HERE = Devices("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The original, the oracle, and a model on the way from the one to the other."""
    folder = tmp_path_factory.mktemp("depth")
    models = [random_model("llama", torch.float32, seed=seed, vocab_size=260) for seed in (0, 1)]
    between = random_model("llama", torch.float32, vocab_size=260)
    with torch.no_grad():
        for own, a, b in zip(between.parameters(), models[0].parameters(), models[1].parameters(), strict=True):
            own.copy_(torch.lerp(a, b, 0.3))
    for name, model in zip(("original", "oracle", "between"), (*models, between), strict=True):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return [str(folder / name) for name in ("original", "oracle", "between")]


def data(n: int = 5, **options: Any) -> Toy:
    return Toy(Splits([QAExample(k, f"Q{k}?", "ab"[: 1 + k % 2]) for k in range(n)], examples(10, 3)), **options)


# ---- states --------------------------------------------------------------------------------------------------------


def test_states_of_all_blocks_and_back() -> None:
    """Their own states change nothing; another model's in the last block are its own answers, but for the head."""
    model, batch = answer_model(), part([(3, 1), (5, 2)])
    own, states = answers_with_all_hidden(model, batch)
    for layer, state in enumerate(states):
        torch.testing.assert_close(state, answers_with_hidden(model, batch, layer).hidden)
        with with_hidden(model, batch, layer, state):
            torch.testing.assert_close(model(**_inputs(batch)).token_logps, own.token_logps)
    for packs in (True, False):
        with with_hidden(model, batch, 1, states[1].flip(0)):
            if packs:
                moved = model(**_inputs(batch))
            else:
                with padded(model):
                    moved = model(**_inputs(batch))
        torch.testing.assert_close(moved.logits, own.logits.flip(0))
    torch.testing.assert_close(model(**_inputs(batch)).logits, own.logits)


def _inputs(batch: Any) -> dict[str, Any]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


# ---- depth ---------------------------------------------------------------------------------------------------------


def test_depth_by_hand() -> None:
    missing = torch.tensor([[2.0, 0.04, 1.0], [0.05, -1.0, 0.0], [0.5, 0.5, 0.0]])
    lost = torch.tensor([[1.0, 9.0, -3.0], [5.0, 5.0, 5.0], [0.25, 7.0, 7.0]])
    # Of the first 2 · ½ + 1 · 0 of 3; the second has no layer above 0.05; of the third 0.5 · ½ + 0.5 · 1 of 1.
    assert erased_shares(missing, lost, 0.05).tolist() == pytest.approx([1 / 3, 0.75])


def run(saved: list[str], unlearned: str, toy: Toy, threshold: float = 0.0) -> list[Any]:
    attack = UnlearningDepth(saved[0], threshold)
    attack.check(toy, "probability", HERE)
    targets = [Target("model", unlearned, HERE), Target("oracle", saved[1], HERE)]
    return attack.run(targets, toy, "probability", HERE)


def test_the_original_has_everything_and_the_oracle_nothing(saved: list[str]) -> None:
    own, oracle = run(saved, saved[0], data())
    assert (own.before, own.forget_score) == (100.0, pytest.approx(100.0, abs=1e-3))
    assert (oracle.before, oracle.forget_score) == (100.0, 0.0)
    assert own.score == oracle.score == "1 - UDS"
    again, _ = run(saved, saved[1], data())
    assert again.forget_score == 0.0
    (row,) = outcome_rows([own, oracle])
    assert row["gap"]["mean"] == pytest.approx(100.0, abs=1e-3)


def block_output(hf: Any, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """``[1, L, H]`` what a block gives."""
    states: list[torch.Tensor] = []
    with hf.model.layers[layer].register_forward_hook(lambda *call: states.append(call[-1])):
        hf(input_ids=ids)
    return states[0]


def test_depth_is_that_of_a_slow_reference(saved: list[str]) -> None:
    """One example, layer and pass at a time, with transformers alone."""
    toy = data(eval_batch_size=2)
    original, oracle, between = (HERE.load(one).hf for one in saved)
    shares = []
    for one in toy.splits.forget:
        text = f"Question: {one.question}\nAnswer: {one.answer}"
        ids = torch.tensor([toy.tokenizer(text)["input_ids"]])
        places = list(range(ids.shape[1] - 2 - len(one.answer), ids.shape[1] - 1))  # a space and the letters

        def logp(ids: Any = ids, places: Any = places) -> float:
            logps = original(input_ids=ids).logits[0].double().log_softmax(-1)
            return float(torch.stack([logps[k, ids[0, k + 1]] for k in places]).mean())

        lost: dict[str, list[float]] = {"oracle": [], "between": []}
        with torch.no_grad():
            own = logp()
            for name, source in (("oracle", oracle), ("between", between)):
                for layer in range(2):
                    state = block_output(source, layer, ids)

                    def put(_block: Any, _args: Any, output: Any, state: Any = state, places: Any = places) -> Any:
                        output = output.clone()
                        output[:, places] = state[:, places]
                        return output

                    with original.model.layers[layer].register_forward_hook(put):
                        lost[name].append(own - logp())
        pairs = [(a, b) for a, b in zip(lost["oracle"], lost["between"], strict=True) if a > 0]
        if pairs:
            shares.append(sum(a * min(max(b / a, 0), 1) for a, b in pairs) / sum(a for a, _ in pairs))
    found, _ = run(saved, saved[2], toy)
    assert found.n_scored == len(shares) > 0
    assert found.forget_score == pytest.approx(100 * (1 - np.mean(shares)), rel=1e-4)
    assert 1 < found.forget_score < 99


def test_what_ends_an_answer_is_no_part_of_it() -> None:
    toy = data(2)
    (batch,) = toy.eval_dataloader("forget")
    labels = _without_end(batch["forget"], toy)["labels"]
    assert [(row != -100).sum().item() for row in labels] == [2, 3]
    assert toy.tokenizer.eos_token_id not in labels


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: UnlearningDepth().check(data(), "probability", HERE), "attack.original: got None"),
        (lambda _: UnlearningDepth(threshold=-1.0), "attack.threshold: got -1.0"),
        (
            lambda s: UnlearningDepth(s[0]).run([Target("model", s[0], HERE)], data(), "probability", HERE),
            "oracle: got",
        ),
        (lambda s: run([s[0], s[0]], s[1], data(), 0.05), "oracle: got one that knows what the original does"),
    ],
)
def test_mistakes_of_depth(saved: list[str], make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(saved)


# ---- probes --------------------------------------------------------------------------------------------------------


def test_probe_in_closed_form() -> None:
    """Many differences in few dimensions: the ridge solution of the normal equations."""
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.sign(d @ torch.tensor([1.0, -1.0, 0.0, 0.5], dtype=torch.float64))
    weight = 0.3 * d.square().sum(1).mean()
    expected = torch.linalg.solve(d.T @ d + weight * torch.eye(4, dtype=torch.float64), d.T @ y)
    torch.testing.assert_close(probe(d, y, 0.3), expected)


def planted(pairs: Sequence[Any]) -> Pairs:
    """At layer 0 noise, at layer 1 a direction as well."""
    noise = torch.randn(2, len(pairs), 12, generator=torch.Generator().manual_seed(0))
    noise[1, :, 3] += 6.0
    return Pairs(noise, torch.tensor([one.example_id for one, _ in pairs]), torch.zeros(len(pairs)).bool())


@pytest.mark.parametrize("train_on", ["forget", "retain"])
def test_planted_directions_are_found_and_shuffled_labels_are_not(
    saved: list[str], monkeypatch: pytest.MonkeyPatch, train_on: Any
) -> None:
    monkeypatch.setattr(layer_probes, "differences", lambda _m, _d, pairs, _: planted(pairs))
    toy = Toy(Splits(examples(0, 40, 2), examples(100, 30, 2)))
    attack = LayerProbes(train_on, seeds=[0, 1, 2])
    attack.check(toy, "probability", HERE)
    rows = outcome_rows(list(attack.run([Target("model", saved[0], HERE)], toy, "probability", HERE)))
    noise, layer = rows
    assert (layer["variant"], layer["score"], layer["n_scored"]) == (
        "layer=1",
        "probe_accuracy",
        20 if train_on == "forget" else 40,
    )
    assert layer["unlearned"]["forget_score"]["mean"] > 99
    assert abs(layer["control"]["forget_score"]["mean"] - 50) < 12
    assert abs(noise["unlearned"]["forget_score"]["mean"] - 50) < 15
    assert layer["unlearned"]["before"]["mean"] == 0.0


def test_differences_are_those_at_the_last_token_of_the_answers(saved: list[str]) -> None:
    toy = data(3, eval_batch_size=2)
    pairs = [(one, QAExample(one.example_id, one.question, wrong)) for one in toy.splits.forget for wrong in "xy"]
    model = HERE.load(saved[0])
    found = differences(model, toy, pairs, HERE)
    assert found.differences.shape == (2, 6, 16)
    assert found.example_ids.tolist() == [0, 0, 1, 1, 2, 2]

    def read(one: QAExample) -> tuple[torch.Tensor, float]:
        sequence = toy.encoder.sequence(one.question, one.answer)
        ids = torch.tensor([sequence.input_ids])
        with torch.no_grad():
            state = block_output(model.hf, 0, ids)
            logps = model.hf(input_ids=ids).logits[0].log_softmax(-1)
        own = [float(logps[k - 1, ids[0, k]]) for k in range(sequence.n_prompt, len(sequence))]
        return state[0, -2], sum(own) / len(own)  # the last one ends the answer

    for number, (true, wrong) in enumerate(pairs):
        (a, more), (b, less) = read(true), read(wrong)
        torch.testing.assert_close(found.differences[0, number], a - b, rtol=1e-4, atol=1e-5)
        assert bool(found.prefers[number]) == (more > less)


def test_wrong_answers_are_distractors_or_each_others() -> None:
    toy = Toy(Splits([*examples(0, 2, 2), *[QAExample(k, f"Q{k}?", f"a{k}") for k in (5, 6)]], examples(100, 3)))
    _, pairs = LayerProbes("retain").parts(toy, 0)
    assert [(one.example_id, other.answer) for one, other in pairs] == [
        *((0, f"SECRET wrong 0 {k}") for k in (0, 1)),
        *((1, f"SECRET wrong 1 {k}") for k in (0, 1)),
        *((5, "a6"), (6, "a5")),
    ]
    assert all(one.answer != other.answer and one.question == other.question for one, other in pairs)


def test_the_same_questions_are_never_fitted_and_scored() -> None:
    toy = Toy(Splits(examples(0, 9, 2), examples(100, 5, 2)))

    def questions(attack: LayerProbes, seed: int) -> list[set[str]]:
        return [{one.question for one, _ in pairs} for pairs in attack.parts(toy, seed)]

    for seed in range(3):
        fitted, held = questions(LayerProbes(p=0.4), seed)
        assert fitted.isdisjoint(held)
        assert (len(fitted), len(held)) == (4, 5)
    fitted, held = questions(LayerProbes("retain", n_retain=3), 0)
    assert (len(fitted), len(held)) == (3, 9)
    assert fitted <= {one.question for one in toy.splits.retain}


def test_no_probe_sees_a_scored_answer() -> None:
    """Without distractors, too: what is scored has other answers, and what is fitted on stays as it was."""
    toy, attack = data(8), LayerProbes()
    fitted, held = attack.parts(toy, 0)
    scored = {one.example_id for one, _ in held}
    other = [
        replace(one, answer=f"x{one.example_id}") if one.example_id in scored else one for one in toy.splits.forget
    ]
    again, changed = attack.parts(Toy(Splits(other, toy.splits.retain)), 0)
    assert again == fitted
    assert changed != held


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_on": "test"}, "attack.train_on: got 'test'"),
        ({"p": 0.0}, "attack.p: got 0.0"),
        ({"ridge": 0.0}, "attack.ridge: got 0.0"),
        ({"seeds": []}, r"attack.seeds: got \[\]"),
    ],
)
def test_mistakes_of_probes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LayerProbes(**options)


def test_answers_that_are_all_the_same_cannot_be_told_apart(tmp_path: Path) -> None:
    same = Toy(Splits([QAExample(k, f"Q{k}?", "yes") for k in range(4)], examples(10, 3)))
    with pytest.raises(UserError, match="data: got too few questions with wrong answers"):
        LayerProbes().check(same, "probability", HERE)
