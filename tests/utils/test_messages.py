"""Every mistake a user can make: exit status 2, one line that names the argument, nothing written."""

from __future__ import annotations

import collections
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from toys.cli import RECIPES, command, files, fit, question_rows, refused, write_rows

from lightning_ssiuu.models.loading import TINY
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.messages import trainer_mistakes, user_error

pytestmark = pytest.mark.usefixtures("few_facts")

INIT, REGULARIZER = "--model.init_args", "--model.init_args.regularizer.init_args"
GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")


FIT_OPTIONS: dict[str, tuple[list[str], str, list[str]]] = {
    "unknown objective": (
        ["--model.class_path", "NOPE"],
        "model.class_path",
        ["'NOPE'", "GradientDifference", "SSIUU"],
    ),
    "not an objective": (["--model.class_path", "torch.nn.Linear"], "model.class_path", ["GradientAscent"]),
    "unknown data": (["--data.class_path", "no.Such"], "data.class_path", ["'no.Such'", "TOFU", "CustomData"]),
    "unknown regulariser": (
        [f"{INIT}.regularizer", "Nope"],
        "model.init_args.regularizer.class_path",
        ["AttributionRegularizer"],
    ),
    "unknown optimiser": ([f"{INIT}.optimizer", "torch.optim.Nope"], "model.init_args.optimizer.class_path", []),
    "negative lambda": ([f"{REGULARIZER}.weight", "-1"], "regularizer.weight", ["-1.0", "a finite number ≥ 0"]),
    "lambda is no number": (
        [f"{REGULARIZER}.weight", "much"],
        "model.init_args.regularizer.init_args.weight",
        ["'much'", "a number"],
    ),
    "unknown weight mode": (
        [f"{REGULARIZER}.weight_mode", "foo"],
        "model.init_args.regularizer.init_args.weight_mode",
        ["'foo'", "'absolute', 'relative'"],
    ),
    "unknown modules": ([f"{REGULARIZER}.modules", "[nope]"], "regularizer.modules", ["'nope'", "mlp_up"]),
    "negative loss weight": (["--model.init_args.retain_weight", "-1"], "retain_weight", ["-1.0", "≥ 0"]),
    "negative learning rate": ([f"{INIT}.optimizer.init_args.lr", "-1"], "model.optimizer", ["learning rate"]),
    "unknown data option": (["--data.init_args.nope", "3"], "data.init_args.nope", ["phrasing", "batch_size"]),
    "unknown option": (["--nope", "3"], "nope", ["--help"]),
    "too long": (["--data.init_args.max_length", "8"], "max_length", ["8", "example ids"]),
    "beyond the context": (["--data.init_args.max_length", "500"], "max_length", ["500", "128"]),
    "threshold met": (
        ["--stopping.score", "probability", "--stopping.threshold", "99"],
        "stopping.threshold",
        ["'99'", "below the forget set's probability", "before the first step"],
    ),
    "threshold range": (["--stopping.threshold", "200"], "stopping.threshold", ["200.0", "[0, 100)"]),
    "threshold is no number": (
        ["--stopping.threshold", "low"],
        "stopping.threshold",
        ["'low'", "'mismatched', 'chance', 'test', null"],
    ),
    "no such level": (
        ["--stopping.score", "multiple_choice", "--stopping.threshold", "mismatched"],
        "stopping.threshold",
        ["'mismatched'"],
    ),
    "unknown score": (["--stopping.score", "nope"], "stopping.score", ["'nope'", "probability"]),
    "unknown table score": ([f"{INIT}.scores", "[nope]"], "scores", ["'nope'", "rouge_l"]),
    "false-positive rate": (["--attribution.alpha", "2"], "attribution.alpha", ["2.0", "(0, 1)"]),
    "missing checkpoint": ([f"{INIT}.checkpoint", "/no/such/model"], "checkpoint", ["'/no/such/model'", "tiny"]),
    "not a model": ([f"{INIT}.checkpoint", str(RECIPES)], "checkpoint", ["no config.json there"]),
    "not a device": (["--trainer.accelerator", "abacus"], "trainer.accelerator", ["'abacus'", "cpu"]),
    "no devices": (["--trainer.devices", "0"], "trainer.devices", ["'0'"]),
    "no epochs": (["--trainer.max_epochs", "0"], "trainer.max_epochs", ["≥ 1"]),
    "no evaluation": (["--trainer.limit_val_batches", "0"], "data", ["trainer.limit_val_batches"]),
    "missing config": (["--config", "/no/such/recipe.yaml"], "config", ["recipe.yaml", "an existing file"]),
    "config is a directory": (["--config", str(RECIPES)], "config", ["an existing file"]),
}


