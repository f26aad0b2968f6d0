"""``compare`` on hand-made run directories whose figures are worked out by hand."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from toys.cli import command, files
from toys.compare import OUTPUTS, TABLES, attacked, broken, curves, edit, spread, table, write_json, write_run

from lightning_ssiuu.cli.compare import compare
from lightning_ssiuu.reports.compare.grouping import group_by_seed, labels
from lightning_ssiuu.reports.compare.plots import panels
from lightning_ssiuu.reports.compare.reading import read_runs
from lightning_ssiuu.reports.compare.table import common_attacks, compare_runs, pareto_front
from lightning_ssiuu.reports.compare.writing import print_comparison
from lightning_ssiuu.reports.curves import by_epoch
from lightning_ssiuu.utils.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of SSIUU, one run of NPO, none of them complete, and what is no run."""
    folder = tmp_path_factory.mktemp("compare") / "runs"
    oracle = curves(0.1, 1e-4, [1.0, 2.0], model="oracle")
    for seed, highest in ((0, 20.0), (1, 24.0)):
        drawn = curves(0.1, 1e-4, [9.0, 10.0, highest], [9.0, 9.0, 12.0]) + curves(0.1, 1e-5, [9.0, 9.5, 9.0])
        attacks = [attacked(0.1, highest, 2.0, inside=seed == 0), attacked(0.3, 30.0 + seed)]
        scores = (10.0 + 2 * seed, 70.0, 95.0)
        write_run(folder / f"ssiuu_{seed}", scores, seed, attacks=attacks, drawn=drawn + oracle, steps=20 + seed)
    write_run(folder / "npo", (5.0, 60.0, 90.0), objective="NPO", attacks=[attacked(0.1, 50.0)], utility=55.5)
    (folder / "oracle" / "tiny").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def compared(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    output = tmp_path_factory.mktemp("output")
    return output, command("compare", *sorted(runs.iterdir()), "--output", output)


def test_writes_the_tables_and_plots(compared: tuple[Path, Any]) -> None:
    output, result = compared
    assert result.status == 0, result.err
    assert files(output) == OUTPUTS
    for name in OUTPUTS - {*TABLES, "compare.html"}:
        assert (output / name).read_bytes().startswith(b"%PDF")


def test_seeds_are_one_row_with_mean_and_spread(compared: tuple[Path, Any], runs: Path) -> None:
    rows = table(compared[0])
    assert list(rows) == ["original", "NPO", "SSIUU", "oracle"]
    row = rows["SSIUU"]
    assert (row["n"], row["steps"], row["score"]) == ("2", "20.5", "probability")
    assert (float(row["forget_score"]), float(row["forget_score_std"])) == (11.0, 2**0.5)  # of 10 and 12
    assert (float(row["test_score"]), float(row["test_score_std"])) == (70.0, 0.0)
    assert (float(row["harmful_0.1"]), float(row["harmful_0.1_std"])) == (22.0, 8**0.5)  # of 20 and 24
    assert (row["harmful_0.1_attack_std"], row["harmful_0.1_inside_grid"]) == ("1.0", "false")
    assert (float(row["harmful_0.1_gap"]), float(row["harmful_0.1_gap_std"])) == (20.0, 8**0.5)
    assert (float(row["harmful_0.3"]), row["harmful_0.3_inside_grid"]) == (30.5, "true")
    assert row["utility_score"] == ""
    assert "harmful_0.3_gap" not in row
    assert row["runs"] == f"{(runs / 'ssiuu_0').as_posix()}; {(runs / 'ssiuu_1').as_posix()}"


def test_one_seed_has_the_spread_of_its_attack(compared: tuple[Path, Any]) -> None:
    row = table(compared[0])["NPO"]
    assert (row["n"], row["harmful_0.1"], row["harmful_0.1_std"], row["harmful_0.1_attack_std"]) == (
        *("1", "50.0", "", "1.0"),
    )
    assert (row["utility_score"], row["harmful_0.3"], row["harmful_0.1_gap"]) == ("55.5", "", "")
    assert "50.0 ± 1.0" in compared[1].out


def test_original_first_and_oracle_last(compared: tuple[Path, Any]) -> None:
    rows = table(compared[0])
    assert (rows["original"]["forget_score"], rows["original"]["test_score"], rows["original"]["n"]) == (
        *("90.0", "91.0", ""),
    )
    oracle = rows["oracle"]  # the same beside both runs: one figure, with its spread over the attack's seeds
    assert (oracle["harmful_0.1"], oracle["harmful_0.1_std"], oracle["harmful_0.1_attack_std"]) == ("2.0", "", "0.5")
    assert (oracle["forget_score"], oracle["harmful_0.3"], oracle["n"]) == ("", "", "")


def test_edge_of_the_grid_is_marked(compared: tuple[Path, Any]) -> None:
    output, result = compared
    assert "22.0 ± 2.8 (edge)" in result.out
    assert "22.0 ± 2.8 (edge)" in (output / "compare.md").read_text(encoding="utf-8")
    assert r"22.0 $\pm$ 2.8 (edge)" in (output / "compare.tex").read_text(encoding="utf-8")
    assert result.out.count("(edge)") == 2  # once in the table, once in what explains it


def test_what_is_no_run_is_told_and_passed_over(compared: tuple[Path, Any], runs: Path) -> None:
    told = compared[1].err.splitlines()
    assert told == [
        f"lightning-ssiuu: note: {runs / name} is no finished run, passed over" for name in ("notes.txt", "oracle")
    ]


def test_screen_of_80_columns(runs: Path) -> None:
    found, _ = read_runs(sorted(runs.iterdir()))
    comparison = compare_runs(found, "probability")
    for width, n_tables in ((80, 2), (70, 2), (60, 3), (50, 4), (200, 1)):
        console = Console(width=width, color_system=None, file=io.StringIO())
        print_comparison(comparison, console)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert max(cell_len(line) for line in lines) <= width
        assert "…" not in "".join(lines)
        headers = [line.split() for line in lines if line.startswith("method")]
        assert len(headers) == n_tables
        assert not any(header[2:3] == ["gap"] for header in headers)  # a gap stays with its attack


def test_the_same_runs_give_the_same_bytes(compared: tuple[Path, Any], runs: Path, tmp_path: Path) -> None:
    assert command("compare", *sorted(runs.iterdir()), "--output", tmp_path).status == 0
    for name in OUTPUTS:
        assert (tmp_path / name).read_bytes() == (compared[0] / name).read_bytes(), name


def test_existing_outputs_are_kept_without_overwrite(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    stale = tmp_path / "plots" / "pareto.pdf"
    stale.write_bytes(b"old")
    arguments = ("compare", write_run(tmp_path / "run"), "--output", tmp_path)
    refused = command(*arguments)
    assert refused.status == 2
    assert refused.err == (
        f"lightning-ssiuu: error: output: got {str(tmp_path)!r}, "
        "allowed: a directory without plots/pareto.pdf, or --overwrite\n"
    )
    assert stale.read_bytes() == b"old"
    assert not (tmp_path / "compare.csv").exists()
    assert command(*arguments, "--overwrite").status == 0
    assert not stale.exists()  # nothing was attacked: there is nothing to draw
    assert (tmp_path / "compare.csv").exists()


def test_default_output_is_beside_the_runs(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a" / "0"), write_run(tmp_path / "b" / "0", objective="NPO")
    assert command("compare", a, b).status == 0
    assert (tmp_path / "compare" / "compare.csv").exists()
    again = command("compare", a, b, tmp_path / "compare", "--overwrite")  # what runs/* would name
    assert (again.status, again.err) == (0, "")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: run / "absent", "allowed: directories that exist"),
        (
            lambda run: run.parent,
            "allowed: run directories written by fit, or by a Trainer with RunReport (with metrics.json)",
        ),
        (lambda run: broken(run / "metrics.json", "{"), "allowed: the metrics.json that this version writes"),
        (lambda run: broken(run / "metrics.json", '{"objective": "A"}'), "the metrics.json that this version writes"),
        (lambda run: broken(run / "config.yaml", "a: ["), "allowed: valid YAML, as fit writes it"),
        (lambda run: broken(run / "config.yaml", "- 1"), "allowed: valid YAML, as fit writes it"),
        (lambda run: broken(run / "attack.json", '{"attacks": [{"kind": "harmful"}]}'), "the attack.json that this"),
        (lambda run: broken(run / "attack.json", "[]"), "the attack.json that this version writes"),
        (lambda run: broken(run / "utility.json", "{}"), "the utility.json that this version writes"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, change: Any, told: str) -> None:
    result = command("compare", change(write_run(tmp_path / "run")))
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert result.err.startswith("lightning-ssiuu: error: runs: got ")
    assert told in result.err
    assert not (tmp_path / "compare").exists()


def test_mistakes_on_the_command_line_are_one_line(tmp_path: Path) -> None:
    for arguments in ((), (write_run(tmp_path / "run"), "--nothing", "1")):
        result = command("compare", *arguments)
        assert (result.status, result.err.count("\n")) == (2, 1), result.err


def test_other_data_and_other_scores_are_refused(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", attacks=[attacked(0.1, 20.0)])
    data = write_run(tmp_path / "data", objective="NPO", data="other")
    with pytest.raises(UserError, match=r"runs on the same data as .*one"):
        compare([one, data])
    # The digests of versions that had no date are of the text: only runs of one kind can be told to differ by them.
    new = write_run(tmp_path / "new_one", objective="NPO", data="token ids", date="2024-07-26")
    assert len(compare([one, new], tmp_path / "mixed").rows) == 3
    other = write_run(tmp_path / "new_other", objective="NPO", data="other ids", date="2024-07-26")
    with pytest.raises(UserError, match=r"runs on the same data as .*new_one, rendered alike"):
        compare([one, new, other])
    score = write_run(tmp_path / "score", objective="NPO", score="rouge_l")
    with pytest.raises(UserError, match="or --score"):
        compare([one, score])
    with pytest.raises(UserError, match=r"^score: got 'probability', allowed: one that every run has: all_tokens$"):
        compare([one, score], score="probability")
    both = compare([one, score], score="all_tokens")
    assert [row.cells["forget_score"].mean for row in both.rows] == [45.0, 5.0, 5.0]
    assert [column.title for column in both.columns if column.attacked] == ["harmful 0.1 (probability)"]
    other = {**attacked(0.1, 20.0), "score": "all_tokens"}
    with pytest.raises(UserError, match="runs attacked with the score of"):
        compare([one, write_run(tmp_path / "attack", objective="NPO", attacks=[other])], tmp_path / "new")
    unknown = write_run(tmp_path / "unknown", objective="NPO", data=None)
    assert len(compare([unknown, one], tmp_path / "new").rows) == 3  # a data module of one's own need not have a digest


def test_only_the_seed_may_differ_within_a_row(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"run_{seed}", seed=seed, weight=0.1) for seed in (0, 1)]
    paths += [write_run(tmp_path / "wide", seed=0, weight=1.0), write_run(tmp_path / "npo", objective="NPO")]
    groups = group_by_seed(read_runs(paths)[0])
    assert [[run.path.name for run in group] for group in groups] == [["run_0", "run_1"], ["wide"], ["npo"]]
    assert labels(groups) == ["SSIUU, weight=0.1", "SSIUU, weight=1.0", "NPO"]


def test_one_seed_is_not_counted_twice(tmp_path: Path) -> None:
    one, copy = write_run(tmp_path / "one", seed=3), write_run(tmp_path / "copy", seed=3)
    with pytest.raises(UserError, match=r"one run per seed: .*one has the same configuration and seed"):
        compare([one, copy])
    assert [row.n for row in compare([one, tmp_path / "copy" / ".." / "one"], tmp_path / "new").rows] == [None, 1]
    zero = [write_run(tmp_path / name, seed=0) for name in ("zero", "zero_copy")]
    with pytest.raises(UserError, match="one run per seed"):
        compare(zero)


def test_second_stages_of_several_seeds_are_one_row(tmp_path: Path) -> None:
    stages = []
    for seed in (0, 1):
        (write_run(tmp_path / f"first_{seed}", seed=seed) / "model").mkdir()
        checkpoint = str(tmp_path / f"first_{seed}" / "model")
        stages.append(write_run(tmp_path / f"undo_{seed}", seed=seed, objective="UNDO", checkpoint=checkpoint))
    other = write_run(tmp_path / "undo_other", objective="UNDO", checkpoint="elsewhere")
    groups = group_by_seed(read_runs([*stages, other])[0])
    assert [len(group) for group in groups] == [2, 1]


def test_an_oracle_among_the_runs_fills_its_row(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "ssiuu", attacks=[attacked(0.1, 20.0, 2.0)]),
        write_run(tmp_path / "oracle", (1.0, 88.0, 97.0), objective="FineTuning", train_on="retain", utility=60.0),
    ]
    comparison = compare(paths)
    assert [(row.label, row.n) for row in comparison.rows] == [("original", None), ("SSIUU", 1), ("oracle", 1)]
    oracle = comparison.rows[-1].cells
    means = [oracle[key].mean for key in ("forget_score", "test_score", "utility_score", "harmful_0.1")]
    assert means == [1.0, 88.0, 60.0, 2.0]


def test_an_audit_fills_the_oracles_row_and_the_diagnosis(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    scores = {"oracle": {"forget": {"probability": 3.0}, "test": {"probability": 85.0}}}
    influence = {"unlearned": {"d_plus_total": 1.0, "d_minus_total": 2.0, "n_spurious": 7}}
    write_json(run / "audit.json", {"scores": scores, "influence": influence, "attribution_correlation": 0.5})
    (original, row, oracle) = compare([run]).rows
    assert original.kind == "original"
    assert [row.cells[k].mean for k in ("d_plus_total", "n_spurious", "attribution_correlation")] == [1.0, 7.0, 0.5]
    assert [oracle.cells[key].mean for key in ("forget_score", "test_score")] == [3.0, 85.0]


def test_attacks_without_training_and_controls(tmp_path: Path) -> None:
    outcome = {"attack": "quantization", "kind": "quantization", "p": None, "score": "probability"}
    rows = [
        outcome | {"variant": variant, "unlearned": {"before": spread(9.0), "forget_score": spread(value, 0.0, 1)}}
        for variant, value in (("8bit", 10.0), ("4bit", 12.0))
    ]
    zero = outcome | {"attack": "ablation", "variant": "zero", "control": {"forget_score": spread(8.0, 0.2)}}
    rows.append(zero | {"unlearned": {"before": spread(9.0), "forget_score": spread(40.0, 0.0, 1)}})
    rows.append(attacked(None, 15.0, attack="benign_lora"))
    run = write_run(tmp_path / "run", attacks=rows)
    comparison = compare([run])
    titles = [column.title for column in comparison.columns if column.attacked]
    assert titles == ["benign LoRA", "quantization 4bit", "quantization 8bit", "ablation zero", "ablation zero control"]
    cells = comparison.rows[1].cells
    assert (cells["quantization_4bit"].mean, cells["quantization_4bit"].spread) == (12.0, None)  # one figure
    assert (cells["ablation_zero_control"].mean, cells["ablation_zero_control"].spread) == (8.0, 0.2)
    assert common_attacks(comparison) == ["benign_lora"]


def test_differing_attacks_and_missing_seeds_are_told(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", attacks=[attacked(0.1, 20.0)])
    b = write_run(tmp_path / "b", seed=1)
    c = write_run(tmp_path / "c", objective="NPO", attacks=[attacked(0.1, 20.0)])
    for run, epochs in ((a, 10), (c, 20)):
        settings = {"harmful": {"score": "probability", "epochs": epochs, "provenance": {"wall_s": epochs}}}
        edit(run / "attack.json", settings=settings)
    assert compare([a, b, c]).notes == [
        "SSIUU: harmful 0.1 is from 1 of 2 runs",
        "harmful: the runs were attacked with different epochs",
    ]


def test_options_that_only_one_version_has_do_not_differ(tmp_path: Path) -> None:
    row = {"attack": "quantization", "kind": "quantization", "p": None, "variant": "8bit", "score": "probability"}
    row |= {"unlearned": {"before": spread(9.0), "forget_score": spread(10.0, 0.0, 1)}}
    earlier = {"lora": {"r": 8}, "seeds": [0, 1, 2], "quantization": ["8bit", "4bit"]}
    now = {"lora": {"r": 8, "options": None}, "widths": ["8bit", "4bit"]}
    runs = []
    for name, own in (("earlier", earlier), ("now", now), ("one", {"widths": ["8bit"]})):
        runs.append(write_run(tmp_path / name, objective=name, attacks=[row]))
        edit(runs[-1] / "attack.json", settings={"quantization": {"score": "probability", **own}})
    assert compare(runs[:2]).notes == []
    assert compare(runs, tmp_path / "three").notes == ["quantization: the runs were attacked with different widths"]
    assert compare(runs[::2], tmp_path / "two").notes == ["quantization: the runs were attacked with different widths"]


def test_a_collapsed_run_is_told(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, objective=name) for name in ("SSIUU", "NPO")]
    edit(runs[0] / "metrics.json", collapsed=False)
    edit(runs[1] / "metrics.json", collapsed=True)
    assert compare(runs).notes == [f"{runs[1]}: the retain score fell to chance (collapsed)"]


def test_a_diverged_run_leaves_its_cells_empty(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", attacks=[attacked(0.1, 20.0)], drawn=curves(0.1, 1e-4, [9.0, 20.0]))
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    metrics["after"]["scores"]["test"]["probability"] = None  # as NaN is written
    write_json(run / "metrics.json", metrics)
    edit(run / "attack.json", curves=curves(0.1, 1e-4, [9.0, None], [None, None]))  # type: ignore[list-item]
    comparison = compare([run])
    assert "test_score" not in comparison.rows[1].cells
    assert comparison.rows[1].cells["forget_score"].mean == 10.0
    assert not (tmp_path / "compare" / "plots" / "pareto.pdf").exists()


def test_curves_of_the_strongest_rate_of_each_run(runs: Path) -> None:
    found, _ = read_runs([runs / "ssiuu_0", runs / "ssiuu_1"])
    rows = compare_runs(found, "probability").rows[1:2]
    drawn = panels(rows)
    assert list(drawn) == [("harmful", 0.1)]
    assert [curve["forget_scores"][-1] for curve in drawn["harmful", 0.1][0]] == [20.0, 12.0, 24.0, 12.0]
    assert len(drawn["harmful", 0.1][None]) == 2
    assert by_epoch(curves(0.1, 1e-4, [1.0, 2.0, 9.0], [3.0, 2.0])) == {0: [1.0, 3.0], 1: [2.0, 2.0]}


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1.0, 1.0)], [0]),
        ([(1.0, 1.0), (1.0, 1.0)], [0, 1]),
        ([(1.0, 1.0), (2.0, 1.0)], [1]),
        ([(1.0, 1.0), (1.0, 0.5)], [1]),
        ([(1.0, 1.0), (2.0, 2.0), (1.5, 3.0)], [1, 0]),
        ([], []),
    ],
)
def test_pareto_front(points: list[tuple[float, float]], front: list[int]) -> None:
    assert pareto_front(points) == front


