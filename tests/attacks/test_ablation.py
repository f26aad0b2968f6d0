"""Neuron ablation: what was changed at the neurons is undone exactly, what was not is left alone."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import with_units
from toys.audit import Planted
from toys.data import Toy, byte_tokenizer, examples
from toys.models import random_model

from lightning_ssiuu import Facts
from lightning_ssiuu.attacks import ablation
from lightning_ssiuu.attacks.ablation import (
    Ablation,
    Recording,
    control_neurons,
    output_columns,
    patched,
)
from lightning_ssiuu.attacks.base import Target, forget_score, outcome_rows
from lightning_ssiuu.datamodules import Splits
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import NeuronSite, neuron_sites
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError


def toy_data(**kwargs: Any) -> Toy:
    return Toy(Splits(examples(0, 5, 2), examples(10, 4, 2), examples(20, 2, 2)), eval_batch_size=2, **kwargs)


def noisy_sites(original: AnswerModel, names: set[str] | None = None) -> AnswerModel:
    """A copy in which the weights of the sites' modules, or of some, are other ones."""
    model = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(0)
    for name in sorted({site.module_name for site in neuron_sites(model.hf)} if names is None else names):
        for parameter in model.hf.get_submodule(name).parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def everything(sites: list[NeuronSite]) -> list[ablation.Neuron]:
    return [(*site.key, index) for site in sites for index in range(site.width)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("score", ["probability", "truth_ratio_forget"])  # the latter makes other passes: on options
def test_putting_all_neurons_back_gives_the_original_score(name: str, score: str) -> None:
    data, tokenizer = toy_data(), byte_tokenizer()
    original = AnswerModel(random_model(name, vocab_size=260))
    changed = noisy_sites(original)
    sites = neuron_sites(original.hf)
    recording = Recording(output_columns(sites, everything(sites)))
    with recording.of(original.hf):
        expected = forget_score(original, tokenizer, data, score)
    before = forget_score(changed, tokenizer, data, score)
    assert abs(before - expected) > 1e-3
    with patched(changed.hf, recording.columns, recording):
        assert forget_score(changed, tokenizer, data, score) == expected
    with patched(changed.hf, {}, recording):
        assert forget_score(changed, tokenizer, data, score) == before
    half = output_columns(sites, everything(sites)[::2])
    with patched(changed.hf, half, recording):  # out of a recording that holds more
        assert forget_score(changed, tokenizer, data, score) not in (before, expected)
    assert forget_score(changed, tokenizer, data, score) == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_columns_are_the_neurons(name: str) -> None:
    """Zeroing a neuron zeroes what ``NeuronSite.select`` shows of it, and nothing else of the module's output."""
    model = random_model(name)
    ids = torch.tensor([[5, 6, 7]])
    site = next(site for site in neuron_sites(model) if site.kind == "attn_k" and site.layer == 1)
    seen: list[torch.Tensor] = []

    def look() -> torch.Tensor:
        handle = model.get_submodule(site.module_name).register_forward_hook(lambda _m, _a, out: seen.append(out))
        with torch.no_grad():
            model(input_ids=ids)
        handle.remove()
        return seen.pop()

    plain = look()
    with patched(model, output_columns([site], [(1, "attn_k", 3)])):
        zeroed = look()
    shared = NeuronSite("attn_k", 0, "qkv", 2, torch.tensor([4, 5]))
    assert output_columns([shared], [(0, "attn_k", 1), (0, "attn_k", 0)])["qkv"].tolist() == [4, 5]  # ascending
    assert (site.select(zeroed)[..., 3] == 0).all()
    assert ((plain != zeroed).any(0).any(0)).sum() == 1


def test_a_planted_unit_is_undone_by_zeroing_it_and_random_ones_are_not() -> None:
    """The embedded model with one hidden unit rewired against the answers: zero it and they are back."""
    planted = Planted()
    unit = planted.unit("mlp_up", 2, 1.0)
    model = with_units(planted.healthy, [unit])
    data, tokenizer = Facts(eval_batch_size=64), load_tokenizer("tiny")

    def score(neurons: list[ablation.Neuron]) -> float:
        with patched(model.hf, output_columns(planted.sites, neurons)):
            return forget_score(model, tokenizer, data, "probability")

    healthy = forget_score(planted.healthy, tokenizer, data, "probability")
    harmed = score([])
    assert harmed < 0.75 * healthy
    culprit: list[ablation.Neuron] = [(layer, kind, index) for kind, layer, index in sorted(unit.neurons)]
    assert score(culprit) > 0.97 * healthy
    for seed in range(3):
        assert score(control_neurons(planted.sites, culprit, seed)) < harmed + 0.1 * (healthy - harmed)


class Attacked:
    """Saved models that differ in three neurons' rows: turned round in one, zero in another."""

    neurons = ((0, "mlp_up", 2), (0, "mlp_up", 5), (1, "attn_q", 1))

    def __init__(self, folder: Path) -> None:
        for name, factor in (("original", 1), ("changed", -20), ("silent", 0)):
            model = random_model("llama", torch.float32, vocab_size=260)
            for layer, kind, index in self.neurons:
                block = model.model.layers[layer]
                (block.mlp.up_proj if kind == "mlp_up" else block.self_attn.q_proj).weight.data[index] *= factor
            model.save_pretrained(folder / name)
            byte_tokenizer().save_pretrained(folder / name)
        self.original, self.changed, self.silent = (str(folder / one) for one in ("original", "changed", "silent"))
        self.data = toy_data()

    def score(self, checkpoint: str) -> float:
        return forget_score(Devices("cpu").load(checkpoint), byte_tokenizer(), self.data, "probability")

    def attack(self, **options: Any) -> list[dict[str, Any]]:
        here = Devices("cpu")
        targets = [Target("model", self.changed, here), Target("oracle", self.original, here)]
        given = Ablation(**{"original": self.original, "draws": 3, "alpha": 0.01, **options})
        given.check(self.data, "probability", here)
        return outcome_rows(given.run(targets, self.data, "probability", here))


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    return Attacked(tmp_path_factory.mktemp("ablation"))


def test_attack_end_to_end(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were exactly the changed neurons flagged, putting them back would give the original's score, bit for bit."""
    diagnose, load, alive = ablation.diagnose, Devices.load, []

    def all_changed(*args: Any) -> Any:
        diagnosis = diagnose(*args)
        if diagnosis.flagged:
            some = diagnosis.flagged[0]
            found = [type(some)(kind, layer, index, 0.0, 0.0, 0.0, 0.0, 0.0) for layer, kind, index in attacked.neurons]
            diagnosis.flagged[:] = found
        return diagnosis

    def counted(self: Devices, checkpoint: str, *args: Any) -> AnswerModel:
        assert not [one for one in alive if one() is not None], "two models in memory"
        model = load(self, checkpoint, *args)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(ablation, "diagnose", all_changed)
    monkeypatch.setattr(Devices, "load", counted)
    put_back, zeroed = attacked.attack()
    monkeypatch.undo()
    assert [row["variant"] for row in (put_back, zeroed)] == ["original", "zero"]
    assert len(alive) == 5  # original, model, oracle; original again, model again; the oracle has nothing to patch
    original, before = attacked.score(attacked.original), attacked.score(attacked.changed)
    assert put_back["unlearned"]["before"]["mean"] == before
    assert put_back["unlearned"]["forget_score"]["per_seed"] == [original]
    silent = attacked.score(attacked.silent)
    assert zeroed["unlearned"]["forget_score"]["per_seed"] == [pytest.approx(silent, rel=1e-6)]
    assert len({original, before, round(silent, 6)}) == 3
    assert abs(original - silent) > 1e-4
    assert (put_back["n_neurons"], put_back["n_scored"]) == (3, 5)
    for row in (put_back, zeroed):
        controls = row["control"]["forget_score"]["per_seed"]
        assert len(set(controls)) == 3
        assert original not in controls
        # The oracle is the original model here: nothing is flagged, nothing changes.
        assert row["oracle"]["n_neurons"] == 0
        assert row["oracle"]["forget_score"]["per_seed"] == [original] == row["oracle"]["before"]["per_seed"]
        assert row["oracle"]["control"]["forget_score"]["per_seed"] == [original] * 3
        assert row["gap"]["per_seed"] == [row["unlearned"]["forget_score"]["mean"] - original]


def test_what_is_flagged_is_what_the_diagnosis_flags(attacked: Attacked) -> None:
    from lightning_ssiuu.attribution.diagnosis import diagnose, examine

    probes: Any = {"probe_examples": 3, "target": "log_probability"}
    pair = [examine(one, attacked.data, **probes) for one in (attacked.original, attacked.changed)]
    rows = attacked.attack(alpha=0.1, **probes)
    assert rows[0]["n_neurons"] == len(diagnose(*pair, 0.1).flagged) > 0


def test_control_neurons_match_by_kind() -> None:
    sites = neuron_sites(random_model("llama"))
    flagged: list[ablation.Neuron] = [(0, "mlp_up", n) for n in range(3)] + [(1, "attn_v", 0)]
    draws = [control_neurons(sites, flagged, seed) for seed in range(20)]
    for drawn in draws:
        assert Counter(kind for _, kind, _ in drawn) == {"mlp_up": 3, "attn_v": 1}
        assert len(set(drawn)) == 4
        assert not set(drawn) & set(flagged)
    assert len({tuple(drawn) for drawn in draws}) == 20
    assert {layer for drawn in draws for layer, _, _ in drawn} == {0, 1}
    assert draws[0] == control_neurons(sites, flagged, 0)
    most = [neuron for neuron in everything(sites) if neuron[1] == "attn_v"][:-2]
    assert len(control_neurons(sites, most, 0)) == 2  # no more are left


def test_hooks_are_gone_whatever_happens() -> None:
    model = random_model("llama")
    sites = neuron_sites(model)
    columns = output_columns(sites, everything(sites))

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    def failing() -> None:
        assert hooks() == len(columns)
        raise RuntimeError

    for context in (patched(model, columns), Recording(columns).of(model)):
        with pytest.raises(RuntimeError), context:
            failing()
        assert hooks() == 0
    with pytest.raises(AttributeError), patched(model, columns | {"model.nowhere": torch.tensor([0])}):
        pass
    assert hooks() == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"original": None}, "attack.original: got None"),
        ({"original": "/no/such/model"}, "attack.original: got '/no/such/model'"),
        ({"original": "tiny"}, "attack.original: got 'tiny', allowed: a model with the same tokenizer"),
        ({"draws": 0}, "attack.draws: got 0"),
        ({"probe_examples": 0}, "attack.probe_examples: got 0"),
        ({"alpha": 0.0}, "attack.alpha: got 0.0"),
        ({"target": "loss"}, "attack.target: got 'loss'"),
    ],
)
def test_mistakes(attacked: Attacked, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attacked.attack(**given)


def test_scores_that_generate_are_refused(attacked: Attacked) -> None:
    with pytest.raises(UserError, match="score: got 'rouge_l', allowed: a teacher-forced score for attack Ablation"):
        Ablation(attacked.original).check(attacked.data, "rouge_l", Devices("cpu"))
