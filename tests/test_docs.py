"""What the documents say is run; what the package offers is documented."""

from __future__ import annotations

import doctest
import functools
import importlib
import inspect
import pkgutil
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from toys.cli import DRAWN, RECIPES, ROOT, command
from toys.docs import PAGES, ROOT_PAGES, WALKS, blocks_of, shown_commands

import lightning_ssiuu
from lightning_ssiuu.cli.fit import UnlearningCLI
from lightning_ssiuu.models.loading import TINY

PUBLIC = [name for name in lightning_ssiuu.__all__ if not name.startswith("__")]
#: Options that make a shown command quick; they change how much is done, not how it is asked for.
QUICKER = {
    "fit": DRAWN,
    "attack": (
        *("--attack.epochs", "1", "--attack.seeds", "[0]"),
        *("--attack.learning_rates", "[1e-4]", "--attack.p", "[0.3]"),
    ),
    "audit": ("--probe_examples", "4", "--scores", "[first_token]"),
}


def blocks(language: str, marked: str | None = None) -> list[Any]:
    """(marker, text) of the fenced blocks in one language (all, or those with a mark), named by page and line."""
    return [
        pytest.param(block.marker, block.text, id=f"{block.page}:{block.line}")
        for page in PAGES
        for block in blocks_of(page)
        if block.language == language and marked in (None, block.marker)
    ]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One directory for all commands of all pages, as a reader would have."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(RECIPES, folder / "recipes")
    written = [block.values[1] for block in blocks("python")]
    shown = "".join(block.values[1] for block in blocks("bash"))
    for module, name in sorted(set(re.findall(r"\b(my_\w+)\.(\w+)", shown))):
        (text,) = [text for text in written if re.search(rf"^(class|def) {name}\b|^{name} =", text, re.MULTILINE)]
        with (folder / f"{module}.py").open("a", encoding="utf-8") as file:
            file.write(text)
    yield folder
    for module in [name for name in sys.modules if name.startswith("my_")]:  # others may write files of these names
        del sys.modules[module]


@pytest.mark.parametrize(("marker", "text"), blocks("python"))
def test_python_blocks_run(
    marker: str | None, text: str, tmp_path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if marker == "not-run" or marker in WALKS:
        pytest.skip("marked as not to be run here")
    from lightning_ssiuu.evaluation.scores import SCORES

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(workplace)  # where the files lie that a page says to write
    known = dict(SCORES)
    try:
        exec(compile(text, "<docs>", "exec", dont_inherit=True), {"__name__": "__docs__"})
    finally:
        SCORES.clear()
        SCORES.update(known)


@pytest.mark.parametrize(("marker", "text"), blocks("bash", marked="run"))
def test_bash_blocks_marked_run(
    marker: str | None, text: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    for words in shown_commands(text):
        if words == ["lightning-ssiuu", "oracle"]:
            # Trains for minutes; the command has a test of its own. Here its place is what matters.
            shutil.copytree(TINY, Path("runs") / "oracle" / "model")
            continue
        assert words[0] == "lightning-ssiuu", words
        result = command(*words[1:], *QUICKER.get(words[1], ()))
        assert result.status == 0, result.err


@pytest.mark.parametrize(("marker", "text"), blocks("bash"))
def test_options_of_shown_commands_exist(
    marker: str | None, text: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not a block is run, every command in it is parsed, with its recipes."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(UnlearningCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(UnlearningCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.syspath_prepend(workplace)
    well = SimpleNamespace(erased=True, works=True)  # what a command returns from which its exit status is made
    named = ("evaluate", "leaderboard", "meta_evaluate", "oracle", "privacy", "publish", "recipes", "utility", "verify")
    named += ("completion", "doctor")
    for name in ("attack", "audit", "certify", "compare", "erase", *named):
        function = getattr(importlib.import_module(f"lightning_ssiuu.cli.{name}"), name)
        monkeypatch.setattr(f"lightning_ssiuu.cli.{name}.{name}", functools.wraps(function)(lambda *_, **__: well))
    for words in shown_commands(text):
        if words[0] == "lightning-ssiuu":
            result = command(*words[1:])
            assert result.status == 0, result.err


@pytest.mark.parametrize(("marker", "text"), blocks("bash"))
def test_recipes_named_in_commands_exist(marker: str | None, text: str) -> None:
    for name in re.findall(r"recipes/[\w/.-]+\.yaml", text):
        assert (ROOT / name).is_file(), name


def test_marks_are_known() -> None:
    """A misspelt one would leave out a block in silence; what each means is in docs/contributing/index.md."""
    used = {block.marker for page in PAGES for block in blocks_of(page)} - {None}
    assert used <= {"run", "not-run", "main-job", "test-command", *WALKS}


@pytest.mark.parametrize("page", ROOT_PAGES, ids=lambda page: page.name)
def test_links_of_pages_outside_the_site(page: Path) -> None:
    """Those of docs/ are looked at where the site is built (tests/test_site.py)."""
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
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
def test_public_functions_and_classes_have_a_docstring(module: ModuleType) -> None:
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    things = {name: value for name, value in own.items() if inspect.isclass(value) or inspect.isfunction(value)}
    assert not [name for name, value in things.items() if not (name.startswith("_") or value.__doc__)]
    assert module.__doc__ or module.__name__ == "lightning_ssiuu.__main__"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_classes_say_what_their_options_and_methods_are(name: str) -> None:
    """Constructor arguments stand in an Args block; methods are described, but for hooks of Lightning and torch."""
    kind = getattr(lightning_ssiuu, name)
    if not inspect.isclass(kind):
        return
    family = inspect.getmro(kind)
    ours = [base for base in family if base.__module__.startswith("lightning_ssiuu")]
    theirs = {method for base in family if base not in ours for method in vars(base)}
    text = "\n".join(inspect.getdoc(base) or "" for base in ours)
    for option, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            assert re.search(rf"^\s+{option}: ", text, re.MULTILINE), option
    for method, value in vars(kind).items():
        function = getattr(value, "__func__", value)
        if inspect.isfunction(function) and not method.startswith("_") and method not in theirs:
            assert any(inspect.getdoc(vars(base).get(method)) for base in ours if method in vars(base)), method


def test_no_file_names_a_machine() -> None:
    machine = re.compile(rb"(^|[^\w.])/(work|home|root|mnt|Users)/\w|/tmp/\w/")  # absolute paths of whoever built this
    suspicious = []
    for file in ROOT.rglob("*"):
        inside = file.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in inside)
        built = any(part in ("runs", "build", "dist", "site", "__pycache__", "lightning_logs") for part in inside)
        if hidden or built or any(part.endswith(".egg-info") for part in inside) or not file.is_file():
            continue
        if file.suffix not in (".safetensors", ".png") and machine.search(file.read_bytes()):
            suspicious.append("/".join(inside))
    assert not suspicious
