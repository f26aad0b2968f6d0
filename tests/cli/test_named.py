"""What a user names by import path, as the documentation has it, through the console script from another directory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from toys.cli import ROOT, attacking, read_json, script

from lightning_ssiuu.evaluation.scores import SCORES, Score, check_score, find_score
from lightning_ssiuu.utils.errors import UserError

PERPLEXITY, ACTIVATION = "my_scores.perplexity", "my_method.activation"
#: File, where the documentation has its text, a word of it, and how many lines it may take.
WRITTEN = (
    ("my_scores.py", "guide.md", "perplexity = Score", 5),
    ("my_method.py", "attribution_methods.md", "@from_activations", 15),
    ("my_data.py", "guide.md", "class Sums", 5),
)


def block(page: str, word: str) -> str:
    """The documentation's one Python block with a word, without what only shows that it works."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    (text,) = [text for text in blocks if word in text]
    return text.partition("\n\n\ndata = ")[0]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory, in which files are called like libraries, too."""
    folder = tmp_path_factory.mktemp("user")
    for name, page, word, most in WRITTEN:
        text = block(page, word)
        assert sum(bool(line.strip()) for line in text.splitlines()) <= most
        (folder / name).write_text(text, encoding="utf-8")
    for library in ("torch", "yaml", "json"):
        (folder / f"{library}.py").write_text("raise RuntimeError('not the library')", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(here: Path) -> Path:
    """An unlearned model: the user's data, stopping score, table score and attribution method."""
    done = script(
        *(here, "fit", "--model", "GradientDifference", "--model.checkpoint", "tiny", "--data", "my_data.Sums"),
        *("--model.scores", f"[{PERPLEXITY}]", "--stopping.score", PERPLEXITY, "--stopping.threshold", "0"),
        *("--attribution.method", ACTIVATION, "--attribution.memory_budget", "20MB"),
        *("--attribution.probe_examples", "4"),
        *("--trainer.max_steps", "1", "--trainer.default_root_dir", "run"),
    )
    assert done.returncode == 0, done.stderr
    assert f"forget {PERPLEXITY}" in done.stdout
    return here / "run"


def test_fit(run: Path) -> None:
    metrics = read_json(run / "metrics.json")
    assert metrics["score"] == PERPLEXITY
    assert set(metrics["after"]["scores"]["forget"]) == {PERPLEXITY}
    assert metrics["after"]["forget_score"] == metrics["after"]["scores"]["forget"][PERPLEXITY] > 1
    assert metrics["after"]["influence"]["d_plus_total"] > 0
    assert ACTIVATION in (run / "config.yaml").read_text(encoding="utf-8")


def test_attack_takes_the_score_of_the_run(run: Path, here: Path) -> None:
    options = attacking(learning_rates=[1e-4], seeds=[0], p=[0.5], epochs=1)
    done = script(here, "attack", "--model", "run/model", *options)
    assert done.returncode == 0, done.stderr
    (row,) = read_json(run / "attack.json")["attacks"]
    assert row["score"] == PERPLEXITY
    assert row["unlearned"]["before"]["mean"] > 1


def test_ablation_takes_the_method(run: Path, here: Path) -> None:
    models = ("--model", "run/model", "--output", "ablated", "--score", "probability")
    few = attacking(original="tiny", probe_examples=4, draws=1)
    counts = []
    for method in ([], attacking(method=ACTIVATION)):
        done = script(here, "attack", *models, "--attack", "Ablation", *few, *method, "--overwrite")
        assert done.returncode == 0, done.stderr
        content = read_json(here / "ablated" / "attack.json")
        assert content["settings"]["ablation"].get("method") == (ACTIVATION if method else None)
        assert ("method" in content["settings"]["ablation"]) == bool(method)
        counts.append(content["attacks"][0]["n_neurons"])
    assert counts[0] != counts[1]  # other attributions, other flags
    wrong = script(here, "attack", *models, "--attack", "Ablation", *few, "--attack.method", "ablaton", "--overwrite")
    assert wrong.returncode == 2
    assert "attack.method: got 'ablaton', allowed: one of" in wrong.stderr


def test_audit(run: Path, here: Path) -> None:
    models = ("--original", "tiny", "--unlearned", "run/model", "--output", "audited", "--probe_examples", "4")
    done = script(here, "audit", *models, "--method", ACTIVATION, "--scores", f"[{PERPLEXITY}]")
    assert done.returncode == 0, done.stderr
    assert PERPLEXITY in (here / "audited" / "audit.json").read_text(encoding="utf-8")


def test_compare(run: Path, here: Path) -> None:
    done = script(here, "compare", "run", "--output", "table")
    assert done.returncode == 0, done.stderr
    assert PERPLEXITY in done.stdout + "".join(p.read_text(encoding="utf-8") for p in (here / "table").glob("*.csv"))


def test_from_elsewhere(run: Path, here: Path, tmp_path: Path) -> None:
    """The run names what is not found there; PYTHONPATH finds it."""
    elsewhere, modules = tmp_path / "elsewhere", tmp_path / "modules"
    elsewhere.mkdir()
    modules.mkdir()
    (modules / "my_data.py").write_text((here / "my_data.py").read_text(encoding="utf-8"), encoding="utf-8")
    audit = ("audit", "--original", "tiny", "--unlearned", str(run / "model"), "--output", str(elsewhere / "out"))
    refused = script(here, *audit, cwd=elsewhere)
    assert refused.returncode == 2
    assert "(no module my_data: run where it lies, or set PYTHONPATH)" in refused.stderr.splitlines()[-1]
    assert list(elsewhere.iterdir()) == []
    found = script(here, *audit, "--devices", "50", cwd=elsewhere, PYTHONPATH=f"{ROOT}:{modules}")
    assert found.stderr.splitlines()[-1].startswith("lightning-ssiuu: error: devices: got 50")  # of 8 examples
    safe = script(here, *audit, PYTHONSAFEPATH="1")
    assert "(no module my_data: " in safe.stderr.splitlines()[-1]


def test_names_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scores_of_mine.py").write_text(block("guide.md", "perplexity = Score"), encoding="utf-8")
    (tmp_path / "needs_more.py").write_text("import not_installed_at_all", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    known = dict(SCORES)
    check_score("scores_of_mine.perplexity")
    assert find_score("scores_of_mine.perplexity") is SCORES["scores_of_mine.perplexity"]
    assert isinstance(SCORES["scores_of_mine.perplexity"], Score)
    assert dict(SCORES) == known  # a path is no new default score
    for name, said in {
        "scores_of_mine.entropy": "scores_of_mine has no entropy",
        "scores_of_mine.MeanMetric": "the import path of a Score, not of a",
        "nowhere.perplexity": "no module nowhere: run where it lies, or set PYTHONPATH",
        "probabilities": "did you mean 'probability'?",
        ".relative": "one of",
    }.items():
        with pytest.raises(UserError, match=r"stopping\.score") as refused:
            check_score(name, "stopping.score")
        assert said in str(refused.value)
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        check_score("needs_more.score")
