"""``compare.html``, chosen columns, names, suites, and oracles that do not retain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toys.cli import command
from toys.compare import attacked, curves, edit, table, write_json, write_run

from lightning_ssiuu.cli.compare import compare
from lightning_ssiuu.evaluation.runs import oracle_retention
from lightning_ssiuu.reports.compare.page import comparison_html
from lightning_ssiuu.utils.errors import UserError

HOSTILE = "<script>window.hacked=1</script>"


def runs(folder: Path) -> list[Path]:
    drawn = curves(0.1, 1e-4, [9.0, 20.0]) + curves(0.1, 1e-4, [1.0, 2.0], model="oracle")
    attacks = [attacked(0.1, 20.0, 2.0)]
    return [
        write_run(folder / name, objective=name, attacks=attacks, drawn=drawn, lr=rate, utility=60.0)
        for name, rate in (("SSIUU", 1e-3), ("NPO", 1e-4))
    ]


def test_the_page_has_the_table_the_drawings_and_what_differs(tmp_path: Path) -> None:
    page = comparison_html(compare(runs(tmp_path)))
    for text in ("SSIUU", "lr=0.001", "lr=0.0001", "20.0 ± 1.0", "US (embedded)", "NPO</title>", "Pareto front"):
        assert text in page, text
    assert page.count("<svg") == 2
    assert "#0072b2" not in page.partition("</style>")[2]  # in the page's own colours
    assert (tmp_path / "compare" / "compare.html").read_text(encoding="utf-8") == page


def test_names_on_the_page_are_text(tmp_path: Path) -> None:
    ours, other = runs(tmp_path)
    edit(ours / "metrics.json", objective=HOSTILE)
    page = comparison_html(compare([ours, other], labels={other: HOSTILE + "2"}))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_chosen_columns_in_their_order(tmp_path: Path) -> None:
    given = ("compare", *runs(tmp_path), "--output", tmp_path / "out", "--columns", "RS", "harmful_*", "forget_score")
    result = command(*given)
    assert result.status == 0, result.err
    lines = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| method | n | RS | harmful 0.1 | gap | FS |"
    assert [key for key in table(tmp_path / "out")["NPO"] if key in ("retain_score", "test_score")] == ["test_score"]
    with pytest.raises(UserError, match=r"^columns: got 'none', allowed: some of steps, forget_score"):
        compare(runs(tmp_path / "more"), columns=["none"])
    assert not (tmp_path / "more" / "compare").exists()


def test_given_labels_name_rows_by_one_of_their_runs(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"a=b_{seed}", seed=seed) for seed in (0, 1)]
    npo = write_run(tmp_path / "npo", objective="NPO")
    result = command("compare", *paths, npo, "--label", f"{paths[1]}=Ours (x=1)")
    assert result.status == 0, result.err
    assert list(table(tmp_path / "compare")) == ["original", "Ours (x=1)", "NPO"]
    for labels, told in (
        ({npo: "Ours", paths[0]: "Ours"}, "a name that no other row has"),
        ({npo: "oracle"}, "a name that no other row has"),
        ({paths[0]: "one", paths[1]: "two"}, "one name for runs that differ in nothing but the seed"),
        ({tmp_path: "one"}, "RUN=NAME with one of the runs"),
    ):
        with pytest.raises(UserError, match=f"^label: got .*{told}"):
            compare([*paths, npo], tmp_path / "new", labels=labels)
    refused = command("compare", npo, "--label", "nowhere=x")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "RUN=NAME, with a run directory that exists" in refused.err


def test_scores_of_different_suites_are_different_columns(tmp_path: Path) -> None:
    one, other = runs(tmp_path)
    tasks = {"arc_easy": 50.0, "hellaswag": 70.0}
    write_json(other / "utility.json", {"utility_score": 60.0, "tasks": tasks, "suite": "lm_eval"})
    comparison = compare([one, other])
    titles = [column.title for column in comparison.columns if column.key.startswith("utility_score")]
    assert titles == ["US (arc_easy, hellaswag)", "US (embedded)"]
    cells = {row.label: {key for key in row.cells if "utility" in key} for row in comparison.rows}
    assert cells["SSIUU"] == {"utility_score_embedded"}
    assert cells["NPO"] == {"utility_score_arc_easy_hellaswag"}


def test_utility_of_other_numbers_of_items_is_told(tmp_path: Path) -> None:
    for run, n in zip(runs(tmp_path), (10, 500), strict=True):
        edit(run / "utility.json", n_items={"days": n})
    notes = compare([tmp_path / "SSIUU", tmp_path / "NPO"]).notes
    assert notes == ["utility: the runs were measured on different numbers of items of embedded"]


@pytest.mark.parametrize(("retain", "told"), [(91.0, False), (40.0, True)])
def test_an_oracle_that_does_not_retain_is_told(tmp_path: Path, retain: float, told: bool) -> None:
    oracle = write_run(tmp_path / "oracle", (1.0, 60.0, retain), objective="FineTuning", train_on="retain")
    notes = compare([*runs(tmp_path), oracle]).notes
    text = f"that of the table (retain probability {retain} % instead of 92.0 %)"
    assert notes == [f"an oracle does not retain, and is no floor: {text}"] * told


def test_an_oracle_beside_a_run_is_asked_by_both_metrics(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")  # of an original with a retain score of 92
    for retain, lost in ((91.0, False), (40.0, True)):
        oracle = write_run(tmp_path / f"oracle_{lost}", (1.0, 60.0, retain), objective="FineTuning")
        found = oracle_retention(str(run / "model"), str(oracle / "model"))
        assert found is not None
        assert found.lost is lost
    other = write_run(tmp_path / "other", (1.0, 60.0, 40.0), data="other")
    assert oracle_retention(str(run / "model"), str(other / "model")) is None
    assert oracle_retention(str(run / "model"), str(tmp_path / "elsewhere" / "model")) is None


def test_what_attack_and_audit_say_of_their_oracle_is_told(tmp_path: Path) -> None:
    one, other = runs(tmp_path)
    edit(one / "attack.json", settings={"harmful": {"oracle_retains": False}})
    edit(other / "attack.json", settings={"harmful": {"oracle_retains": True}})
    write_json(other / "audit.json", {"scores": {}, "influence": {}, "verdict": {"oracle_retains": False}})
    assert [note.rpartition(": ")[2] for note in compare([one, other]).notes] == [
        f"that beside {one}",
        f"that of the audit of {other}",
    ]
    assert json.loads((one / "attack.json").read_text(encoding="utf-8"))["attacks"]
