"""What the package imports and what setup.cfg declares are the same; what a feature needs alone is an extra."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from toys.cli import ROOT, SHORT, command, script

from lightning_ssiuu.evaluation.lm_eval import check_harness
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.models.vllm_engine import check_installed
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.extras import EXTRAS

CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
#: Import names of what is installed under another name.
NAMES = {"PyYAML": "yaml"}
#: What other libraries import on our behalf, the file that makes them, and how it does.
FOR_OTHERS = {
    "accelerate": ("lightning_ssiuu/models/loading.py", "device_map"),  # transformers
    "gguf": ("lightning_ssiuu/models/loading.py", "gguf_file"),  # transformers
    "mlflow": ("recipes/logger/mlflow.yaml", "MLFlowLogger"),  # Lightning, as the next two
    "tensorboard": ("recipes/logger/tensorboard.yaml", "TensorBoardLogger"),
    "wandb": ("recipes/logger/wandb.yaml", "WandbLogger"),
}


def declared(text: str) -> set[str]:
    """Import names of the requirements in a section of setup.cfg."""
    names = [Requirement(line).name for line in text.split("\n") if line.strip()]
    return {NAMES.get(name, canonicalize_name(name).replace("-", "_")) for name in names}


CORE = declared(CONFIG["options"]["install_requires"])
#: Without those for working on the package itself.
OF_EXTRAS = {
    extra: declared(text) for extra, text in CONFIG["options.extras_require"].items() if extra not in ("test", "docs")
}


def imported(whole: bool) -> set[str]:
    """Top names of the modules that the package imports; all (``whole``), or those that importing a file imports."""
    found = set()
    for file in (ROOT / "lightning_ssiuu").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree) if whole else tree.body:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"lightning_ssiuu"}


def test_what_is_declared_is_what_is_imported() -> None:
    wanted = CORE.union(*OF_EXTRAS.values())
    assert imported(whole=True) == wanted - FOR_OTHERS.keys()
    for file, how in FOR_OTHERS.values():
        assert how in (ROOT / file).read_text(encoding="utf-8")


def test_files_import_no_extra_before_it_is_used() -> None:
    assert imported(whole=False) <= CORE


def test_each_package_of_an_extra_is_asked_for() -> None:
    assert {package: extra for extra, packages in OF_EXTRAS.items() for package in packages} == EXTRAS


def hide_extras(patch: pytest.MonkeyPatch) -> None:
    """Let every package of an extra be as one that is not installed."""
    find = PathFinder.find_spec

    def found(name: str, path: Any = None, target: Any = None) -> Any:
        return None if name in EXTRAS else find(name, path, target)

    patch.setattr(PathFinder, "find_spec", found)
    for name in [name for name in sys.modules if name.partition(".")[0] in EXTRAS]:
        patch.delitem(sys.modules, name)


def test_each_extra_is_in_the_table() -> None:
    page = (ROOT / "docs" / "how-to" / "installing.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| (`\[[^|]*) \|", page, re.MULTILINE)
    assert set(re.findall(r"`\[([\w-]+)\]`", " ".join(told))) == set(CONFIG["options.extras_require"])


def test_bounds_of_the_table_are_those_of_setup_cfg() -> None:
    page = (ROOT / "docs" / "how-to" / "installing.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| ((?:[\w-]+ \d[\d.]*(?:, )?)+) \|", page, re.MULTILINE)
    told = {f"{name}>={bound}" for line in lines for name, bound in re.findall(r"([\w-]+) (\d[\d.]*)", line)}
    options = "\n".join([CONFIG["options"]["install_requires"], *CONFIG["options.extras_require"].values()])
    assert told
    assert told <= set(options.replace("[signatures]", "").split())


@pytest.fixture
def without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_extras(monkeypatch)


def _gguf(folder: Path) -> object:
    (folder / "model.gguf").write_bytes(b"GGUF")
    return load_model(folder / "model.gguf")


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("bitsandbytes", lambda folder: load_model("tiny", quantization="8bit")),
        ("gguf", _gguf),
        ("lm_eval", lambda folder: check_harness("tasks", ["mmlu"])),
        ("peft", lambda folder: LoRA().attach(load_model("tiny"))),
        ("vllm", lambda folder: check_installed()),
    ],
)
@pytest.mark.usefixtures("without_extras")
def test_what_is_missing_names_its_extra(package: str, use: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        use(tmp_path)
    text = str(refused.value)
    assert text.endswith(f'without {package}: pip install "lightning-ssiuu[{EXTRAS[package]}]"')
    assert "\n" not in text


@pytest.mark.usefixtures("without_extras")
def test_a_recipe_for_eight_bits_without_bitsandbytes(tmp_path: Path) -> None:
    done = command("fit", "--config", "ssiuu", "--config", "scale/8bit-lora", "--trainer.default_root_dir", tmp_path)
    assert done.status == 2
    assert done.err.endswith('no module bitsandbytes: pip install "lightning-ssiuu[quantization]")\n')
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_default_job_needs_no_extra(tmp_path: Path) -> None:
    """Unlearn, then load what was written, which is checked on the meta device first."""
    patch = pytest.MonkeyPatch()  # of a forked process
    for job in (
        ("fit", "--config", "ssiuu", "--trainer.logger", "false", *SHORT),  # Lightning's own may need one
        ("privacy", "--model", "runs/ssiuu/model", "--gradient_norm", "false"),
    ):
        done = script(tmp_path, *job, first=lambda: hide_extras(patch))
        assert done.status == 0, done.err
