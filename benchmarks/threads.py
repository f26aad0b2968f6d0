"""What two threads cost beside one while other programs want the cores: a small network forwards and backwards.

Every setting is a process of its own. On a machine that has nothing else to do the differences vanish: start ``--load``
processes that compute without end to see them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import torch
from torch import nn


def passes(width: int, tokens: int, number: int) -> dict[str, float]:
    """Wall-clock and CPU seconds of so many passes through eight linear layers."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        for _ in range(4)
    ]
    network, x = nn.Sequential(*blocks), torch.randn(tokens, width)
    network(x).sum().backward()
    wall, cpu = time.monotonic(), time.process_time()
    for _ in range(number):
        network(x).sum().backward()
    return {"wall_s": round(time.monotonic() - wall, 2), "cpu_s": round(time.process_time() - cpu, 2)}


def main() -> None:
    """Measure and print one JSON object, or (``--child``) one setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--passes", type=int, default=100)
    parser.add_argument("--load", type=int, default=0, help="processes that compute meanwhile")
    parser.add_argument("--child", action="store_true", help="measure in this process, with its environment's threads")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(passes(options.width, options.tokens, options.passes)))
        return
    settings = {
        "1 thread": {"OMP_NUM_THREADS": "1"},
        "2 threads that sleep while they wait": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
        "2 threads, OpenMP's default": {"OMP_NUM_THREADS": "2"},
    }
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.load)]
    try:
        result = {name: _child(given) for name, given in settings.items()}
    finally:
        for process in busy:
            process.kill()
    print(json.dumps(result, indent=1))


def _child(given: dict[str, str]) -> dict[str, float]:
    own = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, *sys.argv, "--child"], env=own | given, capture_output=True, text=True, check=True
    )
    seconds: dict[str, float] = json.loads(done.stdout)
    return seconds


if __name__ == "__main__":
    main()
