"""What a user names by import path, as the documentation has it, in a directory of the user's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toys.cli import ROOT, attacking, read_json, script

from lightning_ssiuu.evaluation.scores import SCORES, Score, check_score, find_score
from lightning_ssiuu.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("few_facts")

PERPLEXITY, ACTIVATION = "my_scores.perplexity", "my_method.activation"
#: File, where the documentation has its text, a word of it, and how many lines it may take.
WRITTEN = (
    ("my_scores.py", "how-to/extending.md", "perplexity = Score", 5),
    ("my_method.py", "how-to/attribution_methods.md", "@from_activations", 15),
    ("my_data.py", "how-to/extending.md", "class Sums", 5),
    ("my_objective.py", "how-to/extending.md", "class BoundedAscent", 5),
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
        *(here, "fit", "--model", "my_objective.BoundedAscent", "--model.checkpoint", "tiny", "--data", "my_data.Sums"),
        *("--model.scores", f"[{PERPLEXITY}]", "--stopping.score", PERPLEXITY, "--stopping.threshold", "0"),
        *("--stopping.unknown", "warn"),  # the model was never told these sums
        *("--attribution.method", ACTIVATION, "--attribution.memory_budget", "20MB"),
        *("--attribution.probe_examples", "4"),
        *("--trainer.max_steps", "1", "--trainer.default_root_dir", "run"),
    )
    assert done.status == 0, done.err
    assert f"forget {PERPLEXITY}" in done.out
    return here / "run"


def test_fit(run: Path) -> None:
    metrics = read_json(run / "metrics.json")
    assert metrics["objective"] == "BoundedAscent"
    assert metrics["score"] == PERPLEXITY
    assert set(metrics["after"]["scores"]["forget"]) == {PERPLEXITY}
    assert metrics["after"]["forget_score"] == metrics["after"]["scores"]["forget"][PERPLEXITY] > 1
    assert metrics["after"]["influence"]["d_plus_total"] > 0
    assert ACTIVATION in (run / "config.yaml").read_text(encoding="utf-8")


def test_attack_takes_the_score_of_the_run(run: Path, here: Path) -> None:
    options = attacking(learning_rates=[1e-4], seeds=[0], p=[0.5], epochs=1)
    done = script(here, "attack", "--model", "run/model", *options)
    assert done.status == 0, done.err
    (row,) = read_json(run / "attack.json")["attacks"]
    assert row["score"] == PERPLEXITY
    assert row["unlearned"]["before"]["mean"] > 1


def test_ablation_takes_the_method(run: Path, here: Path) -> None:
    models = ("--model", "run/model", "--output", "ablated", "--score", "probability")
    few = attacking(original="tiny", probe_examples=4, draws=1)
    counts = []
    for method in ([], attacking(method=ACTIVATION)):
        done = script(here, "attack", *models, "--attack", "Ablation", *few, *method, "--overwrite")
        assert done.status == 0, done.err
        content = read_json(here / "ablated" / "attack.json")
        assert content["settings"]["ablation"].get("method") == (ACTIVATION if method else None)
        assert ("method" in content["settings"]["ablation"]) == bool(method)
        counts.append(content["attacks"][0]["n_neurons"])
    assert counts[0] != counts[1]  # other attributions, other flags
    wrong = script(here, "attack", *models, "--attack", "Ablation", *few, "--attack.method", "ablaton", "--overwrite")
    assert wrong.status == 2
    assert "attack.method: got 'ablaton', allowed: one of" in wrong.err


def test_audit(run: Path, here: Path) -> None:
    models = ("--original", "tiny", "--unlearned", "run/model", "--output", "audited", "--probe_examples", "4")
    done = script(here, "audit", *models, "--method", ACTIVATION, "--scores", f"[{PERPLEXITY}]")
    assert done.status == 0, done.err
    assert PERPLEXITY in (here / "audited" / "audit.json").read_text(encoding="utf-8")


def test_compare(run: Path, here: Path) -> None:
    done = script(here, "compare", "run", "--output", "table")
    assert done.status == 0, done.err
    assert PERPLEXITY in done.out + "".join(p.read_text(encoding="utf-8") for p in (here / "table").glob("*.csv"))


def test_from_elsewhere(run: Path, here: Path, tmp_path: Path) -> None:
    """The run names what is not found there; PYTHONPATH finds it."""
    elsewhere, modules = tmp_path / "elsewhere", tmp_path / "modules"
    elsewhere.mkdir()
    modules.mkdir()
    (modules / "my_data.py").write_text((here / "my_data.py").read_text(encoding="utf-8"), encoding="utf-8")
    audit = ("audit", "--original", "tiny", "--unlearned", str(run / "model"), "--output", str(elsewhere / "out"))
    refused = script(elsewhere, *audit)
    assert refused.status == 2
    assert "(no module my_data: run where it lies, or set PYTHONPATH)" in refused.err.splitlines()[-1]
    assert list(elsewhere.iterdir()) == []
    found = script(elsewhere, *audit, "--devices", "50", path=[modules])
    assert found.err.splitlines()[-1].startswith("lightning-ssiuu: error: devices: got 50")  # of 8 examples


@pytest.mark.parametrize(("option", "looked_in"), [((), True), (("-P",), False)], ids=["by default", "python -P"])
def test_modules_of_the_working_directory(option: tuple[str, ...], looked_in: bool, here: Path, tmp_path: Path) -> None:
    place = tmp_path / "place.py"
    place.write_text(
        "import os, sys\nfrom lightning_ssiuu import __main__\n__main__.main(['compare', '--help'])\n"
        "print(sys.path.index(os.getcwd()) == len(sys.path) - 1 if os.getcwd() in sys.path else None)",
        encoding="utf-8",
    )
    words = [sys.executable, *option, str(place)]
    done = subprocess.run(words, cwd=here, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == str(True if looked_in else None), done.stderr


def test_names_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scores_of_mine.py").write_text(block("how-to/extending.md", "perplexity = Score"), encoding="utf-8")
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
    with pytest.raises(UserError, match="not_installed_at_all") as refused:
        check_score("needs_more.score")
    assert "needs_more cannot be imported: ModuleNotFoundError" in str(refused.value)
