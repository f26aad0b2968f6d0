"""The engine vLLM, on a stand-in of its interface: the texts of transformers, and what it is refused for."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.cli import command, refused
from toys.training import FewFacts
from toys.vllm import Calls, stand_in

from lightning_ssiuu import Facts
from lightning_ssiuu.attacks import Harmful, Paraphrase, Sampling
from lightning_ssiuu.attacks.base import Target
from lightning_ssiuu.evaluation.predictions import grouped
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.drawing import Draw
from lightning_ssiuu.models.generation import continued
from lightning_ssiuu.models.loading import load_model, load_tokenizer, resolve_checkpoint
from lightning_ssiuu.reports.audit.measure import measure
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import NotFinite, UserError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return stand_in(monkeypatch)


@pytest.fixture(scope="module")
def blurred(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model, noise on its weights, and settings stored with it that would give other texts."""
    model, folder = load_model("tiny"), tmp_path_factory.mktemp("vllm") / "blurred"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data += 0.6 * parameter.data.std() * torch.randn_like(parameter)
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.eos_token_id = 20
    model.save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


def test_greedy_texts_are_those_of_transformers(blurred: str, calls: Calls) -> None:
    data = FewFacts(12, tokenizer=blurred)
    parts = [batch["forget"] for batch in data.eval_dataloader("forget")]
    ours, theirs = (Devices("cpu", engine=name).load(blurred, unchanged=True) for name in ("transformers", "vllm"))
    requests = [one for each in grouped(ours, data.tokenizer, parts) for one in each.requests()]
    pad = data.tokenizer.pad_token_id
    expected = continued(ours, requests, pad, 16)
    assert len(set(map(len, expected))) > 2  # some end by themselves
    assert calls.models == []
    assert continued(theirs, requests, pad, 16) == expected
    assert calls.models == [{"model": blurred, "dtype": "float32"}]
    assert calls.prompts == [list(request.prompt) for request in requests]
    assert [(p.max_tokens, tuple(p.stop_token_ids or ())) for p in calls.parameters] == [
        (request.limit, request.ends) for request in requests
    ]
    scores = ["rouge_l", "probability"]
    found = [evaluate(m, data.tokenizer, [data.eval_dataloader("forget")], scores) for m in (ours, theirs)]
    assert found[0] == found[1]
    assert 0 < found[0]["forget"]["rouge_l"] < 100
    assert len(calls.models) == 1  # started once


def test_samples_follow_from_their_own_seeds(blurred: str, calls: Calls) -> None:
    data = Facts(tokenizer=blurred)
    (part, *_) = (batch["forget"] for batch in data.eval_dataloader("forget"))
    model = Devices("cpu", engine="vllm").load(blurred, unchanged=True)
    (evaluated,) = grouped(model, data.tokenizer, [part])
    first, second = evaluated.requests()[:2]
    asked = [replace(first, draw=Draw((0, 1, n), 1.5, 0.9)) for n in range(4)] + [replace(second, draw=Draw((0, 2, 0)))]
    found = continued(model, asked, 0, 4)
    assert continued(model, asked[::-1], 0, 4) == found[::-1]
    assert len(set(map(tuple, found[:4]))) > 1
    assert len({parameters.seed for parameters in calls.parameters[:5]}) == 5
    assert [(p.temperature, p.top_p) for p in calls.parameters[:5]] == [(1.5, 0.9)] * 4 + [(1.0, 1.0)]


def test_bfloat16_weights(calls: Calls) -> None:
    model = Devices("cpu", precision="bf16-true", engine="vllm").load("tiny", unchanged=True)
    data = Facts()
    (part, *_) = (batch["forget"] for batch in data.eval_dataloader("forget"))
    assert grouped(model, data.tokenizer, [part])[0].generations
    assert calls.models == [{"model": resolve_checkpoint("tiny"), "dtype": "bfloat16"}]


def test_no_text_of_a_model_that_gives_no_numbers(calls: Calls) -> None:
    calls.scale = torch.nan
    model = Devices("cpu", engine="vllm").load("tiny", unchanged=True)
    data = Facts()
    with pytest.raises(NotFinite, match="checkpoint"):
        evaluate(model, data.tokenizer, [data.eval_dataloader("forget")], ["rouge_l"])


def test_what_vllm_cannot_run(calls: Calls) -> None:
    calls.refusal = RuntimeError("no such\narchitecture")
    model = Devices("cpu", engine="vllm").load("tiny", unchanged=True)
    data = Facts()
    with pytest.raises(UserError, match=r"engine: got 'vllm'.*no such architecture"):
        evaluate(model, data.tokenizer, [data.eval_dataloader("forget")], ["rouge_l"])


