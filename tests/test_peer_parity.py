"""benchmarks/peer_parity.py without the checkout it needs, and with something else in its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "peer_parity.py"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


def test_it_says_that_it_is_skipped() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "skipped: no checkout of open-unlearning was given (--peer DIR)\n"


def test_a_folder_without_the_peer_s_losses(tmp_path: Path) -> None:
    done = run("--peer", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: --peer: got {str(tmp_path)!r}, allowed: a checkout")
    assert done.stdout == ""
