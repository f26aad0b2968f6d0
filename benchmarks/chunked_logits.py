"""Memory and time of answer tokens' log-probabilities, forward and backward: logits in pieces against all at once.

    python benchmarks/chunked_logits.py [--tokens 4096] [--vocabulary 49152] [--hidden 576] [--repeats 2]

One random unembedding in float32 and as many hidden states as there are answer tokens; the bound is the package's own
(``LOGIT_BYTES``, or what the logits take where that is less). Prints one JSON line: peak allocated in bytes, as torch's
profiler tells, and processor seconds (medians, and ratio of pairs with its range).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timing import allocated_peak, alternating, ratio
from torch import Tensor, nn

from lightning_ssiuu.models.logits import LOGIT_BYTES, ChunkedLogits


def measured(logps: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[int, float]:
    """Bytes at the peak and processor seconds of a forward and backward pass."""
    start = time.process_time()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        logps().sum().backward()
    seconds = time.process_time() - start
    for leaf in leaves:
        leaf.grad = None
    return allocated_peak(profiler), seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    hidden = torch.randn(options.tokens, options.hidden).requires_grad_()
    head = nn.Linear(options.hidden, options.vocabulary, bias=False)
    targets = torch.randint(options.vocabulary, (options.tokens,))
    logits = 4 * options.tokens * options.vocabulary
    ways: dict[str, Callable[[], Tensor]] = {
        "pieces": lambda: ChunkedLogits(hidden, head, targets, min(LOGIT_BYTES, logits)).token_logps,
        "whole": lambda: -F.cross_entropy(head(hidden), targets, reduction="none"),
    }
    found = alternating(
        {name: partial(measured, way, [hidden, head.weight]) for name, way in ways.items()}, options.repeats, 0
    )
    seconds = {name: [pair[1] for pair in pairs] for name, pairs in found.items()}
    report = {
        "logits_bytes": logits,
        "peak_bytes": {name: pairs[-1][0] for name, pairs in found.items()},
        "seconds": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
        "pieces over whole": ratio(seconds["pieces"], seconds["whole"]),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