@pytest.mark.parametrize("name", FIT_OPTIONS)
def test_fit_options(name: str, tmp_path: Path) -> None:
    options, argument, said = FIT_OPTIONS[name]
    refused(fit(tmp_path / "run", *options), argument, *said)
    assert list(tmp_path.iterdir()) == []


@GPU
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    refused(fit(tmp_path / "run", "--trainer.accelerator", "cuda"), "trainer.accelerator", "'cuda'", "['cpu']")
    attack = command("attack", "--model", "tiny", "--output", tmp_path / "run", "--accelerator", "cuda")
    refused(attack, "accelerator", "'cuda'", "['cpu']")
    same = ("--original", "tiny", "--unlearned", "tiny")
    audit = command("audit", *same, "--output", tmp_path / "run", "--accelerator", "gpu")
    refused(audit, "accelerator", "'gpu'", "No supported gpu")
    assert list(tmp_path.iterdir()) == []


YAML: dict[str, tuple[str, str, list[str]]] = {
    "unknown key": ("nope: 1", "nope", []),
    "unknown section key": ("trainer: {nope: 1}", "trainer.nope", []),
    "unknown constructor key": (
        "model: {init_args: {nope: 1}}",
        "model.init_args.nope",
        ["retain_weight", "checkpoint"],
    ),
    "another command's file": ("kind: harmful", "kind", []),
    "not YAML": ("model: [", "config", ["valid YAML"]),
    "objective inside": (
        "model: {class_path: SSIUU, init_args: {backbone: {class_path: Nope}}}",
        "model.init_args.backbone.class_path",
        ["GradientAscent"],
    ),
    "missing constructor arguments": (
        "data: {class_path: FaithUn, init_args: {}}",
        "data.init_args.path",
        ["nothing"],
    ),
    "data without a source": (
        "data: {class_path: CustomData, init_args: {}}",
        "forget, retain",
        ["nothing", "forget_ids"],
    ),
    "wrong type": ("data: {init_args: {batch_size: many}}", "data.init_args.batch_size", ["'many'", "a whole number"]),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(name: str, tmp_path: Path) -> None:
    text, argument, said = YAML[name]
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    refused(fit(tmp_path / "run", "--config", tmp_path / "bad.yaml"), argument, *said)
    assert files(tmp_path) == {"bad.yaml"}


def _empty_forget(folder: Path) -> None:
    write_rows(folder / "forget.jsonl", [])


def _empty_retain(folder: Path) -> None:
    write_rows(folder / "retain.jsonl", [])


def _overlap(folder: Path) -> None:
    write_rows(folder / "retain.jsonl", question_rows(2, 8))


def _missing_column(folder: Path) -> None:
    write_rows(folder / "forget.jsonl", [{"said": "SECRET", "answer": "SECRET"}] * 4)


def _missing_file(folder: Path) -> None:
    (folder / "retain.jsonl").unlink()


def _broken_file(folder: Path) -> None:
    (folder / "forget.jsonl").write_text('{"question": "SECRET", \n', encoding="utf-8")


def _long_answers(folder: Path) -> None:
    write_rows(folder / "forget.jsonl", [{"question": "Who?", "answer": "SECRET " * 200}] * 4)


def _blank_answer(folder: Path) -> None:
    write_rows(folder / "forget.jsonl", [{"question": "SECRET?", "answer": " "}])


@pytest.mark.parametrize(
    ("spoil", "argument", "said"),
    [
        (_empty_forget, "forget", ["0 examples", "at least one"]),
        (_empty_retain, "retain", ["0 examples", "at least one"]),
        (_overlap, "retain", ["2 questions that are also in forget", "disjoint"]),
        (_missing_column, "question_column", ["'question'", "answer, said"]),
        (_missing_file, "retain", ["retain.jsonl"]),
        (_broken_file, "forget", ["valid JSON", "line 1"]),
        (_long_answers, "max_length", ["128", "example ids"]),
        (_blank_answer, "forget", ["blank question or answer"]),
    ],
)
def test_data_of_ones_own(spoil: Callable[[Path], None], argument: str, said: list[str], tmp_path: Path) -> None:
    data = tmp_path / "data"
    sources = {"forget": question_rows(0, 4), "retain": question_rows(4, 8)}
    for name, rows in sources.items():
        write_rows(data / f"{name}.jsonl", rows)
    spoil(data)
    config = {name: str(data / f"{name}.jsonl") for name in sources} | {"batch_size": 1, "retain_batch_size": 1}
    section = {"data": {"class_path": "CustomData", "init_args": config}}
    (tmp_path / "data.yaml").write_text(json.dumps(section), encoding="utf-8")
    result = fit(tmp_path / "run", "--config", tmp_path / "data.yaml", recipe=RECIPES / "objective" / "ssiuu.yaml")
    refused(result, argument, *said)
    assert "SECRET" not in result.out + result.err
    assert not (tmp_path / "run").exists()


def test_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    refused(fit(tmp_path / "file" / "run"), "trainer.default_root_dir", "a directory that can be written")
    attack = command("attack", "--model", "tiny", "--output", tmp_path / "file" / "run")
    refused(attack, "output", "a directory that can be written")


@pytest.mark.parametrize("free", [0, 2 << 20])  # nothing at all; enough to start, too little for the model
def test_no_room_on_the_disk(free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - free, free))
    refused(fit(tmp_path / "run"), "trainer.default_root_dir", "MB free")
    assert list(tmp_path.iterdir()) == []


