"""Hundreds of bad inputs: whatever a user gives, one line on stderr that names an argument, and nothing written.

Set LIGHTNING_SSIUU_BAD_INPUTS to try another draw (``"seed"``) or all of them (``"all"``).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toys.bad_inputs import KINDS, SECRET, BadInput, cases
from toys.cli import Result, forget_texts

from lightning_ssiuu.__main__ import main

pytestmark = pytest.mark.usefixtures("few_facts")

_DRAWN = {"options": 90, "configs": 24, "data": 32, "models": 50, "runs": 12}
_TOLD = re.compile(r"lightning-ssiuu: error: [\w.,\-/ ]+: got .*, allowed: .+")
_CHOSEN = os.environ.get("LIGHTNING_SSIUU_BAD_INPUTS", "0")
_CASES = [case for kind in KINDS.values() for case in kind] if _CHOSEN == "all" else cases(int(_CHOSEN), _DRAWN)


@contextlib.contextmanager
def _seen() -> Iterator[dict[int, str]]:
    """What reaches the terminal inside, by descriptor: also what other languages print, and libraries' loggers."""
    shown: dict[int, str] = {}
    streams, kept = (sys.stdout, sys.stderr), [os.dup(1), os.dup(2)]
    handlers = [h for logger in _loggers() for h in logger.handlers if type(h) is logging.StreamHandler]
    before = [handler.stream for handler in handlers]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            for number, file in ((1, out), (2, err)):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", encoding="utf-8", errors="strict") for n in (1, 2))
            warnings.showwarning = _show
            for handler in handlers:
                handler.stream = sys.stderr
            yield shown
        finally:
            for handler, stream in zip(handlers, before, strict=True):
                handler.stream = stream
            for stream in (sys.stdout, sys.stderr):
                stream.close()
            sys.stdout, sys.stderr = streams
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            for number, file in ((1, out), (2, err)):
                file.seek(0)
                shown[number] = file.read().decode("utf-8", errors="surrogateescape")


def _show(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    print(warnings.formatwarning(message, category, filename, lineno), file=sys.stderr)


def _loggers() -> list[logging.Logger]:
    named = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in named if isinstance(logger, logging.Logger))]


def _run(arguments: list[str]) -> Result:
    seed = os.environ.get("PL_GLOBAL_SEED")
    gc.freeze()  # garbage is looked for among what the command makes, not among what was there before
    with _seen() as shown:
        status = main(arguments)
        gc.collect()
    os.environ.pop("PL_GLOBAL_SEED", None)
    if seed is not None:
        os.environ["PL_GLOBAL_SEED"] = seed
    return Result(status, shown[1], shown[2])


@pytest.mark.parametrize("case", _CASES, ids=lambda case: f"{case.kind}: {case.name}".encode("ascii", "replace"))
def test_is_refused_in_one_line(case: BadInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, run = tmp_path / "inputs", tmp_path / "run"
    inputs.mkdir()
    monkeypatch.chdir(inputs)
    arguments = case.arguments(inputs, run)
    given = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = _run(arguments)
    assert result.status == 2, (arguments, result)
    assert _TOLD.fullmatch(result.err.removesuffix("\n")), result.err
    assert result.out == "", result.out
    assert len(result.err) < 1500, len(result.err)
    assert SECRET not in result.err
    assert not any(text.decode() in result.err for text in forget_texts())
    assert result.err.removesuffix("\n").isprintable(), result.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == given
