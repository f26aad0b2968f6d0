"""A run with everything a published model can have beside it, and something that stands for the hub."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import RepositoryNotFoundError
from toys.reports import audit_content

from lightning_ssiuu.models.digest import weights_sha256
from lightning_ssiuu.models.loading import TINY
from lightning_ssiuu.reports.certificate.content import certificate, key_of

DATA = "d" * 64
SCORES = {split: {"probability": 88.0123456} for split in ("forget", "retain", "test")}
AFTER = {"forget": {"probability": 9.0123456}, "retain": {"probability": 87.25}, "test": {"probability": None}}


def audited_run(tmp_path: Path) -> Path:
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
    """Write the certificate of what is there."""
    content = certificate(folder, ["customer-17"], 40, [], key_of(folder), **more)
    (folder / "certificate.json").write_text(json.dumps(content))


def changed(path: Path, change: Callable[[Any], object]) -> None:
    """Change what a JSON file says."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class Hub:
    """Stands for the hub: what it holds, and what was asked of it in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, held: Any = None, private: bool = True) -> None:
        self.held, self.private, self.calls = held, private, list[Any]()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
        for name in ("whoami", "model_info", "create_repo", "create_commit"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, self._asked(name))

    def _asked(self, name: str) -> Callable[..., Any]:
        real, own = inspect.signature(getattr(huggingface_hub.HfApi, name)), getattr(self, name)

        def asked(*args: Any, **options: Any) -> Any:
            real.bind(*args, **options)  # the library would take it, too
            return own(*args[1:], **options)

        return asked

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
        """The files of the last commit."""
        added = [each for each in self.calls[-1] if isinstance(each, CommitOperationAdd)]
        found = {}
        for each in added:
            with each.as_file() as file:
                found[each.path_in_repo] = file.read()
        return found