def test_architecture_without_known_neuron_sites(tmp_path: Path) -> None:
    from toys.models import random_model

    random_model("granite", torch.float32, vocab_size=2048).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / "model" / name)
    short = ("--trainer.max_steps", "1", "--stopping.threshold", "null", "--data.init_args.eval_batch_size", "64")
    short += ("--stopping.unknown", "warn")  # a random model has nothing to forget
    with pytest.warns(UserWarning, match="no neurons are diagnosed: granite is no known architecture"):
        result = fit(tmp_path / "run", "--model.init_args.checkpoint", tmp_path / "model", *short)
    assert result.status == 0, result.err
    assert {"metrics.json", "config.yaml"} <= files(tmp_path / "run")
    assert "spurious_neurons.csv" not in files(tmp_path / "run")


def test_weights_that_are_not_safetensors(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, model / name)
    torch.save({}, model / "pytorch_model.bin")
    refused(fit(tmp_path / "run", "--model.init_args.checkpoint", model), "checkpoint", "safetensors")
    assert not (tmp_path / "run").exists()


ATTACK: dict[str, tuple[list[str], str, list[str]]] = {
    "p too small": (["--attack.p", "[0.001]"], "attack.p", ["0.001", "of 36 it takes 0"]),
    "p too large": (["--attack.p", "[0.999]"], "attack.p", ["0.999", "leaves 0"]),
    "p outside (0, 1)": (["--attack.p", "[1.5]"], "attack.p", ["1.5", "(0, 1)"]),
    "p is no number": (["--attack.p", "[x]"], "attack.init_args.p", ["'x'", "a number"]),
    "no p": (["--attack.p", "[]"], "attack.p", ["[]"]),
    "no seeds": (["--attack.seeds", "[]"], "attack.seeds", ["[]"]),
    "rate 0": (["--attack.learning_rates", "[0]"], "attack.learning_rates", ["0.0", "> 0"]),
    "no epochs": (["--attack.epochs", "0"], "attack.epochs", ["0", "≥ 1"]),
    "batch size 0": (["--attack.batch_size", "0"], "attack.batch_size", ["0"]),
    "unknown attack": (["--attack", "Nope"], "attack.class_path", ["Harmful, ", "a subclass of Attack"]),
    "no attack": (["--attack", "torch.nn.Linear"], "attack.class_path", ["'torch.nn.Linear'", "a subclass of Attack"]),
    "no such module": (["--attack", "no_module.Attack"], "attack.class_path", ["'no_module.Attack'", "Harmful, "]),
    "another attack's option": (["--attack", "Sampling", "--attack.p", "[0.3]"], "attack.init_args.p", ["temperature"]),
    "unknown score": (["--score", "nope"], "score", ["'nope'", "probability"]),
    "missing oracle": (["--oracle", "/no/such/model"], "oracle", ["'/no/such/model'"]),
    "missing instruction data": (
        ["--attack", "Benign", "--attack.benign_path", "/no/such.json"],
        "attack.benign_path",
        ["such.json"],
    ),
    "no devices": (["--accelerator", "cpu", "--devices", "0"], "devices", ["0"]),
    "more devices than examples": (["--accelerator", "cpu", "--devices", "33"], "devices", ["33", "at most 32"]),
    "unknown strategy": (["--strategy", "nope"], "strategy", ["'nope'", "fsdp2"]),
    "unknown precision": (["--precision", "16"], "precision", ["bf16-mixed"]),
    "unknown data": (["--data", "Nope"], "data.class_path", ["Facts"]),
    "unknown option": (["--nope", "1"], "nope", []),
}


