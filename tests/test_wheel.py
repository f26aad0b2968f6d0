"""The package as pip installs it: what the wheel holds, and a walk with nothing of the checkout in sight."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from toys.cli import FAST, RECIPES, ROOT, attacking

_SOURCES = ("lightning_ssiuu", "recipes", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
_QUICK = (*FAST, "--trainer.max_steps", "2", "--attribution.write", "false", "--stopping.threshold", "null")
#: Each is a documented command, and what makes it quick.
WALK = [
    ["fit", "--config", "ssiuu", *_QUICK],
    ["recipes", "copy", "attack/harmful", "mine.yaml"],
    [
        *("attack", "--config", "mine.yaml", "--model", "runs/ssiuu/model", "--control", "none"),
        *attacking(epochs=1, seeds=[0], learning_rates=[1e-4], p=[0.3]),
    ],
]


def run(folder: Path, *args: str | Path, **environment: str) -> str:
    """What a program prints; it has to end well."""
    given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run([*map(str, args)], cwd=folder, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without a network from a copy: a build leaves directories behind."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in _SOURCES:
        path = ROOT / name
        shutil.copytree(path, folder / name, ignore=ignore) if path.is_dir() else shutil.copy(path, folder / name)
    quiet = ("--quiet", "--disable-pip-version-check")
    run(folder, sys.executable, "-m", "pip", "wheel", *quiet, "--no-build-isolation", "--no-deps", "-w", "dist", ".")
    (found,) = (folder / "dist").glob("*.whl")
    return found


def test_the_wheel_holds_all_files_of_the_package_and_every_recipe_once(wheel: Path) -> None:
    held = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    package = [path for path in (ROOT / "lightning_ssiuu").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = [path.relative_to(ROOT).as_posix() for path in package]
    expected += [f"lightning_ssiuu/recipes/{path.relative_to(RECIPES).as_posix()}" for path in RECIPES.rglob("*.yaml")]
    assert sorted(held) == sorted(expected)
    assert not any(path.is_symlink() for path in RECIPES.rglob("*"))


def test_a_wheel_is_all_one_needs(wheel: Path, tmp_path: Path) -> None:
    """Installed beside its requirements, used from an empty directory."""
    place, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index")
    run(tmp_path, *pip, "--no-deps", "--no-compile", "--target", place, wheel)
    listed = run(here, sys.executable, place / "bin" / "lightning-ssiuu", "recipes", PYTHONPATH=str(place))
    assert "objective/npo " in listed
    script = (
        "import sys, lightning_ssiuu\nfrom lightning_ssiuu.__main__ import main\n"
        f"assert lightning_ssiuu.__file__.startswith({str(place)!r}), lightning_ssiuu.__file__\n"
        f"for words in {WALK!r}:\n    if main(words): sys.exit(1)\n"
    )
    shown = run(here, sys.executable, "-c", script, PYTHONPATH=str(place))
    told = [line for line in shown.splitlines() if line.startswith("Written to ")]
    assert told == [
        "Written to runs/ssiuu: model/, metrics.json, config.yaml",
        "Written to .: mine.yaml",
        "Written to runs/ssiuu: attack.json",
    ]
    assert {path.name for path in here.iterdir()} == {"runs", "mine.yaml"}
