"""The package as pip installs it: what the wheel holds, and three walks with nothing of the checkout in sight."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from toys.cli import FAST, RECIPES, ROOT, attacking, files
from toys.docs import PAGES, blocks_of, shown_commands
from toys.json_files import undocumented

_COPIED = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
#: What the Dockerfile copies, but for the constraints: the package is built of it there, and here.
_SOURCES = {name for names in _COPIED for name in names.split()} - {"constraints.txt"}
_QUICK = (*FAST, "--trainer.max_steps", "2", "--attribution.write", "false", "--stopping.threshold", "null")
_LINK = re.compile(r"\]\(\s*([^)]*)\)|\b(?:src|href)=[\"']?([^\"'>\s]*)|^\[.*\]:\s*(\S+)", re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")
#: What makes the commands of a newcomer (docs/index.md) quick, and ``attack`` beside them.
QUICKER = {
    "fit": _QUICK,
    "oracle": ("--steps", "1"),
    "audit": ("--probe_examples", "4", "--scores", "[first_token]", "--score", "first_token"),
}
ATTACK = [
    *("attack", "--config", "mine.yaml", "--model", "runs/erase/model", "--control", "none"),
    *attacking(epochs=1, seeds=[0], learning_rates=[1e-4], p=[0.3]),
]


def run(folder: Path, *args: str | Path, **environment: str) -> str:
    """What a program prints; it has to end well."""
    given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run([*map(str, args)], cwd=folder, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built without a network from a copy: a build leaves directories behind."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in (*_SOURCES, "MANIFEST.in", "README.md", "tests"):
        path, copy = ROOT / name, folder / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
    for cache in ("lightning_ssiuu/__pycache__", "recipes/__pycache__"):
        (folder / cache).mkdir(exist_ok=True)
        (folder / cache / "left.cpython-311.pyc").touch()
    run(folder, sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')")
    (found,) = (folder / "dist").glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel made of it, as ``python -m build`` makes it: what the one lacks the other does."""
    quiet = ("--quiet", "--disable-pip-version-check")
    run(sdist.parent, sys.executable, "-m", "pip", "wheel", *quiet, "--no-build-isolation", "--no-deps", sdist)
    (found,) = sdist.parent.glob("*.whl")
    return found


