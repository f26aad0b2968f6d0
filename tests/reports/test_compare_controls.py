"""``compare`` on runs that were attacked without an oracle."""

from __future__ import annotations

from pathlib import Path

from toys.cli import command
from toys.compare import attacked, curves, spread, table, write_run

from lightning_ssiuu.reports.compare.plots import panels
from lightning_ssiuu.reports.compare.reading import read_runs
from lightning_ssiuu.reports.compare.table import compare_runs
from lightning_ssiuu.reports.compare.writing import caption


def test_controls_of_relearning_are_columns_and_no_lines(tmp_path: Path) -> None:
    row = attacked(0.1, 20.0) | {
        "control": {"before": spread(4.0), "forget_score": spread(6.0, 0.5)},
        "gap": spread(14.0),
    }
    drawn = curves(0.1, 1e-4, [9.0, 20.0]) + curves(0.1, 1e-4, [4.0, 6.0], model="control")
    drawn[0] |= {"utility": {"test": [70.0, 65.0]}, "attacker": {"optimizer": "sgd"}}
    run = write_run(tmp_path / "run", attacks=[row], drawn=drawn)
    assert command("compare", run, "--output", tmp_path / "out").status == 0
    cells = table(tmp_path / "out")["SSIUU"]
    assert (float(cells["harmful_0.1_control"]), float(cells["harmful_0.1_gap"])) == (6.0, 14.0)
    text = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert "gap: minus the oracle's, else the control's, seed by seed." in text
    assert "control: the same attack on facts nobody was taught." in text
    assert "random neurons" not in text
    (lines,) = panels(compare_runs(read_runs([run])[0], "probability").rows[1:2]).values()
    assert {key: [curve["model"] for curve in of] for key, of in lines.items()} == {0: ["unlearned"]}
    assert (tmp_path / "out" / "plots" / "recovery_curves.pdf").exists()


def test_each_control_is_explained(tmp_path: Path) -> None:
    def row(attack: str, variant: str) -> dict[str, object]:
        told = {"attack": attack, "kind": attack, "p": None, "variant": variant, "score": "probability"}
        return told | {
            "unlearned": {"before": spread(9.0), "forget_score": spread(8.0)},
            "control": {"forget_score": spread(7.0)},
        }

    def said(name: str, *rows: dict[str, object]) -> str:
        return caption(compare_runs(read_runs([write_run(tmp_path / name, attacks=list(rows))])[0], "probability"))

    neurons, labels = "as many random neurons.", "probes of labels of which half are turned round."
    probes, zero = row("layer_probes", "layer=0"), row("ablation", "zero")
    assert f"control: {neurons}" in (alone := said("a", zero))
    assert labels not in alone
    assert f"control: {labels}" in (alone := said("b", probes))
    assert neurons not in alone
    both = said("c", probes, zero)
    assert f"control of ablation: {neurons} control of layer probes: {labels}" in both
