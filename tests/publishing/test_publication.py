"""What leaves with a published model: its own files, a card that says what was measured, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, ModelCard
from toys.cli import command, files, leaks, refused
from toys.hub import DATA, Hub, audited_run, certify, changed
from toys.models import equal
from toys.training import fit, ssiuu

from lightning_ssiuu.callbacks import RunReport, SavePretrained
from lightning_ssiuu.cli.publish import publish
from lightning_ssiuu.models.digest import weights_sha256
from lightning_ssiuu.models.loading import TINY, load_model
from lightning_ssiuu.utils.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return audited_run(tmp_path)


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
        nested = {"parts": [{"_name_or_path": "runs/base", "kept": str(run)}]}
        changed(run / "model" / name, lambda content, own=nested: content.update(name_or_path="runs/base", **own))
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


def test_a_link_is_not_followed(run: Path, tmp_path: Path) -> None:
    weights = run / "model" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    refused(command("publish", run, "--output", tmp_path / "out"), "run", "model.safetensors", "symbolic link")
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(UserError, match=rf"run: .*, as {run} may be: this is a model"):
        publish(str(run / "model"), output=str(tmp_path / "new"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "data: 3"),
        ("config.yaml", "model: {init_args: [1]}"),
        ("audit.json", '{"verdict": {"label": "a", "sentence": "b"}, "provenance": {"weights_sha256": 3}}'),
        ("attack.json", '{"settings": {"harmful": {"provenance": {"weights_sha256": 3}}}}'),
    ],
)
def test_damaged_records_are_refused(run: Path, tmp_path: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    refused(command("publish", run, "--output", tmp_path / "out"), "run", name)
    assert not (tmp_path / "out").exists()


# ---- pushing ------------------------------------------------------------------------------------------------------


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
    refused(command("publish", run, "--output", run / "new", "--license", "all mine"), "license", "apache-2.0")
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
    assert "This is tiny (the embedded model)" in card.text
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
