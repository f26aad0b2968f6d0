"""Memory and time of large data sets, from the file to the batch: each size in a process of its own.

    python benchmarks/large_sets.py [--sizes 10000 100000 1000000]

Made-up questions and answers (about 40 tokens of the embedded tokenizer) as JSON Lines, so many to forget and 10,000 to
retain, in a temporary directory. Prints one JSON line per size and a Markdown table: what the process's memory grew by
at most after everything was imported (resident, without pages of files), and CPU seconds. Linux only.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

from timing import markdown

from lightning_ssiuu.datamodules import CustomData

RETAIN = 10_000
BATCHES = 200


def write(path: Path, first: int, count: int) -> None:
    """So many questions and answers, numbered, of random syllables."""
    draw = random.Random(first)
    syllables = [consonant + vowel for consonant in "bcdfgklmnprst" for vowel in "aeiou"]
    with path.open("w") as file:
        for number in range(first, first + count):
            about, said = (" ".join(draw.choices(syllables, k=k)) for k in (draw.randint(2, 8), draw.randint(3, 12)))
            file.write(json.dumps({"question": f"What is {number} to {about}?", "answer": said}) + "\n")


def anonymous() -> float:
    """MB of the process that are not pages of files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1e3


class Peak:
    """The most memory inside the block beyond that before it, in MB, looked at 50 times a second."""

    def __enter__(self) -> Peak:
        self.start = self.most = anonymous()
        self.done = Event()
        self.thread = Thread(target=self.look)
        self.thread.start()
        return self

    def look(self) -> None:
        """Until it is done."""
        while not self.done.wait(0.02):
            self.most = max(self.most, anonymous())

    def __exit__(self, *args: object) -> None:
        self.done.set()
        self.thread.join()
        self.grown = max(self.most, anonymous()) - self.start


def measure(folder: Path) -> dict[str, Any]:
    """Everything that ``fit`` does with data."""
    data = CustomData(str(folder / "forget.jsonl"), str(folder / "retain.jsonl"), batch_size=8)
    _ = data.encoder
    row: dict[str, Any] = {"forget": sum(1 for _ in (folder / "forget.jsonl").open())}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = run()
        row[name] = time.process_time() - start
        return result

    with Peak() as peak:
        timed("read and check, s", lambda: data.splits)
        timed("tokenise, s", lambda: data.setup("fit"))
        batches = iter(data.train_dataloader())
        timed("first batch, s", lambda: next(batches))
        timed("200 batches of 8 + 8, s", lambda: [next(batches) for _ in range(BATCHES)])
        timed("digest, s", data.content_sha256)
    return row | {"MB": peak.grown}


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    rows = []
    for size in given.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "forget.jsonl", 0, size)
            write(Path(folder) / "retain.jsonl", size, RETAIN)
            command = [sys.executable, __file__, "--measure", folder]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(said.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    cells = [[f"{value:.3g}" if isinstance(value, float) else f"{value:,}" for value in row.values()] for row in rows]
    print(markdown(list(rows[0]), cells))


if __name__ == "__main__":
    main()
