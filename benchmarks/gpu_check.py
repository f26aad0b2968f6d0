"""Everything only a GPU can show, in one command and one JSON.

    python benchmarks/gpu_check.py [--sections parity large ...] [--output gpu_check.json] [--limit 600] [--peer DIR]
    python benchmarks/gpu_check.py --device cpu --small    # every section's code on toy sizes, to see that it runs

Works offline: weights are random or the embedded model's. Every section is a process of its own with a time limit, so
that one that crashes, hangs or runs out of memory costs only itself; what it had measured by then is kept, with one
line on what happened. Exit status 1 when a section failed. GPU memory in bytes, times in seconds.

A section's result is in the file when it is done. Called again with the same output, the sections that are done are
skipped (``--again`` repeats them), so that several short loans of a card make one check.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_sections import SECTIONS
from gpu_tools import Recorder

from lightning_ssiuu.utils.files import write_json


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def child(name: str, device: str, small: bool, folder: str, peer: str | None) -> None:
    """Run one section in this process; its figures and its error, if any, go to files in ``folder``."""
    os.setsid()  # a group of its own: whatever it starts ends with it
    log = os.open(Path(folder) / f"{name}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    recorder = Recorder(Path(folder) / f"{name}.json", device, small, peer)
    try:
        SECTIONS[name].run(recorder)
    except BaseException as error:
        recorder.figures["error"] = one_line(error)
        raise
    finally:
        recorder.write()


def isolated(name: str, device: str, small: bool, limit: float, folder: str, peer: str | None = None) -> dict[str, Any]:
    """Run one section in a process of its own and kill it at its time limit.

    Returns:
        ``status`` (``ok``, ``failed``, ``timeout``), ``seconds``, what it recorded, and an ``error`` if not ok.
    """
    # A forked process has all imports for free, but cannot use a GPU that its parent's libraries have looked at.
    context = multiprocessing.get_context("fork" if device == "cpu" and hasattr(os, "fork") else "spawn")
    process = context.Process(target=child, args=(name, device, small, folder, peer))
    start = time.monotonic()
    process.start()
    process.join(limit)
    late = process.is_alive()
    with contextlib.suppress(ProcessLookupError, PermissionError):  # no group yet, or no longer
        os.killpg(process.pid or 0, signal.SIGKILL)
    if late:
        process.kill()
    process.join()
    file = Path(folder) / f"{name}.json"
    figures = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    seconds = {"seconds": round(time.monotonic() - start, 1)}
    if late:
        return {"status": "timeout", **seconds, **figures, "error": f"not done after {limit:.0f} s"}
    if process.exitcode or "error" in figures:
        return {"status": "failed", **seconds, "error": f"ended with {process.exitcode}", **figures}
    return {"status": "ok", **seconds, **figures}


def done(file: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The sections of an earlier call on the same device and sizes that ended well, but for one that had no peer."""
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if any(earlier.get(name) != report[name] for name in ("device", "small")):
        return {}
    return {n: s for n, s in earlier["sections"].items() if s["status"] == "ok" and "skipped" not in s}


def main() -> int:
    """Run the sections and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--section_limit", type=float, help="seconds for a section; default: each has its own")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--peer", type=Path, help="a checkout of open-unlearning, for the section peer")
    parser.add_argument("--again", action="store_true", help="repeat sections that the output file has")
    options = parser.parse_args()
    start = time.monotonic()
    report: dict[str, Any] = {"device": options.device, "small": options.small, "sections": {}}
    report["sections"] = {} if options.again else done(options.output, report)
    peer = None if options.peer is None else str(options.peer.resolve())
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sections:
            if name in report["sections"]:
                print(f"{name}: done before", flush=True)
                continue
            left = options.limit - (time.monotonic() - start)
            limit = min(left, options.section_limit or SECTIONS[name].limit)
            if limit <= 0:
                result: dict[str, Any] = {"status": "skipped", "error": f"the {options.limit:.0f} s were used up"}
            else:
                result = isolated(name, options.device, options.small, limit, folder, peer)
            report["sections"][name] = result
            print(f"{name}: {result['status']} {result.get('seconds', '')} {result.get('error', '')}", flush=True)
            # Written after every section: an interrupted check is no lost check.
            write_json(options.output, report | {"seconds": round(time.monotonic() - start, 1)})
    return int(any(result["status"] != "ok" for result in report["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
