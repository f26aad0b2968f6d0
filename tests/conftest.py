"""One thread (the suite shares few cores, and results then do not depend on how many there are), and no network.

And a directory that all workers of a session share. Nothing waits for the disk: no test cuts the power.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.fsync = lambda _: None

#: People of each set in ``few_facts``: the forget set is whole, the retain set one of the recipes' batches.
_FEW = {"forget": 6, "retain": 6, "test": 2}
#: Files of half a minute or more, by their time.
_LONGEST = (
    *("test_distributed", "test_recipes", "test_robustness", "test_wheel", "test_benchmarks"),
    *("test_conformance", "test_memory"),
)
_SHARED: pytest.StashKey[tempfile.TemporaryDirectory[str]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # of pytest-xdist, which deals out the files with the most tests first
    if not hasattr(config, "workerinput"):  # workers inherit it
        config.stash[_SHARED] = folder = tempfile.TemporaryDirectory(prefix="lightning-ssiuu-tests-")
        os.environ["LIGHTNING_SSIUU_TEST_SESSION"] = folder.name


def pytest_unconfigure(config: pytest.Config) -> None:
    if (folder := config.stash.get(_SHARED, None)) is not None:
        folder.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: begun last, one would keep one worker busy while the others have nothing to do."""
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))


def pytest_collection_finish() -> None:
    """The default adversary takes one step; what the libraries hold for ever is no garbage to be looked through.

    (Most runs are not about what an adversary brings back; those that are have one of their own.)
    """
    import torch  # not above: what deals the tests out to workers has no need of it

    from lightning_ssiuu.callbacks import neuron_attribution

    torch.set_num_threads(1)
    neuron_attribution._ADVERSARY.steps = 1
    _read_signatures_once()
    _look_for_plugins_once()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)  # what a step makes holds few cycles, and there is memory for them


def _read_signatures_once() -> None:
    """A command has a process of its own; here many are parsed in one, each from the source of the same classes."""
    from jsonargparse import _signatures

    read = _signatures.get_signature_parameters
    known = cache(lambda component, method: read(component, method))

    def parameters(component: Any, method: str | None = None, logger: Any = True) -> Any:
        if str(getattr(component, "__module__", "")).partition(".")[0] not in ("lightning", "lightning_ssiuu"):
            return read(component, method, logger)
        return [copy.copy(parameter) for parameter in known(component, method)]

    _signatures.get_signature_parameters = parameters


def _look_for_plugins_once() -> None:
    """Every Trainer asks all installed packages for callbacks of theirs, most of the time that making one takes."""
    from lightning.fabric.utilities import registry

    registry.entry_points = cache(registry.entry_points)


@pytest.fixture(scope="session")
def _first_people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lightning_ssiuu.datamodules.embedded import FACTS

    world, known = json.loads(FACTS.read_text(encoding="utf-8")), Counter[tuple[str, str]]()
    for fact in world["facts"]:
        known[fact["split"], fact["person"]] += 1
    first = {person for split, most in _FEW.items() for person in [p for s, p in known if s == split][:most]}
    world["facts"] = [fact for fact in world["facts"] if fact["person"] in first]
    file = tmp_path_factory.mktemp("facts") / "facts.json"
    file.write_text(json.dumps(world), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def few_facts(_first_people: Path) -> Iterator[None]:
    """``Facts`` with few people to retain, for files that ask whether a command works and not how well it forgets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_ssiuu.datamodules.facts.FACTS", _first_people)
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, for tests that are marked ``needs_browser``."""
    from toys.browser import open_browser

    with open_browser() as started:
        yield started
