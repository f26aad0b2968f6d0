"""The certificate: which model, which rows, what was tried; and nothing that lets the rows be guessed."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_ssiuu.cli.verify import verify
from lightning_ssiuu.datamodules.deletion import IdNames
from lightning_ssiuu.reports.certificate.content import certificate, key_of, keyed, sealed
from lightning_ssiuu.reports.certificate.page import certificate_html
from lightning_ssiuu.utils.errors import UserError

IDS = [f"customer-{number}" for number in range(12)]


def spread(mean: float) -> dict[str, Any]:
    return {"mean": mean, "std": 1.5, "per_seed": [mean - 1.5, mean, mean + 1.5]}


def curve(seed: int, rate: float) -> dict[str, Any]:
    top = 20.0 + 1.5 * (seed - 1) - (rate > 2e-3)
    own = {"attack": "harmful", "kind": "harmful", "model": "unlearned", "p": 0.3, "seed": seed}
    return own | {"learning_rate": rate, "epochs": [0, 4, 8], "forget_scores": [10.0, 15.0, top]}


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
        "curves": [curve(seed, rate) for rate in (1e-3, 4e-3) for seed in range(3)],
        "outcomes": [],
        "settings": {"harmful": {"learning_rates": [1e-3], "epochs": 4, "seeds": [0, 1, 2]}},
    }
    counted = {"source": "attack.json", "attacks": attacks["attacks"]}
    audit = {"verdict": verdict, "scores": {"original": scores, "unlearned": scores}, "relearning": counted}
    audit["provenance"] = {"weights_sha256": {"original": "0" * 64, "unlearned": "1" * 64}}
    metrics |= {"before": moment, "after": moment, "provenance": provenance}
    for name, content in (("metrics", metrics), ("attack", attacks), ("audit", audit)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "config.yaml").write_text("model: {}\n")
    return tmp_path


def made(run: Path, **more: Any) -> dict[str, Any]:
    return certificate(run, IDS[:3], 40, [run / "config.yaml"], key_of(run), **more)


def test_says_what_was_tried_and_what_was_not(run: Path) -> None:
    content = made(run)
    (row,) = content["tried"]
    assert (row["learning_rates"], row["epochs"], row["oracle"]["highest"]["per_seed"]) == (
        [4e-3, 1e-3],  # more than was asked for, as an attack may go on
        8,
        [18.5, 20.0, 21.5],
    )
    assert "harmful" not in content["not_tried"]
    assert {"benign", "quantization"} <= set(content["not_tried"])
    assert content["forget"]["rows"] == 3
    assert content["retain"]["rows"] == 40
    assert row["unlearned"]["by_seed"] == [{"seed": seed, "learning_rate": 1e-3, "epochs": 8} for seed in range(3)]
    assert content["settings"]["harmful"] == {"learning_rates": [1e-3], "epochs": 4, "seeds": [0, 1, 2]}


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
    for number in range(100):  # a condition in the configuration is short, too
        for given in (f"forget_where: customer_id == {number}\n".encode(), (run / "config.yaml").read_bytes()):
            assert hashlib.sha256(given).hexdigest() not in text
    key = (run / "certificate.key").read_bytes().strip()
    found = [name for name in shuffled if keyed(key, "id", name) in content["forget"]["ids_hmac"]]
    assert sorted(found) == IDS[:3]  # with it one can
    assert key.decode() not in text


def test_key_is_made_once_and_private(run: Path) -> None:
    first = key_of(run)
    assert key_of(run) == first
    assert len(first) == 64
    assert (run / "certificate.key").stat().st_mode & 0o077 == 0


def test_hashed_ids_are_told_with_the_key_under_which_they_were_hashed_alone(run: Path) -> None:
    own, other, names = b"a secret of sixteen bytes", b"another one of as many", ["7", "9"]
    for name, key in (("own", own), ("other", other)):
        (run / name).write_bytes(key)
    content = certificate(run, [IdNames(own)("7"), "x"], 40, [], key_of(run), id_key=own)
    (run / "certificate.json").write_text(json.dumps(content))
    given = {"key": str(run / "certificate.key"), "ids": str(run / "ids.txt")}
    (run / "ids.txt").write_text("7\n")
    assert verify(str(run / "certificate.json"), id_key=str(run / "own"), **given)
    for wrong in (None, str(run / "other")):  # would say of a forgotten row that it is not among them
        with pytest.raises(UserError, match=r"id_key: .* the key under which ids were hashed"):
            verify(str(run / "certificate.json"), id_key=wrong, **given)
    (run / "certificate.json").write_text(json.dumps(certificate(run, names, 40, [], key_of(run))))
    assert verify(str(run / "certificate.json"), **given)
    with pytest.raises(UserError, match=r"id_key: .* nothing: the ids were not hashed"):
        verify(str(run / "certificate.json"), id_key=str(run / "own"), **given)


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


def test_figures_are_no_fingerprints(run: Path) -> None:
    """A mean to its last digit tells whoever has the model which rows it is of."""
    audit = json.loads((run / "audit.json").read_text())
    audit["scores"]["unlearned"]["forget"]["probability"] = 9.87123456
    audit["verdict"]["grounds"][0] |= {"share": 0.0123456789, "low": None, "high": 1 / 3}
    (run / "audit.json").write_text(json.dumps(audit))
    attacks = json.loads((run / "attack.json").read_text())
    attacks["attacks"][0]["unlearned"] = {"before": spread(9.87123456), "forget_score": spread(21.123456)}
    (run / "attack.json").write_text(json.dumps(attacks))
    content = made(run)
    assert content["scores"]["unlearned"]["forget"]["probability"] == 9.9
    assert content["verdict"]["grounds"][0] == {"text": "A ground", "share": 0.012, "low": None, "high": 0.333}
    (row,) = content["tried"]
    assert (row["unlearned"]["before"], row["unlearned"]["highest"]["mean"]) == (9.9, 21.1)


def test_what_the_verdict_does_not_count_stands_beside_it(run: Path) -> None:
    assert made(run)["not_counted"] == []
    attacks = json.loads((run / "attack.json").read_text())
    row = {"attack": "quantization", "kind": "quantization", "p": None, "variant": "4bit", "score": "probability"}
    audit = json.loads((run / "audit.json").read_text())
    audit["scores"]["original"]["forget"]["probability"] = 90.0
    (run / "audit.json").write_text(json.dumps(audit))
    for highest, n in ((17.0, 0), (25.0, 1)):  # a tenth of 80 points is 8
        found = {"before": spread(10.0), "forget_score": spread(highest)}
        more = row | {"n_attack": None, "n_scored": 3, "unlearned": found}
        (run / "attack.json").write_text(json.dumps(attacks | {"attacks": [*attacks["attacks"], more]}))
        content = made(run)
        assert len(content["not_counted"]) == n
    (text,) = content["not_counted"]
    assert "quantization 4bit attack" in text
    assert "from 10.0 % to 25.0 %" in text
    assert text in certificate_html(content)


@pytest.mark.parametrize(("left", "n"), [((20.0, 41.6), 1), ((9.0, 8.0), 0)])
def test_a_figure_that_is_no_score_is_counted_beside_the_oracle(left: tuple[float, float], n: int, run: Path) -> None:
    """Unlearning depth starts from 100 by construction; of several layers the one with most is named."""
    attacks = json.loads((run / "attack.json").read_text())
    rows = [
        {"attack": "unlearning_depth", "kind": "unlearning_depth", "p": None, "variant": variant, "score": "1 - UDS"}
        | {"n_attack": None, "n_scored": 3}
        | {"unlearned": {"before": spread(100.0), "forget_score": spread(mean)}}
        | {"oracle": {"before": spread(100.0), "forget_score": spread(0.0)}}
        for variant, mean in zip(("layer=0", "layer=1"), left, strict=True)
    ]
    (run / "attack.json").write_text(json.dumps(attacks | {"attacks": [*attacks["attacks"], *rows]}))
    told = made(run)["not_counted"]
    assert len(told) == n
    assert all(
        "depth layer=1 attack" in text and "(1 - UDS) is 41.6 %, and of the oracle 0.0 %." in text for text in told
    )


def fields_of(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from fields_of(value, (*place, key))
    else:
        yield place


def test_whatever_is_edited_breaks_the_seal(run: Path) -> None:
    content, key = made(run), key_of(run)
    assert sealed(content, key) == content == json.loads(json.dumps(content))
    places = list(fields_of(content))
    assert len(places) > 50
    for place in places:
        edited = json.loads(json.dumps(content))
        holder = edited
        for part in place[:-1]:
            holder = holder[part]
        holder[place[-1]] = "another"
        assert sealed(edited, key)["seal"] != edited["seal"], place
    assert sealed(content, b"another key of the same kind")["seal"] != content["seal"]


def test_a_key_that_can_be_guessed_is_refused(run: Path) -> None:
    (run / "certificate.key").write_text("\n")
    with pytest.raises(UserError, match="at least 16 bytes"):
        made(run)


def test_an_audit_that_does_not_say_of_which_weights_is_refused(run: Path) -> None:
    audit = json.loads((run / "audit.json").read_text())
    del audit["provenance"]
    (run / "audit.json").write_text(json.dumps(audit))
    with pytest.raises(UserError, match="run audit again"):
        made(run)


def passes(certificate: Path, key: Path) -> bool:
    try:
        return verify(str(certificate), key=str(key))
    except UserError as refused:
        return refused.argument != "certificate"


@pytest.mark.parametrize("value", [None, "é", 7, [], "gone"])
def test_an_edited_certificate_is_told_in_a_line_whatever_was_edited(run: Path, value: Any) -> None:
    content = made(run)
    key_of(run)
    file = run / "edited.json"
    for place in fields_of(content):
        edited = json.loads(json.dumps(content))
        holder = edited
        for part in place[:-1]:
            holder = holder[part]
        if value == "gone":
            del holder[place[-1]]
        else:
            holder[place[-1]] = value
        if edited == content:
            continue
        file.write_text(json.dumps(edited))
        assert passes(file, run / "certificate.key") is False, place
        with pytest.raises(UserError):  # there is no data to repeat it with
            verify(str(file), model="tiny", repeat="harmful", p=0.3)
