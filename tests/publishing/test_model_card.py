"""The card of a published model: the records' figures, nothing that tells of the forget set, lines that load it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load
from toys.hub import AFTER, SCORES, audited_run, changed
from toys.models import adapted
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ssiuu.cli.publish import publish
from lightning_ssiuu.models.digest import weights_sha256
from lightning_ssiuu.models.export import save_adapter
from lightning_ssiuu.models.loading import TINY, load_model, load_tokenizer
from lightning_ssiuu.publishing.model_card import base_of
from lightning_ssiuu.publishing.shown_settings import shown_settings


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return audited_run(tmp_path)


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


def test_without_attacks_the_audits_own_is_told(run: Path, tmp_path: Path) -> None:
    (run / "attack.json").unlink()
    publish(str(run), output=str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    row = "| harmful, p 0.3 | probability | 9.0 ± 0.0 | 50.0 ± 1.0 ‡ | oracle 12.0 ± 1.0 | 37.7 ± 0.0 | 0, 1, 2 | yes |"
    assert row in text


def test_no_number_is_none_of_the_hubs(run: Path, tmp_path: Path) -> None:
    changed(run / "metrics.json", lambda content: content["after"]["scores"]["forget"].update(probability=math.nan))
    publish(str(run), output=str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| forget probability | 88.0 | – |" in text
    assert "nan" not in text.lower()


def test_names_are_text(run: Path, tmp_path: Path) -> None:
    changed(run / "metrics.json", lambda content: content.update(objective="<img src=x> | [a](javascript:b)\n# c"))
    publish(str(run), output=str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert r"with &lt;img src=x> \| \[a\](javascript:b) # c (3 steps" in text


@pytest.mark.parametrize(
    ("width", "said"), [("4bit", "beside 4bit weights. The weights here are plain"), (None, "merged")]
)
def test_merged_models_say_what_they_were_trained_as(run: Path, tmp_path: Path, width: str | None, said: str) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_args"] |= {"lora": {"r": 2}, "quantization": width}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    publish(str(run), output=str(tmp_path / "out"))
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_only_settings_that_tell_of_nobody_are_shown() -> None:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "betas": [0.8, 0.9], "eps": 2e-8}}
    options = {"checkpoint": "/srv/me/model", "retain": "kl", "forget_weight": 1.0, "quantization": "4bit"}
    options |= {"lora": {"r": 4, "modules": ["smith"]}, "optimizer": optimizer, "reference": "runs/smith"}
    data = {"forget_ids": [4711, 4712], "max_length": 64, "template": "Tell me of {question}", "seed": None}
    data |= {"id_column": 4711, "smith": 3, "template_options": {"smith": 1}}
    config = {
        "model": {"class_path": "lightning_ssiuu.GradientDifference", "init_args": options},
        "data": {"class_path": "lightning_ssiuu.CustomData", "init_args": data},
        "stopping": {"score": "my_scores.smith", "threshold": "chance"},
        "trainer": {"max_steps": 5, "default_root_dir": "runs/smith", "precision": "bf16-mixed"},
        "saving": {"push_to_hub": "me/smith"},
    }
    kept = {"retain": "kl", "quantization": "4bit", "lora": {"r": 4}}
    kept["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.8, 0.9], "eps": 2e-8}}
    assert shown_settings(config) == {
        "model": {"class_path": "lightning_ssiuu.GradientDifference", "init_args": kept},
        "data": {"class_path": "lightning_ssiuu.CustomData", "init_args": {"max_length": 64}},
        "trainer": {"max_steps": 5, "precision": "bf16-mixed"},
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


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_the_cards_own_lines_load_the_same_model(run: Path, tmp_path: Path, shards: bool) -> None:
    out = str(tmp_path / "out")
    if shards:
        (run / "model" / "model.safetensors").unlink()
        load_model("tiny").save_pretrained(run / "model", max_shard_size="2MB")
    publish(str(run), to="me/forgetful", output=out)
    defined = shown_python((tmp_path / "out" / "README.md").read_text(), **{"me/forgetful": out})
    assert defined["AutoModelForCausalLM"] is AutoModelForCausalLM
    assert defined["AutoTokenizer"] is AutoTokenizer
    assert len(list(Path(out).glob("*.safetensors"))) == (2 if shards else 1)
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
