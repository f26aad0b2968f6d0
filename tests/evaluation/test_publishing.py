"""What leaves with a published model: its own files, a card that says what was measured, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, ModelCard, metadata_load
from huggingface_hub.errors import RepositoryNotFoundError
from toys.cli import command, files, leaks, refused
from toys.models import adapted, equal
from toys.reports import audit_content
from toys.training import fit, ssiuu
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ssiuu.callbacks import RunReport, SavePretrained
from lightning_ssiuu.cli.publish import publish
from lightning_ssiuu.evaluation.model_card import base_of
from lightning_ssiuu.evaluation.shown_settings import shown_settings
from lightning_ssiuu.models.digest import weights_sha256
from lightning_ssiuu.models.export import save_adapter
from lightning_ssiuu.models.loading import TINY, load_model, load_tokenizer
from lightning_ssiuu.reports.certificate.content import certificate, key_of
from lightning_ssiuu.utils.errors import UserError

DATA = "d" * 64
SCORES = {split: {"probability": 88.0123456} for split in ("forget", "retain", "test")}
AFTER = {"forget": {"probability": 9.0123456}, "retain": {"probability": 87.25}, "test": {"probability": None}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was attacked, audited and certified; its figures are made up, its weights are the tiny model's."""
    folder = tmp_path / "run"
    shutil.copytree(TINY, folder / "model")
    weights = {"original": "0" * 64, "unlearned": weights_sha256("tiny")}
    made = {"versions": {"torch": "2"}, "seed": 7, "data_sha256": DATA, "config_sha256": "c" * 64}
    moments = {"before": {"scores": SCORES}, "after": {"scores": AFTER, "elicited": {"probability": 30.06}}}
    metrics = {"objective": "SSIUU", "score": "probability", "steps": 3, "stopped_by": "steps", "provenance": made}
    audit = audit_content(hostile=False)
    audit["provenance"] |= {"weights_sha256": weights, "data_sha256": DATA}
    rows = [row | {"variant": None, "gap": row["gap"] | {"mean": 37.66}} for row in audit["relearning"]["attacks"]]
    audit["relearning"] |= {"source": "attack.json", "attacks": rows}
    quantized = {"before": {"mean": 9.0}, "forget_score": {"mean": 12.34, "std": 0.0, "per_seed": [12.34]}}
    row = {"attack": "quantization", "p": None, "variant": "4bit", "score": "probability", "n_attack": None}
    settings = {"provenance": {"data_sha256": DATA, "weights_sha256": {"model": weights["unlearned"]}}}
    attack = {
        "attacks": [*rows, row | {"unlearned": quantized}],
        "curves": audit["relearning"]["curves"],
        "outcomes": [row | {"model": "unlearned", "seed": 4}],
        "settings": {"harmful": settings, "quantization": settings},
    }
    for name, content in (("metrics", metrics | moments), ("attack", attack), ("audit", audit)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    options = {"checkpoint": str(tmp_path / "base"), "retain_weight": 5.0}
    data = {"forget_where": "customer_id == 17", "forget": str(tmp_path / "customers.csv")}
    sections = {
        "model": {"class_path": "lightning_ssiuu.SSIUU", "init_args": options},
        "data": {"class_path": "lightning_ssiuu.CustomData", "init_args": data},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    certify(folder)
    (folder / "model" / "notes.txt").write_text("not for everybody")
    return folder


def certify(folder: Path, **more: Any) -> None:
    content = certificate(folder, ["customer-17"], 40, [], key_of(folder), **more)
    (folder / "certificate.json").write_text(json.dumps(content))


def changed(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer("Question: Who wrote it?\nAnswer:", return_tensors="pt")).logits


def shown_python(card: str, **put: str) -> dict[str, Any]:
    """What the card's own lines for loading define, with places put in for others."""
    text = card.split("```python\n")[1].split("```")[0]
    for old, new in put.items():
        assert f'"{old}"' in text, text
        text = text.replace(f'"{old}"', repr(new))
    defined: dict[str, Any] = {}
    exec(text, defined)
    return defined


# ---- what leaves --------------------------------------------------------------------------------------------------


def test_the_dry_run_holds_the_model_the_card_and_the_certificate(run: Path, tmp_path: Path) -> None:
    content = publish(str(run), to="me/forgetful", output=str(tmp_path / "out"))
    assert files(tmp_path / "out") == files(TINY) | {"README.md", "certificate.json"} == set(content.files)
    assert content.left_out == ("model/notes.txt: no file of a model",)
    assert (tmp_path / "out" / "certificate.json").read_bytes() == (run / "certificate.json").read_bytes()
    assert weights_sha256(str(tmp_path / "out")) == weights_sha256("tiny")
    result = command("verify", tmp_path / "out" / "certificate.json", "--model", tmp_path / "out")
    assert result.status == 0, result.out


def test_nothing_of_the_data_or_of_the_machine_leaves(run: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        changed(run / "model" / name, lambda content: content.update(name_or_path="runs/base", kept=str(run)))
    out = tmp_path / "out"
    publish(str(run), output=str(out))
    assert not leaks(out)
    key, whole = (run / "certificate.key").read_text().strip(), "88.0123456"
    secrets = [str(tmp_path), str(Path.home()), str(Path.cwd()), "runs/base", "customer", key, DATA, "c" * 64, whole]
    for file in out.iterdir():
        found = [secret for secret in secrets if secret.encode() in file.read_bytes()]
        assert not found, (file.name, found)
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"


def test_a_certificate_with_ids_or_a_path_stays(run: Path, tmp_path: Path) -> None:
    certify(run, shown=True)
    content = publish(str(run), output=str(tmp_path / "ids"))
    assert "certificate.json: it holds ids as they are; certify again without --show_ids" in content.left_out
    certify(run)
    changed(run / "certificate.json", lambda c: c["settings"]["harmful"].update(questions="/srv/me/questions.csv"))
    content = publish(str(run), output=str(tmp_path / "path"))
    assert "certificate.json" not in content.files
    assert "There is no certificate." in (tmp_path / "path" / "README.md").read_text()


def test_only_an_earlier_publication_is_replaced(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = {"run": str(run), "output": str(out)}
    publish(**given)
    with pytest.raises(UserError, match=r"output: .*or --overwrite"):
        publish(**given)
    publish(**given, overwrite=True)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"output: .*thesis\.tex"):
        publish(**given, overwrite=True)
    for inside in ("model", "model/card"):
        with pytest.raises(UserError, match=r"output: .*a directory outside of"):
            publish(str(run), output=str(run / inside), overwrite=True)
    with pytest.raises(UserError, match=r"run: .*with model_adapter in it \(there is model, without --adapter\)"):
        publish(str(run), output=str(tmp_path / "new"), adapter=True)


# ---- the card -----------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_records_say(run: Path, tmp_path: Path) -> None:
    publish(str(run), to="me/forgetful", output=str(tmp_path / "out"), license="mit", base_model="org/base@v1")
    path = tmp_path / "out" / "README.md"
    card = ModelCard.load(path)
    header = metadata_load(path)
    assert header == card.data.to_dict()
    assert (header["library_name"], header["license"], header["base_model"]) == ("transformers", "mit", "org/base")
    assert header["tags"] == ["unlearning", "lightning_ssiuu"]
    audit, attack = (json.loads((run / f"{name}.json").read_text()) for name in ("audit", "attack"))
    first = card.text.strip().split("\n\n")[1]
    assert audit["verdict"]["sentence"] in first
    assert "org/base after unlearning with SSIUU" in first
    found = {(each.dataset_split, each.metric_name): each for each in card.data.eval_results}
    assert card.data.model_name == "forgetful"
    for moment, scores in (("before", SCORES), ("after", AFTER)):
        for split, values in scores.items():
            each = found.get((split, f"probability {moment} unlearning, percent"))
            assert (each and each.metric_value) == (values["probability"] and round(values["probability"], 1))
    for row in attack["attacks"][:2]:
        gap = found["forget", f"probability, harmful, p {row['p']:g}: gap to the oracle, points"]
        assert gap.metric_value == round(row["gap"]["mean"], 1)
        assert gap.metric_args == {"seeds": [0, 1, 2], "std": round(row["gap"]["std"], 1)}
    line = "| quantization, 4bit | probability | 9.0 | 12.3 | – | – | 4 | no |"
    assert line in card.text
    assert "| forget probability, after a few steps of relearning | – | 30.1 |" in card.text
    assert f"`{weights_sha256('tiny')}`" in card.text
    assert f"`{hashlib.sha256((TINY / 'model.safetensors').read_bytes()).hexdigest()}`" in card.text
    assert audit["verdict"]["uncertainty"] in card.text
    tried = card.text.split("not tried: ")[1].split("\n")[0]
    assert "benign" in tried
    assert "harmful" not in tried


@pytest.mark.parametrize("other", [{"weights_sha256": {"unlearned": "2" * 64}}, {"data_sha256": "e" * 64}])
def test_what_is_of_another_model_or_other_data_does_not_count(run: Path, tmp_path: Path, other: Any) -> None:
    (run / "certificate.json").unlink()
    changed(run / "audit.json", lambda content: content["provenance"].update(other))
    changed(run / "attack.json", lambda content: content["settings"]["harmful"]["provenance"].update(other))
    content = publish(str(run), output=str(tmp_path / "out"))
    assert [reason.split(":")[0] for reason in content.left_out[:2]] == ["audit.json", "attack.json (harmful)"]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "**Not audited:" in card.text.strip().split("\n\n")[1]
    assert "| quantization, 4bit" in card.text
    assert "| harmful" not in card.text


def test_names_are_text(run: Path, tmp_path: Path) -> None:
    changed(run / "metrics.json", lambda content: content.update(objective="<img src=x> | [a](javascript:b)\n# c"))
    publish(str(run), output=str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert r"with &lt;img src=x> \| \[a\](javascript:b) # c (3 steps" in text


def test_only_settings_that_tell_of_nobody_are_shown() -> None:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "betas": [0.8, 0.9], "eps": 2e-8}}
    options = {"checkpoint": "/srv/me/model", "retain": "kl", "forget_weight": 1.0, "quantization": "4bit"}
    options |= {"lora": {"r": 4, "modules": ["smith"]}, "optimizer": optimizer, "reference": "runs/smith"}
    data = {"forget_ids": "ids.txt", "max_length": 64, "template": "Tell me of {question}", "seed": None}
    config = {
        "model": {"class_path": "lightning_ssiuu.GradientDifference", "init_args": options},
        "data": {"class_path": "lightning_ssiuu.CustomData", "init_args": data},
        "stopping": {"score": "my_scores.smith", "threshold": "chance"},
        "trainer": {"max_steps": 5, "default_root_dir": "runs/smith", "precision": None},
        "saving": {"push_to_hub": "me/smith"},
    }
    kept = {"retain": "kl", "quantization": "4bit", "lora": {"r": 4}}
    kept["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.8, 0.9], "eps": 2e-8}}
    assert shown_settings(config) == {
        "model": {"class_path": "lightning_ssiuu.GradientDifference", "init_args": kept},
        "data": {"class_path": "lightning_ssiuu.CustomData", "init_args": {"max_length": 64}},
        "trainer": {"max_steps": 5},
        "stopping": {"threshold": "chance"},
    }
    assert shown_settings({"data": {"class_path": "patients.Smith", "init_args": {"ward": 3}}}) == {}


def test_a_base_has_a_name_where_it_came_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path looks like a hub id; what was loaded from the hub lies in its cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert base_of("runs/base").name is None
    folder = tmp_path / "models--runs--base"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    assert base_of("runs/base").hub_id == "runs/base"
    assert base_of("runs/base", "v2").name is None


# ---- loading it again ---------------------------------------------------------------------------------------------


def test_the_cards_own_lines_load_the_same_model(run: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    publish(str(run), to="me/forgetful", output=out)
    defined = shown_python((tmp_path / "out" / "README.md").read_text(), **{"me/forgetful": out})
    assert defined["AutoModelForCausalLM"] is AutoModelForCausalLM
    assert defined["AutoTokenizer"] is AutoTokenizer
    both = logits(defined["model"], defined["tokenizer"]), logits(load_model("tiny"), load_tokenizer("tiny"))
    assert torch.equal(*both)


@pytest.mark.parametrize("local", [False, True], ids=["tiny", "a directory"])
def test_adapters_alone_say_where_they_belong(tmp_path: Path, local: bool) -> None:
    base, run = tmp_path / "secret" if local else "tiny", tmp_path / "run"
    if local:
        shutil.copytree(TINY, base)
    model = adapted(load_model("tiny"))
    save_adapter(model, run / "model_adapter", str(base), load_tokenizer("tiny"))
    options = {"checkpoint": str(base), "quantization": "4bit", "lora": {"r": 2}}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": options}}))
    out = tmp_path / "out"
    publish(str(run), output=str(out), adapter=True)
    card = (out / "README.md").read_text()
    assert str(tmp_path).encode() not in b"".join(file.read_bytes() for file in out.iterdir())
    assert metadata_load(out / "README.md")["library_name"] == "peft"
    assert "trained beside 4bit weights" in card
    named = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == (None if local else "tiny")
    put = {"DIR": str(out)} | ({"BASE": str(base)} if local else {})
    defined = shown_python(card, **put)
    assert torch.equal(logits(defined["model"], defined["tokenizer"]), logits(model, load_tokenizer("tiny")))


# ---- pushing ------------------------------------------------------------------------------------------------------


class Hub:
    """Stands for the hub: what it holds, and what was asked of it in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, held: Any = None, private: bool = True) -> None:
        self.held, self.private, self.calls = held, private, list[Any]()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
        for name in ("whoami", "model_info", "create_repo", "create_commit"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, getattr(self, name))

    def whoami(self) -> None:
        self.calls.append("whoami")

    def model_info(self, name: str) -> Any:
        if self.held is None:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # made of a response, of any HTTP library
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n) for n in self.held], private=self.private)

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append((name, options))

    def create_commit(self, name: str, operations: list[Any], commit_message: str) -> None:
        self.calls.append(operations)

    @property
    def pushed(self) -> dict[str, bytes]:
        added = [each for each in self.calls[-1] if isinstance(each, CommitOperationAdd)]
        found = {}
        for each in added:
            with each.as_file() as file:
                found[each.path_in_repo] = file.read()
        return found


def test_what_is_pushed_is_what_the_dry_run_writes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, out = Hub(monkeypatch), tmp_path / "out"
    publish(str(run), to="me/forgetful", output=str(out))
    assert hub.calls == []
    result = command("publish", run, "--to", "me/forgetful")
    assert result.status == 0, result.err
    assert "Pushed to me/forgetful: " in result.out
    assert "left out: model/notes.txt" in result.err
    assert hub.calls[:2] == ["whoami", ("me/forgetful", {"private": True, "exist_ok": True})]
    assert hub.pushed == {path.name: path.read_bytes() for path in out.iterdir()}


def test_shards_of_an_earlier_model_go(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = ["model-00001-of-00002.safetensors", "model.safetensors", "README.md", "notebook.ipynb", ".gitattributes"]
    hub = Hub(monkeypatch, old)
    refused(command("publish", run, "--to", "me/forgetful"), "to", "a repository without files")
    assert hub.calls == ["whoami"]
    publish(str(run), "me/forgetful", overwrite=True)
    gone = [each.path_in_repo for each in hub.calls[-1] if not isinstance(each, CommitOperationAdd)]
    assert gone == ["model-00001-of-00002.safetensors"]


def test_what_the_hub_refuses_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(command("publish", run), "to", "owner/name")
    for name in ("forgetful", "me/for/getful", "me/for getful", "./me", "me/x--y"):
        refused(command("publish", run, "--to", name), "to", "owner/name")
    refused(command("publish", run, "--to", "me/x"), "to", "HF_HUB_OFFLINE")  # as every test has it
    hub = Hub(monkeypatch, ["config.json"], private=False)
    refused(command("publish", run, "--to", "me/x", "--overwrite"), "to", "this one is public")
    refused(command("publish", run, "--output", run / "new", "--base_model", "x"), "base_model", "owner/name")

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    refused(command("publish", run, "--to", "me/x"), "to", "a hub that answers", "no route")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused(command("publish", run, "--to", "me/x"), "to", "hf auth login")
    assert not any(isinstance(call, list) for call in hub.calls)


def test_fit_pushes_when_everything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback stands before the one that writes metrics.json; the card has its figures all the same."""
    hub, module = Hub(monkeypatch), ssiuu()
    module.scores = ["first_token"]
    fit(module, [SavePretrained(push_to_hub="me/forgetful", private=False), RunReport(False)], tmp_path, 1)
    assert hub.calls[:2] == ["whoami", ("me/forgetful", {"private": False, "exist_ok": True})]
    measured = json.loads((tmp_path / "metrics.json").read_text())["after"]["scores"]["forget"]["first_token"]
    card = ModelCard(hub.pushed["README.md"].decode())
    found = [each.metric_value for each in card.data.eval_results if "first_token after" in each.metric_name]
    assert found[0] == round(measured, 1)
    assert "**Not audited:" in card.text
    assert hub.pushed["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert "This is tiny, the embedded model" in card.text
    assert equal(load_model(str(tmp_path / "model")).parameters(), module.model.hf.parameters())

    def full(*_: Any, **__: Any) -> None:
        raise OSError("quota")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", full)
    saving = SavePretrained(push_to_hub="me/forgetful")
    with pytest.raises(UserError, match=r"saving\.push_to_hub: .*quota.*lightning-ssiuu publish .* --to me/forgetful"):
        saving.on_fit_end(SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path), module)  # type: ignore[arg-type]


def test_fit_is_refused_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("forgetful", "a/b/c"):
        with pytest.raises(UserError, match=r"saving\.push_to_hub: .*owner/name"):
            SavePretrained(push_to_hub=name)
    with pytest.raises(UserError, match=r"saving\.push_to_hub: .*without saving\.folder"):
        SavePretrained(None, push_to_hub="me/x")
    given = ("--trainer.default_root_dir", tmp_path / "run", "--saving.push_to_hub", "me/x")
    refused(command("fit", "--config", "ssiuu", *given), "saving.push_to_hub", "HF_HUB_OFFLINE")
    assert not (tmp_path / "run").exists()
    hub = Hub(monkeypatch, ["config.json"])
    first, other = (SimpleNamespace(is_global_zero=zero, default_root_dir=tmp_path) for zero in (True, False))
    saving = SavePretrained(push_to_hub="me/x")
    saving.setup(other, None, "fit")  # of several processes the first asks and pushes
    saving.on_fit_end(other, None)
    saving.setup(first, None, "validate")
    assert hub.calls == []
    with pytest.raises(UserError, match=r"saving\.push_to_hub: .*a repository without files"):
        saving.setup(first, None, "fit")
