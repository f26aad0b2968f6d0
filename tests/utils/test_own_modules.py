"""Modules and classes of a user's own that are broken: one line that names the argument and the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from toys.cli import Result, command, fit, refused

import lightning_ssiuu

INIT, REGULARIZER = "--model.init_args", "--model.init_args.regularizer.init_args"


MODULES = {
    "my_broken": "import torchmetricz",
    "my_syntax": "x = = 1",
    "my_raising": "raise RuntimeError('first line\\nsecond line' + 1000 * '.')",
    "my_things": """
from lightning_ssiuu import Attack, GradientAscent, L2ToStart

class TwoForms(Attack):
    name = "two_forms"

    def __init__(self, size: int = 1, forms: bool = False) -> None:
        if size < 0:
            raise ValueError("size must be positive")

    def run(self, *args: object) -> None: ...

class Bounded(GradientAscent):
    def __init__(self, bound: float = 1.0, **options: object) -> None:
        super().__init__(**options)
        if bound < 0:
            raise ValueError("bound must be positive")

class Strict(L2ToStart):
    def __init__(self, weight: float = 1.0) -> None:
        raise ValueError("never satisfied")
""",
}
BROKEN = {
    "my_broken": "(my_broken cannot be imported: ModuleNotFoundError: No module named 'torchmetricz')",
    "my_syntax": "(my_syntax cannot be imported: SyntaxError: invalid syntax (my_syntax.py, line 1))",
    "my_raising": "(my_raising cannot be imported: RuntimeError: first line second line....",
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's modules, and the directory of a run that is never written."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "run"


def _attack(run: Path, *options: str) -> Result:
    return command("attack", "--model", "tiny", "--output", run, *options)


@pytest.mark.parametrize("module", BROKEN)
def test_modules_that_cannot_be_imported(module: str, modules: Path) -> None:
    name, said = f"{module}.X", (f"{module}.X'", BROKEN[module])
    for option, argument in {
        "--model": "model",
        "--data": "data",
        f"{INIT}.regularizer": "model.init_args.regularizer",
        f"{INIT}.optimizer": "model.",
        "--attribution.method": "attribution.method",
        "--stopping.score": "stopping.score",
    }.items():
        result = fit(modules, option, name)
        if argument == "model.":  # what jsonargparse says of its key depends on what was raised
            argument = "model.init_args.optimizer.class_path" if module == "my_broken" else "model.optimizer"
        refused(result, argument, *said)
        assert len(result.err.splitlines()[-1]) < 800
    for option in ("attack", "score"):
        refused(_attack(modules, f"--{option}", name), option, *said)
    audit = ("audit", "--original", "tiny", "--unlearned", "tiny", "--output", modules)
    refused(command(*audit, "--method", name), "method", *said)
    assert not modules.exists()


def test_classes_that_are_abstract(modules: Path) -> None:
    refused(
        _attack(modules, "--attack", "Relearning"), "attack", "'Relearning'", "Harmful, ", "(Relearning is abstract)"
    )
    regularizer = fit(modules, f"{INIT}.regularizer", "Regularizer")
    refused(regularizer, "model.init_args.regularizer", "L2ToStart", "(Regularizer is abstract)")


def test_constructors_that_raise(modules: Path) -> None:
    attack = _attack(modules, "--attack", "my_things.TwoForms", "--attack.size", "-1")
    refused(attack, "attack", "got 'my_things.TwoForms'", "(size must be positive)")
    model = fit(modules, "--model", "my_things.Bounded", "--model.bound", "-1")
    refused(model, "model", "got 'my_things.Bounded'", "(bound must be positive)")
    inside = fit(modules, f"{INIT}.regularizer", "my_things.Strict")
    refused(inside, "model", "got 'my_things.Strict'", "(never satisfied)")
    assert not modules.exists()


def test_options_of_ones_own_class(modules: Path) -> None:
    attack = _attack(modules, "--attack", "my_things.TwoForms", "--attack.nope", "1")
    refused(attack, "attack.init_args.nope")
    assert attack.err.endswith("allowed: size, forms\n")
    model = fit(modules, "--model", "my_things.Bounded", "--model.nope", "1")
    refused(model, "model.init_args.nope", "allowed: bound, ", "checkpoint")  # its own, and those it hands on


def test_only_public_classes_are_listed(modules: Path) -> None:
    line = fit(modules, "--model", "Nope").err.splitlines()[-1]
    listed = line.partition("allowed: ")[2].partition(", or the import path")[0].split(", ")
    assert "SSIUU" in listed
    assert set(listed) <= set(lightning_ssiuu.__all__)