@pytest.mark.parametrize("name", ATTACK)
def test_attack_options(name: str, tmp_path: Path) -> None:
    options, argument, said = ATTACK[name]
    refused(command("attack", "--model", "tiny", "--output", tmp_path / "run", *options), argument, *said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        (["fit"], "data, model"),
        (["fit", "--config"], "-c/--config"),
        (["attack"], "model"),
        (["attack", "--model", "tiny"], "output"),  # not part of a run, and nowhere to put results
        (["audit", "--original", "tiny"], "unlearned"),
        (["audit", "--original", "tiny", "--unlearned", "tiny"], "output"),
        (["unlearn"], "COMMAND"),
    ],
)
def test_what_is_missing(arguments: list[str], argument: str) -> None:
    refused(command(*arguments), argument)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        (["--alpha", "1"], "alpha"),
        (["--probe_examples", "0"], "probe_examples"),
        (["--scores", "[nope]"], "scores"),
        (["--target", "nope"], "target"),
        (["--after_attack", "/no/such/model"], "after_attack"),
        (["--accelerator", "abacus"], "accelerator"),
        (["--devices", "0"], "devices"),
        (["--devices", "nine"], "devices"),
        (["--devices", "99"], "devices"),  # more than examples to score
        (["--accelerator", "cpu", "--devices", "4", "--probe_examples", "3"], "probe_examples"),
        (["--strategy", "nope"], "strategy"),
        (["--precision", "bf16-mixed"], "precision"),  # nothing is trained
    ],
)
def test_audit_options(options: list[str], argument: str, tmp_path: Path) -> None:
    same = ("--original", "tiny", "--unlearned", "tiny", "--output", tmp_path / "run")
    refused(command("audit", *same, *options), argument)
    assert list(tmp_path.iterdir()) == []


def test_models_of_different_tokenizers(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append(dict(content["added_tokens"][-1], id=5000, content="<new>"))
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    audit = command("audit", "--original", other, "--unlearned", "tiny", "--output", tmp_path / "run")
    refused(audit, "original", "the same tokenizer")
    attack = command("attack", "--model", "tiny", "--oracle", other, "--output", tmp_path / "run")
    refused(attack, "oracle", "the same tokenizer")
    assert not (tmp_path / "run").exists()


def test_a_users_error_is_found_behind_others() -> None:
    behind = ValueError("Does not validate against any of the Union subtypes")
    behind.__cause__ = UserError("p", 2, "less")
    assert str(user_error(behind)) == "p: got 2, allowed: less"


def test_other_errors_of_a_trainer_pass_through() -> None:
    with pytest.raises(ValueError, match="a defect"), trainer_mistakes({"devices": 1}):
        raise ValueError("a defect")