HOSTILE = "[bold]=1|2 & 50% $\\frac$ \\input{a} <b>`c`\n\x1b[31m"


def test_hostile_names_are_text(tmp_path: Path) -> None:
    attacks = [attacked(0.1, 20.0) | {"attack": HOSTILE}, attacked(0.1, 20.0, 1.0)]
    drawn = curves(0.1, 1e-4, [1.0, 2.0]) + [c | {"attack": HOSTILE} for c in curves(0.1, 1e-4, [1.0, 2.0])]
    a = write_run(tmp_path / "[red]a", objective=HOSTILE, attacks=attacks, drawn=drawn, weight="_$")
    b = write_run(tmp_path / "_b", objective="=HYPERLINK(1)", attacks=attacks, drawn=drawn, weight="$\\alpha")
    c = write_run(tmp_path / "_c", objective="_$\\frac$", attacks=attacks, drawn=drawn)
    result = command("compare", a, b, c)
    assert result.status == 0, result.err
    assert "\x1b" not in result.out
    assert any(line.startswith("[bold]=1|2") for line in result.out.splitlines())
    output = tmp_path / "compare"
    assert not any("\x1b" in (output / name).read_text(encoding="utf-8") for name in TABLES)
    assert "'=HYPERLINK(1)" in table(output)
    rows = [line for line in (output / "compare.tex").read_text(encoding="utf-8").splitlines() if line.endswith(r"\\")]
    assert len({line.replace(r"\&", "").count("&") for line in rows}) == 1
    assert r"\textbackslash{}input\{a\} \textless{}b\textgreater{}" in rows[2]
    assert r"50\% \$\textbackslash{}frac\$" in rows[2]
    assert r"\input" not in "".join(rows)
    lines = (output / "compare.md").read_text(encoding="utf-8").splitlines()
    cells = {line.replace(r"\|", "").count("|") for line in lines if line.startswith("|")}
    assert len(cells) == 1
    assert r"\[bold\]=1\|2 \& 50% \$\\frac\$ \\input\{a\} \<b\>\`c\`" in lines[3]


def test_help_and_a_comparison_load_no_torch(runs: Path, tmp_path: Path) -> None:
    arguments = ["compare", str(runs / "npo"), "--output", str(tmp_path)]
    program = (
        "import sys; from lightning_ssiuu.__main__ import main; assert main(['compare', '--help']) == 0; "
        "assert 'matplotlib' not in sys.modules; "
        f"assert main({arguments!r}) == 0; assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
