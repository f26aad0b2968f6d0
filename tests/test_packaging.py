"""The package's metadata agrees with what is in it, and CI runs the README's own command."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from toys.cli import ROOT

import lightning_ssiuu

CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
#: Import name of what is installed under another name.
NAMES = {"yaml": "pyyaml"}


def requirements(text: str) -> dict[str, Requirement]:
    found = [Requirement(line) for line in text.split("\n") if line.strip()]
    return {canonicalize_name(one.name): one for one in found}


CORE = requirements(CONFIG["options"]["install_requires"])
EXTRAS = {name: requirements(text) for name, text in CONFIG["options.extras_require"].items()}

#: Extras that the suite never has at hand.
UNTRIED = ("lm-eval", "vllm", "wandb", "mlflow")


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return requirements("\n".join(line for line in lines if not line.startswith("#")))


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    pinned = pins()
    wanted = {
        **CORE,
        **{n: r for extra, group in EXTRAS.items() if extra not in UNTRIED for n, r in group.items()},
    }
    for name, requirement in wanted.items():
        (specifier,) = pinned[name].specifier
        assert specifier.operator == "=="
        assert specifier.version in requirement.specifier, name
        assert "+" not in specifier.version, name  # a local build such as +cpu exists on few indexes


def test_extras_are_those_promised() -> None:
    loggers = ("tensorboard", "wandb", "mlflow")
    assert set(EXTRAS) == {"test", "docs", "lora", "quantization", "gguf", "lm-eval", "vllm", "search", *loggers}


def test_every_import_is_required() -> None:
    optional = {name for group in EXTRAS.values() for name in group}
    for file in (ROOT / "lightning_ssiuu").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for module in modules:
                name = module.partition(".")[0]
                known = name in sys.stdlib_module_names or name == "lightning_ssiuu"
                assert known or canonicalize_name(NAMES.get(name, name)) in CORE.keys() | optional, (file.name, module)


def test_type_checkers_see_what_is_imported_on_first_use() -> None:
    """And no other; whether the types are known, ``mypy`` says of tests/typed_user.py."""
    tree = ast.parse((ROOT / "lightning_ssiuu" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: f"{node.module}:{alias.name}" for node in imports for alias in node.names}
    assert seen == {name: f"lightning_ssiuu.{module}:{name}" for name, module in lightning_ssiuu._EXPORTS.items()}


def test_every_package_is_listed() -> None:
    folders = [file.parent for file in (ROOT / "lightning_ssiuu").rglob("__init__.py")]
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(CONFIG["options"]["packages"].split()) == found | {"lightning_ssiuu.recipes"}


def test_version_and_entry_point() -> None:
    try:
        distribution = metadata.distribution("lightning-ssiuu")
    except metadata.PackageNotFoundError:
        pytest.skip("not installed")
    assert distribution.version == lightning_ssiuu.__version__
    points = {point.name: point.value for point in distribution.entry_points if point.group == "console_scripts"}
    assert points == {"lightning-ssiuu": "lightning_ssiuu.__main__:main"}


def test_license_is_the_whole_text() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text


def test_changelog_names_the_version() -> None:
    assert f"## [{lightning_ssiuu.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_ci_runs_the_readme_command() -> None:
    """The script's own extraction, on the real README."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    extraction = re.search(r"^command=\$\((awk .*)\)$", script, re.MULTILINE)
    assert extraction
    done = subprocess.run(["bash", "-c", extraction[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    venv, install = "python3 -m venv .venv && . .venv/bin/activate", 'pip install -c constraints.txt -e ".[test]"'
    assert done.stdout.strip() == f"{venv} && {install} && python -m pytest -n 2 --dist loadfile"
