"""Run commands in this process and keep what they print; one default run serves every test that needs one."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from lightning_ssiuu.__main__ import main
from lightning_ssiuu.datamodules.embedded import FACTS

ROOT = Path(__file__).parent.parent.parent
RECIPES = ROOT / "recipes"
DEFAULT = RECIPES / "ssiuu.yaml"
#: The environment variable that names the directory of all processes of a test session (conftest.py).
SHARED = "LIGHTNING_SSIUU_TEST_SESSION"
#: What makes a ``fit`` on the embedded model last a second or two.
FAST = (
    *("--model.init_args.scores", "[first_token]"),
    *("--attribution.probe_examples", "8"),
    *("--data.init_args.eval_batch_size", "64", "--data.init_args.retain_batch_size", "12"),
)
SHORT = (
    *(*FAST, "--trainer.max_steps", "2", "--stopping.threshold", "null", "--attribution.every_n_steps", "null"),
    *("--attribution.write", "false"),  # drawing the pictures would take a quarter of it
)
DRAWN = (*SHORT, "--attribution.write", "true")
#: One step, of which as little as possible is told.
BARE = (*DRAWN, "--attribution.probe_examples", "0", "--trainer.max_steps", "1")


def attacking(**options: Any) -> list[str]:
    """Options of an attack as the command line has them."""
    return [word for name, value in options.items() for word in (f"--attack.{name}", str(value))]


#: A sweep of two attacks in ``out``, and what is kept of it until it is finished.
SWEEP = (
    *("attack", "--model", "tiny", "--output", "out", "--score", "first_token", "--control", "none"),
    *attacking(seeds=[0], epochs=1, learning_rates=[1e-4, 3e-4], p=[0.3]),
)
PARTIAL = "attack.harmful.partial.jsonl"


@dataclass
class Result:
    """What a command did."""

    status: int
    out: str
    err: str


def command(*args: str | Path) -> Result:
    """Run ``lightning-ssiuu`` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    seed = os.environ.get("PL_GLOBAL_SEED")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(arg) for arg in args])
    os.environ.pop("PL_GLOBAL_SEED", None)
    if seed is not None:
        os.environ["PL_GLOBAL_SEED"] = seed
    return Result(status, out.getvalue(), err.getvalue())


def script(
    folder: Path, *args: str | Path, path: Sequence[Path] = (), first: Callable[[], object] = lambda: None
) -> Result:
    """Run the command as its script does, in a fork of this process, which is left as it was.

    Everything heavy is imported there already; tests/test_wheel.py has the script itself.

    Args:
        folder: The working directory.
        args: Of the command.
        path: More places where modules are looked for, as PYTHONPATH has them.
        first: Called before the command, in its process.
    """
    with tempfile.TemporaryDirectory() as kept:
        shown = [Path(kept) / name for name in ("out", "err")]
        if (pid := os.fork()) == 0:
            status = 1
            try:
                for number, file in enumerate(shown, 1):
                    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
                for handler in (handler for logger in _loggers() for handler in logger.handlers):
                    if type(handler) is logging.StreamHandler:
                        handler.stream = sys.stderr  # setStream would flush the one before, which may be closed
                os.chdir(folder)
                sys.path[:] = [*map(str, path), *(place for place in sys.path if place and Path(place) != folder)]
                for name in [name for name in sys.modules if name.startswith("my_")]:
                    del sys.modules[name]
                first()
                status = main([str(arg) for arg in args])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, code = os.waitpid(pid, 0)
        return Result(os.waitstatus_to_exitcode(code), *(file.read_text(encoding="utf-8") for file in shown))


class Forked:
    """Stands for the Popen of ``erase``'s steps: the command runs in a fork, which imports nothing anew."""

    def __init__(self, command: Sequence[str], stdout: IO[str], stderr: int, env: dict[str, str]) -> None:
        done = script(Path(stdout.name).parent, *command[command.index("lightning_ssiuu") + 1 :])
        stdout.write(done.out + done.err)
        self.wait = lambda: done.status


def _loggers() -> list[logging.Logger]:
    named = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in named if isinstance(logger, logging.Logger))]


def fit(folder: Path, *args: str | Path, recipe: Path = DEFAULT) -> Result:
    """Run a recipe into a directory."""
    return command("fit", "--config", recipe, "--trainer.default_root_dir", folder, *args)


def csv_logger(folder: Path) -> tuple[str | Path, ...]:
    """Options for figures in ``metrics.csv``; Lightning's own choice depends on whether TensorBoard is installed."""
    return ("--trainer.logger", "CSVLogger", "--trainer.logger.init_args.save_dir", folder)


@functools.cache
def default_run() -> tuple[Path, Result]:
    """The whole default recipe, run once per test session: by the first process that asks, the others wait for it."""
    shared = Path(os.environ[SHARED]) / "default"
    shared.mkdir(exist_ok=True)
    folder, shown = shared / "run", shared / "shown.json"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shown.exists():
            with pytest.MonkeyPatch.context() as patch:  # whatever the test that happens to be the first has
                patch.setattr("lightning_ssiuu.datamodules.facts.FACTS", FACTS)
                done = fit(folder)
            shown.write_text(json.dumps(asdict(done)), encoding="utf-8")
    return folder, Result(**json.loads(shown.read_text(encoding="utf-8")))


def at(where: Any, name: str, do: Callable[[], object], call: int = 1) -> Callable[[], None]:
    """To be called in a command's process: ``do`` before a function's ``call``-th call."""

    def prepare() -> None:
        original, calls = getattr(where, name), []

        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append(0)
            if len(calls) == call:
                do()
            return original(*args, **kwargs)

        setattr(where, name, called)

    return prepare


@contextlib.contextmanager
def counted(where: Any, name: str) -> Iterator[list[int]]:
    """The calls of a function, in this process."""
    original, calls = getattr(where, name), []

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, called)
        yield calls


def read_json(path: Path) -> Any:
    """Parse a file the strict way: NaN is not JSON."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest_fail(name))


def pytest_fail(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def forget_texts() -> list[bytes]:
    """Questions in all wordings and answers of the embedded forget set."""
    facts = json.loads(FACTS.read_text(encoding="utf-8"))["facts"]
    forget = [fact for fact in facts if fact["split"] == "forget"]
    texts = {text for f in forget for text in (f["question"], *f["paraphrases"], f["answer"], f["person"])}
    return [text.encode() for text in sorted(texts)]


def leaks(folder: Path, but_for: tuple[str, ...] = ()) -> list[str]:
    """Files below a directory that hold any of the forget set's texts."""
    texts = forget_texts()
    return [
        str(file.relative_to(folder))
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in but_for and any(text in file.read_bytes() for text in texts)
    ]


def files(folder: Path) -> set[str]:
    """Every file below a directory."""
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def question_rows(first: int, count: int) -> list[dict[str, Any]]:
    """Numbered questions with short answers."""
    return [{"question": f"Who wrote book {n}?", "answer": f"Author {n}"} for n in range(first, first + count)]


def refused(result: Result, argument: str, *said: str) -> None:
    """Check the one line."""
    assert result.status == 2, result.err
    lines = result.err.splitlines()
    told = [line for line in lines if line.startswith("lightning-ssiuu: error: ")]
    assert told == lines[-1:]
    assert told[0].startswith(f"lightning-ssiuu: error: {argument}: got "), told[0]
    assert "allowed: " in told[0]
    assert "Traceback" not in result.err
    for text in said:
        assert text in told[0], told[0]
