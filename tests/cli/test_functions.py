"""The commands from Python: models in memory, results to look at, and no file that nobody asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import lightning_ssiuu
from lightning_ssiuu import Facts, Harmful, UserError
from lightning_ssiuu.cli.functions import Result
from lightning_ssiuu.models.loading import load_model, load_tokenizer


def test_a_model_in_memory_is_attacked_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    options = {"attack": Harmful(p=[0.3], learning_rates=[1e-4], seeds=[0], epochs=1), "data": Facts()}
    found = lightning_ssiuu.attack(model, "tiny", tokenizer=tokenizer, score="probability", **options)
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr().out == ""
    frame = found.to_pandas()
    assert list(frame["model"]) == ["unlearned", "oracle"]
    assert frame["before"][0] == frame["before"][1] > 80  # the same model, once in memory
    assert frame["highest"][0] == frame["highest"][1]
    assert "Forget probability under attack" in repr(found)
    assert found.content[0]["attack"] == "harmful"


def test_models_that_are_none_are_told() -> None:
    with pytest.raises(UserError, match="model: got 'int'"):
        lightning_ssiuu.utility(3)
    with pytest.raises(UserError, match="tokenizer"):
        lightning_ssiuu.utility(load_model("tiny"))


def test_utility_and_what_it_writes_when_asked(tmp_path: Path) -> None:
    found = lightning_ssiuu.utility("tiny", output=str(tmp_path / "out"), limit=8)
    assert (tmp_path / "out" / "utility.json").is_file()
    assert found.rows[-1][0] == "mean"
    assert found.title == "Utility (embedded), %"


def test_html_is_escaped() -> None:
    page = Result("<b>", ("a",), (("<i>",),), note="&")._repr_html_()
    assert "<b>" not in page
    assert "&lt;i&gt;" in page
    assert "&amp;" in page


def test_all_of_them_are_at_the_root() -> None:
    for name in ("attack", "audit", "compare", "erase", "utility", "privacy"):
        assert callable(getattr(lightning_ssiuu, name))