@pytest.mark.usefixtures("calls")
def test_changed_weights_are_never_vllms() -> None:
    devices = Devices("cpu", engine="vllm")
    assert devices.load("tiny").engine is None
    assert Target("model", "tiny", devices).load()[0].engine is None


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("options", [{"devices": 2}, {"devices": 2, "strategy": "fsdp2"}, {"strategy": "fsdp2"}])
def test_several_devices(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="engine: got 'vllm', allowed: transformers on several devices"):
        Devices("cpu", engine="vllm", **options)


@pytest.mark.usefixtures("calls")
def test_temperatures_that_vllm_does_not_draw_at() -> None:
    devices = Devices("cpu", engine="vllm")
    for temperature in (0.001, 2.5):
        with pytest.raises(UserError, match=r"attack.temperature.*engine vllm"):
            Sampling(temperature=temperature).check(Facts(), "rouge_l", devices)
    for temperature in (0.0, 1.0):
        Sampling(temperature=temperature).check(Facts(), "rouge_l", devices)
    Sampling(temperature=2.5).check(Facts(), "rouge_l", Devices("cpu"))


ATTACK = ["attack", "--model", "tiny", "--score", "rouge_l", "--accelerator", "cpu", "--engine", "vllm"]


@pytest.mark.parametrize("attack", ["Harmful", "Benign", "Quantization"])
@pytest.mark.usefixtures("calls")
def test_attacks_that_change_the_model(attack: str, tmp_path: Path) -> None:
    done = command(*ATTACK, "--attack", attack, "--output", tmp_path / "out")
    refused(done, "engine", f"got 'vllm', allowed: transformers with attack {attack}")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm(tmp_path: Path) -> None:
    done = command(*ATTACK, "--attack", "Sampling", "--output", tmp_path / "out")
    refused(done, "engine", "got 'vllm', allowed: transformers without vllm: pip install")
    refused(command(*ATTACK[:-1], "fast", "--output", tmp_path / "out"), "engine")
    refused(command("audit", "--original", "tiny", "--unlearned", "tiny", "--engine", "vllm"), "engine", "[vllm]")
    with pytest.raises(UserError, match="engine"):
        Devices("cpu", engine="fast")  # type: ignore[arg-type]


def test_an_attack_by_vllm_is_that_by_transformers(blurred: str, calls: Calls, tmp_path: Path) -> None:
    """At temperature 0, where nothing is drawn."""
    found = []
    for engine in ("transformers", "vllm"):
        options = {"k": "1", "seeds": "[0]", "temperature": "0"}
        given = ["--attack", "Sampling", "--engine", engine, "--model", blurred, "--output", str(tmp_path / engine)]
        given += [word for name, value in options.items() for word in (f"--attack.{name}", value)]
        assert command(*ATTACK, *given, "--data", "Facts", "--data.max_eval_examples", "8").status == 0
        found.append(json.loads((tmp_path / engine / "attack.json").read_text(encoding="utf-8")))
    assert found[0]["attacks"] == found[1]["attacks"]
    assert 0 < found[0]["attacks"][0]["unlearned"]["before"]["mean"] < 100
    assert [content["settings"]["sampling"].get("engine") for content in found] == [None, "vllm"]
    assert [started["model"] for started in calls.models] == [blurred]


def test_other_wordings_and_an_audit_by_vllm(blurred: str, calls: Calls) -> None:
    ours, theirs = (Devices("cpu", engine=name) for name in ("transformers", "vllm"))
    data = FewFacts(tokenizer=blurred)
    found = [list(Paraphrase().run([Target("model", blurred, d)], data, "rouge_l", d)) for d in (ours, theirs)]
    assert found[0] == found[1]
    assert [started["model"] for started in calls.models] == [blurred]
    models = {"original": "tiny", "unlearned": blurred}
    options = {"scores": ["rouge_l"], "score": "rouge_l", "own": False, "show_text": True}
    audited = [measure(models, data, d, 2, "length_normalised", **options) for d in (ours, theirs)]  # type: ignore[arg-type]
    assert audited[0].answers == audited[1].answers
    scores = [{name: examined.scores for name, examined in of.examined.items()} for of in audited]
    assert scores[0] == scores[1]
    assert [started["model"] for started in calls.models[1:]] == [resolve_checkpoint("tiny"), blurred]


def test_those_that_load_models_as_they_are_say_so() -> None:
    assert {attack.engines for attack in (Sampling, Paraphrase)} == {("transformers", "vllm")}
    assert Harmful.engines == ("transformers",)