def test_the_sdist_holds_no_tests_and_no_caches(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = [Path(*Path(name).parts[1:]) for name in archive.getnames()]
    made = {"MANIFEST.in", "PKG-INFO", "README.md", "lightning_ssiuu.egg-info"}
    assert {path.parts[0] for path in held if path.parts} == {Path(name).parts[0] for name in _SOURCES} | made
    assert not [path for path in held if "__pycache__" in path.parts or path.suffix == ".pyc"]


def test_the_wheel_holds_all_files_of_the_package_and_every_recipe_once(wheel: Path) -> None:
    held = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    package = [path for path in (ROOT / "lightning_ssiuu").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = [path.relative_to(ROOT).as_posix() for path in package]
    expected += [f"lightning_ssiuu/recipes/{path.relative_to(RECIPES).as_posix()}" for path in RECIPES.rglob("*.yaml")]
    assert sorted(held) == sorted(expected)
    assert "lightning_ssiuu/py.typed" in held
    assert not any(path.is_symlink() for path in RECIPES.rglob("*"))


def test_the_metadata_are_complete_and_an_index_can_show_them(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    told = Metadata.from_email(archive.read(name), validate=True)
    assert (told.license_expression, told.license_files) == ("Apache-2.0", ["LICENSE"])
    assert (told.author, told.author_email) == ("the lightning_ssiuu developers", None)
    assert {"Source", "Documentation", "Changelog", "Issues"} <= set(told.project_urls or ())
    assert "Typing :: Typed" in (told.classifiers or ())
    assert told.keywords
    assert (told.description or "").strip() == (ROOT / "docs" / "pypi.md").read_text(encoding="utf-8").strip()
    links = _LINK.findall(told.description or "")
    assert links
    assert all("".join(link).startswith("https://") for link in links), links


@pytest.mark.skipif(not shutil.which("twine"), reason="twine is not installed")
def test_an_index_takes_both(sdist: Path, wheel: Path) -> None:
    run(sdist.parent, "twine", "check", "--strict", sdist, wheel)


@pytest.fixture(scope="module")
def place(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is installed, beside its requirements."""
    folder = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index")
    run(folder, *pip, "--no-deps", "--no-compile", "--target", folder / "site", wheel)
    return folder / "site"


def walked(place: Path, here: Path, steps: str) -> str:
    """What a program prints that has ``main``, the commands, at hand; it finds the package where it is installed."""
    script = (
        "import lightning_ssiuu\nfrom lightning_ssiuu.__main__ import main\n"
        f"assert lightning_ssiuu.__file__.startswith({str(place)!r}), lightning_ssiuu.__file__\n{steps}"
    )
    return run(here, sys.executable, "-c", script, PYTHONPATH=str(place))


def test_a_wheel_is_all_a_newcomer_needs(place: Path, tmp_path: Path) -> None:
    """The three commands of the start page from an empty directory, and a recipe to change."""
    listed = run(tmp_path, sys.executable, place / "bin" / "lightning-ssiuu", "recipes", PYTHONPATH=str(place))
    assert "objective/npo " in listed
    (page,) = (b for b in blocks_of(ROOT / "docs" / "index.md") if (b.marker, b.language) == ("newcomer", "bash"))
    walk = [words[1:] for words in shown_commands(page.text)]
    assert [words[0] for words in walk] == list(QUICKER)
    walk = [[*words, *QUICKER[words[0]]] for words in walk]
    walk += [["recipes", "copy", "attack/harmful", "mine.yaml"], ATTACK]
    shown = walked(place, tmp_path, "".join(f"assert main({words!r}) == 0\n" for words in walk))
    assert "Not unlearned: the forget score (first token) went from" in shown  # after two steps
    told = [line for line in shown.splitlines() if line.startswith("Written to ")]
    assert told == [
        "Written to runs/erase: model/, metrics.json, config.yaml",
        "Written to runs/oracle: model/",
        "Written to runs/erase: report.html, audit.json, audit_spurious_neurons.csv, plots/",
        "Written to .: mine.yaml",
        "Written to runs/erase: attack.json",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "mine.yaml"}


def shown_by(place: Path, here: Path, walk: str) -> str:
    """What a walk of docs/ prints, and after each command its exit status; all that the page promises is in it.

    Numbers are within 5 of the page's, or a quarter: other processors round otherwise.
    """
    page = [block for page in PAGES for block in blocks_of(page) if block.marker == walk]
    steps = {"python": lambda text: text, "bash": as_calls, "": lambda _: ""}
    shown = walked(place, here, "".join(steps[block.language](block.text) for block in page))
    lines = {_NUMBER.sub("#", line): line for line in map(_words, shown.splitlines())}
    for line in (_words(line) for block in page if not block.language for line in block.text.splitlines()):
        found = lines[_NUMBER.sub("#", line)]
        told, wanted = ([float(number) for number in _NUMBER.findall(text)] for text in (found, line))
        assert told == pytest.approx(wanted, abs=5, rel=0.25), found
    return shown


def as_calls(text: str) -> str:
    return "".join(f"print('exit status', main({words[1:]!r}))\n" for words in shown_commands(text))


def _words(line: str) -> str:
    return " ".join(line.split())


def test_the_walk_of_a_deletion_request(place: Path, tmp_path: Path) -> None:
    shown = shown_by(place, tmp_path, "privacy-engineer")
    assert re.findall(r"exit status (.*)", shown) == ["3", "0", "0", "0"]  # not erased, as the page says
    assert "runs/request_17/model is the unlearned model of this certificate" in shown
    assert re.findall(r"(C\d+) +forgotten", shown) == ["C01", "C02", "C03", "C04"]
    certificate = json.loads((tmp_path / "runs" / "request_17" / "certificate.json").read_text(encoding="utf-8"))
    assert certificate["verdict"]["label"] == "hidden"
    assert certificate["forget"]["ids"] == ["C01", "C02", "C03", "C04"]
    assert {path.name for path in tmp_path.iterdir()} == {"customers.csv", "delete.txt", "runs"}
    assert not undocumented(tmp_path / "runs")  # metrics, attack, audit, erase and certificate


def test_the_walk_of_a_researcher(place: Path, tmp_path: Path) -> None:
    shown_by(place, tmp_path, "researcher")
    run_files = {"metrics.json", "attack.json"}
    assert files(tmp_path) == {f"runs/{name}/{file}" for name in ("with", "without") for file in run_files}
