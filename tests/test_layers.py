"""No folder imports one above it, and no file takes part in a circle."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_ssiuu

ROOT = Path(lightning_ssiuu.__file__).parent
#: From the top down; folders on one line do not know each other.
LAYERS = (
    ("cli",),
    ("reports",),
    ("attacks", "callbacks"),
    ("objectives",),
    ("attribution", "publishing", "regularizers"),
    ("evaluation",),
    ("datamodules",),
    ("training",),
    ("models",),
    ("utils",),
)
HEIGHT = {name: -depth for depth, layer in enumerate(LAYERS) for name in layer}
FILES = {".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file for file in ROOT.rglob("*.py")}


@cache
def imports(name: str) -> set[str]:
    """Modules of this package that a file names in an import, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_ssiuu"):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one in FILES else str(node.module) for one in inner}
    return {one if one in FILES else f"{one}.__init__" for one in found} - {name}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name: str) -> None:
    own = name.split(".")[1]
    if own not in HEIGHT:
        return
    for other in imports(name):
        folder = other.split(".")[1]
        assert folder == own or HEIGHT.get(folder, 1) < HEIGHT[own], f"{name} imports {other}"


def test_no_circles() -> None:
    try:
        TopologicalSorter({name: imports(name) for name in FILES if not name.endswith("__init__")}).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def test_the_root_is_what_it_should_be() -> None:
    there = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    assert there == {*HEIGHT, "__init__.py", "__main__.py", "py.typed"}
