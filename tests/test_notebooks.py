"""The notebooks run in a kernel, from an empty directory; what is committed has their output, with pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
#: What makes a notebook quick; it changes how much is done, not how it is asked for.
QUICKER = {
    "first_run": {
        "threshold=20.0": "threshold=85.0",
        "every_n_steps=5": "probe_examples=4",
        " epochs=6": " epochs=1, seeds=[0]",
        "[3e-4, 1e-3]": "[1e-3]",
        "data=Facts()": "data=Facts(max_eval_examples=8)",
    },
    "audit_two_checkpoints": {
        "threshold = 10.0": "threshold = 85.0",
        " epochs=6": " epochs=1, seeds=[0]",
        "[3e-4, 1e-3]": "[1e-3]",
        "data=Facts()": "data=Facts(max_eval_examples=8)",
        "probe_examples=32": "probe_examples=4",
        "relearning_probe=True": "relearning_probe=False, own_change=False",
    },
}


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.parametrize("name", QUICKER)
def test_runs_from_an_empty_directory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{FOLDER.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook, shown = read(name), pictures(read(name))
    for long, short in QUICKER[name].items():
        assert any(long in cell.source for cell in notebook.cells), long
        for cell in notebook.cells:
            cell.source = cell.source.replace(long, short)
    work = tmp_path / "reader"
    work.mkdir()
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(work)}}).execute()
    assert pictures(notebook) == shown


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.ipynb"))])
def test_what_is_committed_was_run_from_top_to_bottom(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "%pip install" in code[0].source
    assert name in QUICKER
    assert pictures(notebook) >= 2
    assert not [
        output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"
    ]
