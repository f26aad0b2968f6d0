"""benchmarks/peer_parity.py without the checkout it needs, and with something else in its place."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "peer_parity.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit status, in this process: it has the libraries already."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
            return 1
        return stopped.code or 0
    return 0


def test_it_says_that_it_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 0
    assert capsys.readouterr().out == "skipped: no checkout of open-unlearning was given (--peer DIR)\n"


def test_a_folder_without_the_peer_s_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--peer", tmp_path) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith(f"error: --peer: got {str(tmp_path)!r}, allowed: a checkout")
    assert shown.out == ""
