"""``leaderboard`` on hand-made audits whose figures are worked out by hand."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path
from statistics import mean, stdev

import pytest
from toys.cli import command, files
from toys.compare import edit
from toys.leaderboard import HOSTILE, board_page, write_audit

from lightning_ssiuu.cli.leaderboard import leaderboard
from lightning_ssiuu.reports.leaderboard.table import provenance_of
from lightning_ssiuu.reports.leaderboard.writing import leaderboard_html
from lightning_ssiuu.utils.errors import UserError


@pytest.fixture
def audits(tmp_path: Path) -> Path:
    """Three seeds that hide, two that erase, two of which one collapsed, and two methods of one model each."""
    folder = tmp_path / "runs"
    for seed, highest in enumerate((40.0, 44.0, 48.0)):
        run = {"seed": seed, "objective": "NPO", "steps": 20 + seed}
        write_audit(folder / f"npo_{seed}", highest, run=run)
    for seed, highest in enumerate((6.0, 8.0)):
        write_audit(folder / f"ssiuu_{seed}", highest, label="erased", share=0.04, run={"seed": seed})
    for seed, label in enumerate(("collapsed", "erased")):
        write_audit(folder / f"rmu_{seed}", 5.0, label=label, run={"seed": seed, "objective": "RMU"})
    write_audit(folder / "zeta", 4.0, label="erased", run={"objective": "ZETA"})
    write_audit(folder / "alpha", 60.0, run={"objective": "ALPHA"})
    return folder


def rows(output: Path) -> dict[str, dict[str, str]]:
    with (output / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_the_order_the_figures_and_where_they_come_from(audits: Path) -> None:
    (audits / "notes").mkdir()
    result = command("leaderboard", *sorted(audits.iterdir()))
    assert result.status == 0, result.err
    assert files(audits / "leaderboard") == {f"leaderboard.{suffix}" for suffix in ("html", "csv", "md")}
    found = rows(audits / "leaderboard")
    # By the gap where there are several models, the collapsed after all others; of one model each by name.
    assert list(found) == ["original", "SSIUU", "NPO", "RMU", "ALPHA", "ZETA", "oracle"]
    npo = found["NPO"]
    gaps = [36.0, 40.0, 44.0]
    assert (float(npo["gap"]), float(npo["gap_std"])) == pytest.approx((mean(gaps), stdev(gaps)))
    assert (npo["n"], npo["single"], npo["verdicts"], npo["gap_attack_std"]) == ("3", "false", "hidden 3", "2.0")
    assert (float(npo["attacked"]), float(npo["kept"]), float(npo["relearned"])) == pytest.approx((44.0, 80.0, 30.0))
    assert (npo["steps"], npo["seeds"], npo["weights_sha256"]) == ("21.0", "0; 1; 2", "npo_0; npo_1; npo_2")
    assert f"lightning-ssiuu fit --config {audits / 'npo_1'}/config.yaml; lightning-ssiuu audit" in npo["commands"]
    assert (found["RMU"]["verdicts"], found["oracle"]["attacked"]) == ("erased 1, collapsed 1", "4.0")
    assert (found["oracle"]["n"], found["original"]["forget_score"]) == ("1", "90.0")
    told = "ALPHA; ZETA: of one model each, by their names"
    assert (found["ZETA"]["single"], told in result.err, "notes has no audit, passed over" in result.err) == (
        "true",
        True,
        True,
    )
    again = command("leaderboard", *sorted(audits.iterdir()))
    assert (again.status, again.err.count("\n")) == (2, 1)


def test_models_of_others_have_the_suites_names_and_a_table_of_each_split(tmp_path: Path) -> None:
    for split, rate in (("forget10", "1e-05"), ("forget10", "2e-05"), ("forget01", "1e-05")):
        suite = {"name": "tofu", "split": split, "model": "Llama", "method": "NPO", "settings": {"lr": rate}}
        write_audit(tmp_path / f"{split}_{rate}", suite=suite, data=split)
    boards = leaderboard(sorted(tmp_path.iterdir()), tmp_path / "out")
    assert [board.title for board in boards] == ["TOFU forget01, Llama", "TOFU forget10, Llama"]
    labels = [[line.label for line in board.lines if line.kind == "method"] for board in boards]
    assert labels == [["NPO"], ["NPO, lr=1e-05", "NPO, lr=2e-05"]]
    text = (tmp_path / "out" / "leaderboard.md").read_text(encoding="utf-8")
    assert "| NPO, lr=1e-05 (one model) | 1 | hidden | 36.0 ± 2.0 |" in text
    assert "lightning-ssiuu fit" not in text  # nobody knows how they were made


def test_a_name_makes_one_method_of_audits_without_a_run(tmp_path: Path) -> None:
    paths = [write_audit(tmp_path / name, 40.0 + seed, oracle=None) for seed, name in enumerate("ab")]
    (board,) = leaderboard(paths, labels={paths[0]: "Ours", paths[1]: "Ours"})
    assert [(line.label, line.n) for line in board.lines] == [("original", 1), ("Ours", 2)]
    assert [note.partition(":")[0] for note in board.notes] == ["no oracle"]
    assert "gap" not in board.lines[1].cells


def test_another_attack_is_told(audits: Path) -> None:
    relearning = {"source": "probe", "score": "probability", "options": {"p": 0.3}, "curves": [], "attacks": []}
    other = write_audit(audits / "other", run={"objective": "OTHER"})
    content = relearning | {"attacks": [{**_row(other), "p": 0.3}]}
    edit(other / "audit.json", relearning=content)
    (board,) = leaderboard([other, audits / "alpha"], audits / "out")
    assert any(note.startswith("harmful: the runs were attacked with different options") for note in board.notes)


def _row(folder: Path) -> dict[str, object]:
    import json

    return dict(json.loads((folder / "audit.json").read_text(encoding="utf-8"))["relearning"]["attacks"][0])


def test_names_on_the_page_are_text(tmp_path: Path) -> None:
    suite = {"name": HOSTILE, "split": HOSTILE, "model": HOSTILE, "method": HOSTILE, "settings": {HOSTILE: HOSTILE}}
    page = leaderboard_html(leaderboard([write_audit(tmp_path / "a", suite=suite)], tmp_path / "out"))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count('class="badge"') == 1
    assert "<script" not in board_page(tmp_path / "many")


def test_commands_of_any_directory_can_be_pasted(tmp_path: Path) -> None:
    folder = write_audit(tmp_path / "a run; <b>", run={})
    (board,) = leaderboard([folder], tmp_path / "out")
    (told,) = [one for line in board.lines for one in provenance_of(line)]
    assert shlex.split(told["commands"][0]) == ["lightning-ssiuu", "fit", "--config", f"{folder}/config.yaml"]


def test_mistakes_are_one_line_and_write_nothing(audits: Path) -> None:
    twice = write_audit(audits / "twice", weights="npo_0", run={"objective": "NPO", "seed": 7})
    broken = write_audit(audits / "broken")
    edit(broken / "audit.json", verdict={"label": 1, "grounds": []})
    for given, told in (
        ([audits / "npo_0", twice], "one audit per model: that of .*npo_0 has the same weights"),
        ([broken], "the audit.json that this version writes"),
        ([audits], r"directories that audit wrote \(with audit.json\)"),
        ([audits / "none"], "directories that exist"),
    ):
        with pytest.raises(UserError, match=f"^runs: got .*{told}"):
            leaderboard(given)
    assert not (audits / "leaderboard").exists()
