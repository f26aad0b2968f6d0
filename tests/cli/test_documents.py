"""Plain text through the commands: unlearned, attacked and audited, and shown nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys.cli import BARE, RECIPES, attacking, command, fit, read_json

SECRET = "zimbelstern"


def texts(folder: Path, word: str, count: int) -> Path:
    """Short documents, each with a word of its own."""
    folder.mkdir()
    for n in range(count):
        sentences = " ".join(f"The {word} of house {n * 31 + k} was sold on day {k * k}." for k in range(4))
        (folder / f"{n}.txt").write_text(sentences, encoding="utf-8")
    return folder


@pytest.mark.filterwarnings("ignore:ForgetThresholdStopping")
def test_from_unlearning_to_the_audit(tmp_path: Path) -> None:
    forget, retain, benign = (
        texts(tmp_path / name, word, 4) for name, word in (("forget", SECRET), ("retain", "barrel"), ("benign", "lamp"))
    )
    sizes = {"chunk_tokens": 32, "prefix_tokens": 12, "stride": 24, "batch_size": 4, "retain_batch_size": 4}
    data = [
        f"--data.init_args.{name}={value}" for name, value in (sizes | {"forget": forget, "retain": retain}).items()
    ]
    objective = RECIPES / "objective" / "elicited_unlearning.yaml"
    run = tmp_path / "run"
    result = fit(
        run,
        *("--config", RECIPES / "data" / "documents.yaml", *data, *BARE),
        *("--model.init_args.scores", "[probability, memorized_share]", "--stopping.unknown", "warn"),
        *("--stopping.threshold", "mismatched", "--stopping.elicited.steps", "1"),
        *("--model.init_args.floor", "threshold", "--model.init_args.mismatched_weight", "1.0"),
        recipe=objective,
    )
    assert result.status == 0, result.err
    after = read_json(run / "metrics.json")["after"]
    assert {"probability", "memorized_share"} <= set(after["scores"]["forget"])
    quick = attacking(epochs=1, seeds=[0], learning_rates=[1e-4])
    asked = ("--model", run / "model", "--score", "longest_common_run")
    result = command("attack", *asked, "--attack", "Harmful", *quick, *attacking(p=[0.5]))
    assert result.status == 0, result.err
    result = command("attack", *asked, "--attack", "Benign", *quick, *attacking(benign_path=benign))
    assert result.status == 0, result.err
    assert "chunks with each other's continuations" in " ".join(result.out.split())
    rows = read_json(run / "attack.json")["attacks"]
    assert {row["kind"]: "control" in row for row in rows} == {"harmful": True, "benign": True}
    result = command("attack", *asked, "--attack", "Paraphrase")
    assert result.status == 2
    assert "a forget set without paraphrases" in result.err
    audit = ("--original", "tiny", "--unlearned", run / "model", "--probe_examples", "4", "--scores", "[rouge_l_f1]")
    result = command("audit", *audit, "--score", "extraction_strength")
    assert result.status in (0, 3), result.err
    written = [path for path in run.rglob("*") if path.is_file()]
    assert run / "report.html" in written
    assert not [path.name for path in written if SECRET.encode() in path.read_bytes().lower()]
