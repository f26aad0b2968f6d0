"""Where the time of a command goes before it has done anything, and what threads that wait cost: CPU seconds.

Every line is a process of its own; old and new take turns where ``--against DIR`` names another checkout of this
package. CPU seconds (user and system, children included) are what a busy machine leaves comparable; medians with range.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent.parent
_BEGUN = """
import os
import lightning as L

class Begun(L.Callback):
    def on_train_batch_start(self, *_):
        os._exit(0)  # the first step begins
"""
_LOAD = """
from importlib.resources import files
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = str(files("lightning_ssiuu.models") / "tiny")
AutoModelForCausalLM.from_pretrained(folder)
AutoTokenizer.from_pretrained(folder)
"""


def stages(folder: Path) -> dict[str, list[str]]:
    """Commands by what they measure."""
    (folder / "begun.py").write_text(_BEGUN, encoding="utf-8")
    recipe = ["--config", str(HERE / "recipes" / "ssiuu.yaml"), "--overwrite", "--trainer.default_root_dir"]
    fit = ["-m", "lightning_ssiuu", "fit"]
    return {
        "import torch": ["-c", "import torch"],
        "load the embedded model with transformers alone": ["-c", _LOAD],
        "fit --help": [*fit, "--help"],
        "fit to its first step": [*fit, *recipe, str(folder / "a"), "--trainer.callbacks", "begun.Begun"],
        "fit with recipes/ssiuu.yaml": [*fit, *recipe, str(folder / "b")],
    }


def cpu_seconds(command: list[str], folder: str, checkout: Path, **environment: str) -> float:
    """User and system seconds of a process and its children."""
    given = {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *command],
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | given | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout of this package, measured in turns")
    parser.add_argument("--only", help="the stage with this name alone")
    parser.add_argument("--threads", default="1", help="OMP_NUM_THREADS of all; empty: not set")
    options = parser.parse_args()
    checkouts = {"this": HERE} | ({"other": options.against} if options.against else {})
    threads = {"OMP_NUM_THREADS": options.threads} if options.threads else {}
    result: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in stages(Path(folder)).items():
            if options.only in (None, name):
                found: dict[str, list[float]] = {which: [] for which in checkouts}
                for _ in range(options.rounds):
                    for which, checkout in checkouts.items():
                        found[which].append(cpu_seconds(command, folder, checkout, **threads))
                result[name] = {
                    which: [round(f(seconds), 2) for f in (statistics.median, min, max)]
                    for which, seconds in found.items()
                }
    print(json.dumps({"median, least, most CPU seconds": result}, indent=1))


if __name__ == "__main__":
    main()
