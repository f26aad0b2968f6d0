"""What the documents say is run; what the package offers is documented."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import shlex
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from toys.cli import RECIPES, ROOT, SHORT, command

import lightning_ssiuu
from lightning_ssiuu.models.loading import TINY

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PUBLIC = [name for name in lightning_ssiuu.__all__ if not name.startswith("__")]
_BLOCK = re.compile(r"(?:^<!-- ([\w-]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Options that make a shown command quick; they change how much is done, not how it is asked for.
QUICKER = {
    "fit": SHORT,
    "attack": ("--epochs", "1", "--seeds", "[0]", "--learning_rates", "[1e-4]", "--p", "[0.3]"),
    "audit": ("--probe_examples", "4", "--scores", "[first_token]"),
}


def blocks(language: str) -> list[Any]:
    """(marker, text) of the fenced blocks in one language, named by page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            if match[2] == language:
                line = text.count("\n", 0, match.start(3))
                found.append(pytest.param(match[1], match[3], id=f"{page.name}:{line}"))
    return found


def shown_commands(text: str) -> list[list[str]]:
    """Command lines of a bash block, continued lines joined, comments dropped."""
    joined = text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize(("marker", "text"), blocks("python"))
def test_python_blocks_run(marker: str | None, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if marker == "not-run":
        pytest.skip("marked as not to be run here")
    from lightning_ssiuu.evaluation.scores import SCORES

    monkeypatch.chdir(tmp_path)
    known = dict(SCORES)
    try:
        exec(compile(text, "<docs>", "exec"), {"__name__": "__docs__"})
    finally:
        SCORES.clear()
        SCORES.update(known)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all commands of all pages, as a reader would have."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(RECIPES, folder / "recipes")
    return folder


@pytest.mark.parametrize(("marker", "text"), blocks("bash"))
def test_bash_blocks_marked_run(
    marker: str | None, text: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if marker != "run":
        pytest.skip("not marked as to be run")
    monkeypatch.chdir(workplace)
    for words in shown_commands(text):
        if words[:3] == ["python", "-m", "lightning_ssiuu.datamodules.embedded.build"]:
            # Trains for minutes; the tests of the embedded data have the script. Here its place is what matters.
            shutil.copytree(TINY, Path(words[words.index("--output") + 1]) / "tiny")
            continue
        assert words[0] == "lightning-ssiuu", words
        result = command(*words[1:], *QUICKER.get(words[1], ()))
        assert result.status == 0, result.err


@pytest.mark.parametrize(("marker", "text"), blocks("bash"))
def test_recipes_named_in_commands_exist(marker: str | None, text: str) -> None:
    for name in re.findall(r"recipes/[\w/.-]+\.yaml", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_import_and_have_an_example(name: str) -> None:
    value = getattr(lightning_ssiuu, name)
    if isinstance(value, dict):  # a table: its records' class shows how to add one
        value = type(next(iter(value.values())))
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")
    assert examples, f"{name} has no example"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = lightning_ssiuu.Nope


def modules() -> list[ModuleType]:
    names = [info.name for info in pkgutil.walk_packages(lightning_ssiuu.__path__, "lightning_ssiuu.")]
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__)
def test_every_public_thing_has_a_docstring(module: ModuleType) -> None:
    missing = []
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not value.__doc__:
            missing.append(name)
        if inspect.isclass(value):
            for inner, method in vars(value).items():
                function = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
                if not inner.startswith("_") and inspect.isfunction(function) and not inspect.getdoc(function):
                    missing.append(f"{name}.{inner}")
    assert not missing


def test_no_file_names_a_machine() -> None:
    machine = re.compile(rb"(^|[^\w.])/(work|home|root|mnt|Users)/\w|/tmp/\w/")  # absolute paths of whoever built this
    suspicious = []
    for file in ROOT.rglob("*"):
        inside = file.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in inside)
        built = any(part in ("runs", "build", "dist", "__pycache__", "lightning_logs") for part in inside)
        if hidden or built or any(part.endswith(".egg-info") for part in inside) or not file.is_file():
            continue
        if file.suffix not in (".safetensors", ".png") and machine.search(file.read_bytes()):
            suspicious.append("/".join(inside))
    assert not suspicious
