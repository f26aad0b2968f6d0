"""Wall time and peak memory of the default recipe as a newcomer runs it: the whole command, in a process of its own.

    python benchmarks/default_recipe.py [--runs 3]

Prints one JSON line. Unix only (the peak resident set comes from ``resource``).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "recipes" / "ssiuu.yaml"


def main() -> None:
    """Run, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    seconds = []
    for _ in range(parser.parse_args().runs):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "lightning_ssiuu", "fit", "--config", str(RECIPE)]
            start = time.perf_counter()
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
    # Linux counts the peak in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    print(
        json.dumps(
            {
                "seconds_median": round(statistics.median(seconds), 1),
                "seconds_range": [round(min(seconds), 1), round(max(seconds), 1)],
                "peak_gb": round(peak / 1e9, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
