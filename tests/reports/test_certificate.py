"""The certificate: which model, which rows, what was tried; and nothing that lets the rows be guessed."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lightning_ssiuu.reports.certificate.content import certificate, key_of, keyed
from lightning_ssiuu.reports.certificate.page import certificate_html
from lightning_ssiuu.utils.errors import UserError

IDS = [f"customer-{number}" for number in range(12)]


def spread(mean: float) -> dict[str, Any]:
    return {"mean": mean, "std": 1.5, "per_seed": [mean - 1.5, mean, mean + 1.5]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    scores = {split: {"probability": 50.0} for split in ("forget", "retain", "test")}
    moment = {"forget_score": 50.0, "scores": scores, "influence": {}}
    provenance = {"versions": {"lightning-ssiuu": "0.1.0", "torch": "2"}, "seed": 7}
    metrics = {"objective": "SSIUU", "score": "probability", "steps": 3, "stopped_by": "probability <= 10 %"}
    verdict = {
        "label": "mixed",
        "sentence": "Mixed: <b>",
        "uncertainty": "One seed.",
        "grounds": [{"text": "A ground"}],
    }
    result = {"before": spread(10.0), "forget_score": spread(20.0), "inside_grid": True}
    row = {"attack": "harmful", "kind": "harmful", "p": 0.3, "variant": None, "score": "probability", "n_attack": 3}
    attacks = {
        "attacks": [row | {"unlearned": result, "oracle": result, "gap": spread(0.0)}],
        "curves": [],
        "outcomes": [],
        "settings": {"harmful": {"learning_rates": [1e-3], "epochs": 4, "seeds": [0, 1, 2]}},
    }
    audit = {"verdict": verdict, "scores": {"original": scores, "unlearned": scores}, "relearning": None}
    metrics |= {"before": moment, "after": moment, "provenance": provenance}
    for name, content in (("metrics", metrics), ("attack", attacks), ("audit", audit)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "config.yaml").write_text("model: {}\n")
    return tmp_path


def made(run: Path, **more: Any) -> dict[str, Any]:
    weights = {"original": "0" * 64, "unlearned": "1" * 64}
    return certificate(run, weights, IDS[:3], 40, [run / "config.yaml"], key_of(run), **more)


def test_says_what_was_tried_and_what_was_not(run: Path) -> None:
    content = made(run)
    (row,) = content["tried"]
    assert (row["learning_rates"], row["epochs"], row["oracle"]["highest"]["per_seed"]) == (
        [1e-3],
        4,
        [18.5, 20.0, 21.5],
    )
    assert "harmful" not in content["not_tried"]
    assert {"benign", "quantization"} <= set(content["not_tried"])
    assert content["forget"]["rows"] == 3
    assert content["retain"]["rows"] == 40
    assert content["configuration_sha256"] == hashlib.sha256(b"model: {}\n").hexdigest()


def test_page_escapes_and_has_everything(run: Path) -> None:
    page = certificate_html(made(run, shown=True))
    assert "Mixed: &lt;b&gt;" in page
    assert all(text in page for text in ("20.0 ± 1.5", "18.5, 20.0, 21.5", "A ground", "customer-2", "1" * 64))


def test_rows_cannot_be_guessed(run: Path) -> None:
    """Whoever has all ids in any order, and the file, cannot tell those that were forgotten from the others."""
    content = made(run)
    text = json.dumps(content) + certificate_html(content)
    shuffled = random.Random(0).sample(IDS, len(IDS))
    for name in shuffled:
        assert name not in text
        for given in (name, f"id{name}", f"id\0{name}", f"{name}\n", json.dumps(name)):
            for digest in (hashlib.sha256, hashlib.sha1, hashlib.md5, hashlib.blake2b):
                assert digest(given.encode()).hexdigest()[:16] not in text
        assert keyed(b"", "id", name) not in text
        assert keyed(bytes(32), "id", name) not in text
    rest = content["forget"]["files_hmac"][0]
    assert rest != content["configuration_sha256"]  # the same file, without and with the key
    key = (run / "certificate.key").read_bytes().strip()
    found = [name for name in shuffled if keyed(key, "id", name) in content["forget"]["ids_hmac"]]
    assert sorted(found) == IDS[:3]  # with it one can
    assert key.decode() not in text


def test_key_is_made_once_and_private(run: Path) -> None:
    first = key_of(run)
    assert key_of(run) == first
    assert len(first) == 64
    assert (run / "certificate.key").stat().st_mode & 0o077 == 0


def test_a_run_that_was_not_audited_is_refused(run: Path) -> None:
    (run / "audit.json").unlink()
    with pytest.raises(UserError, match=r"a directory with audit\.json"):
        made(run)


@pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("pdftotext") is None, reason="needs chromium and poppler"
)
def test_prints_to_a_pdf_with_all_of_it(run: Path, tmp_path: Path) -> None:
    page, pdf = tmp_path / "certificate.html", tmp_path / "certificate.pdf"
    page.write_text(certificate_html(made(run)), encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", profile]
    subprocess.run(
        [*words, "--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.as_uri()], check=True, capture_output=True
    )
    text = subprocess.run(["pdftotext", "-layout", pdf, "-"], check=True, capture_output=True, text=True).stdout
    assert "Certificate of unlearning" in text
    assert "18.5, 20.0, 21.5" in " ".join(text.split())
    assert "1" * 64 in "".join(text.split())
