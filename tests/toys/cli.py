"""Run commands in this process and keep what they print; one default run serves every test that needs one."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    *("--data.init_args.eval_batch_size", "64"),
)
SHORT = (*FAST, "--trainer.max_steps", "2", "--stopping.threshold", "null", "--attribution.every_n_steps", "null")


def attacking(**options: Any) -> list[str]:
    """Options of an attack as the command line has them."""
    return [word for name, value in options.items() for word in (f"--attack.{name}", str(value))]


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


def script(folder: Path, *args: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the console script as it is installed, in a directory (``folder/bin``) that is not the working directory."""
    installed = folder / "bin" / "lightning-ssiuu"
    installed.parent.mkdir(exist_ok=True)
    text = "import sys\nfrom lightning_ssiuu.__main__ import main\nsys.exit(main())\n"
    installed.write_text(text, encoding="utf-8")
    options: Any = {"env": os.environ | {"PYTHONPATH": str(ROOT)} | environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, str(installed), *args], cwd=cwd or folder, check=False, **options)


def fit(folder: Path, *args: str | Path, recipe: Path = DEFAULT) -> Result:
    """Run a recipe into a directory."""
    return command("fit", "--config", recipe, "--trainer.default_root_dir", folder, *args)


@functools.cache
def default_run() -> tuple[Path, Result]:
    """The whole default recipe, run once per test session: by the first process that asks, the others wait for it."""
    shared = Path(os.environ[SHARED]) / "default"
    shared.mkdir(exist_ok=True)
    folder, shown = shared / "run", shared / "shown.json"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shown.exists():
            shown.write_text(json.dumps(asdict(fit(folder))), encoding="utf-8")
    return folder, Result(**json.loads(shown.read_text(encoding="utf-8")))


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
