"""What ``doctor`` tries: each function does one thing for real and says what came of it, or raises whatever it met."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_ssiuu.utils.version import DISTRIBUTION

if TYPE_CHECKING:
    from lightning_ssiuu.datamodules import UnlearningDataModule

_PATIENCE = 5.0  # seconds for what may hang: a socket, a name server
_BF16 = 0.05  # largest relative difference of a product in bfloat16, whose numbers have 8 bits
_POINTS = 10.0  # by which a score in few bits may differ from the one in 32


class Skipped(Exception):  # noqa: N818 (nothing is wrong)
    """Why something is not tried here."""


def embedded_model() -> str:
    """The main job: load the embedded model on the device that a command would take, and score one question."""
    return f"asked one question, it gives the answer {_probability('float32'):.1f} %"


@cache
def _one_question() -> UnlearningDataModule:
    from lightning_ssiuu.datamodules import Facts

    data = Facts(max_eval_examples=1)
    data.setup("validate")
    return data


@cache
def _probability(dtype: str, quantization: Literal["8bit", "4bit"] | None = None) -> float:
    import torch

    from lightning_ssiuu.evaluation.scorer import evaluate
    from lightning_ssiuu.models.answers import AnswerModel
    from lightning_ssiuu.models.loading import load_model
    from lightning_ssiuu.training.devices import Devices
    from lightning_ssiuu.utils.console import hide_short_bars

    hide_short_bars()
    data, device = _one_question(), Devices().device
    model = load_model("tiny", getattr(torch, dtype), quantization, device)
    asked = AnswerModel(model if quantization else model.to(device))
    return evaluate(asked, data.tokenizer, [data.eval_dataloader("forget")], ["probability"])["forget"]["probability"]


def bfloat16() -> str:
    """A product in bfloat16 beside the one in float32, and the embedded model in bfloat16."""
    import torch

    from lightning_ssiuu.training.devices import Devices

    device = Devices().device
    left, right = (torch.randn(64, 64, generator=torch.Generator().manual_seed(n)).to(device) for n in (0, 1))
    product = left @ right
    off = float((left.bfloat16() @ right.bfloat16() - product).norm() / product.norm())
    if not off < _BF16:
        raise ArithmeticError(f"a product in bfloat16 is {off:.1%} off")
    return _beside("bfloat16", None, f"a product is {off:.1%} off; ")


def eight_bit() -> str:
    """The embedded model with weights in 8 bits, through bitsandbytes."""
    return _beside("float32", "8bit")


def four_bit() -> str:
    """The embedded model with weights in 4 bits, through bitsandbytes."""
    return _beside("float32", "4bit")


def _beside(dtype: str, quantization: Literal["8bit", "4bit"] | None, said: str = "") -> str:
    found, whole = _probability(dtype, quantization), _probability("float32")
    if not abs(found - whole) <= _POINTS:
        raise ArithmeticError(f"the embedded model gives an answer {found:.1f} % instead of {whole:.1f} %")
    return f"{said}the embedded model gives the answer {found:.1f} %"


def compiler() -> str:
    """Whether a C++ compiler builds something that can be loaded; torch.compile itself would take half a minute."""
    named = (os.environ.get("CXX"), "g++", "clang++")
    if (found := next((path for name in named if name and (path := shutil.which(name))), None)) is None:
        raise FileNotFoundError("no C++ compiler: neither g++ nor clang++, nor what CXX names")
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "two.cpp", Path(folder) / "two.so"
        source.write_text('#include <cmath>\nextern "C" double two() { return std::sqrt(4.0); }\n', encoding="utf-8")
        words = [found, "-O1", "-shared", "-fPIC", "-o", str(built), str(source)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=6 * _PATIENCE, check=False)
        if done.returncode:
            raise OSError(f"{Path(found).name} fails: {(done.stderr.splitlines() or [''])[0]}")
        two = ctypes.CDLL(str(built)).two
        two.restype = ctypes.c_double
        if two() != 2:
            raise ArithmeticError(f"what {Path(found).name} builds says that the root of 4 is {two()}")
    return f"{Path(found).name} builds what can be loaded"


def process_group() -> str:
    """Two ends of a gloo process group, in threads of this process, add up 1 and 2 through the network's loopback."""
    import torch
    from torch import distributed

    if not distributed.is_available() or not distributed.is_gloo_available():
        raise Skipped("this torch was built without gloo")
    store, sums = distributed.HashStore(), {}

    def add(rank: int) -> None:
        group: Any = distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=_PATIENCE))
        value = torch.tensor([rank + 1.0])
        group.allreduce([value]).wait()
        sums[rank] = value.item()

    ends = [threading.Thread(target=add, args=(rank,), daemon=True) for rank in (0, 1)]
    for end in ends:
        end.start()
    for end in ends:
        end.join(2 * _PATIENCE)
    if sums != {0: 3.0, 1: 3.0}:
        raise OSError("gloo: two ends do not reach each other (GLOO_SOCKET_IFNAME names the network interface)")
    return "gloo: two ends add up what they have"


def caches() -> str:
    """A file can be made where the package and the hub's library keep things."""
    from huggingface_hub import constants

    from lightning_ssiuu.utils.files import cache_directory

    told = []
    for name, folder in (("LIGHTNING_SSIUU_CACHE", cache_directory()), ("HF_HOME", Path(constants.HF_HUB_CACHE))):
        existing = folder.absolute()
        while not existing.exists():  # it is made when there is something to keep
            existing = existing.parent
        try:
            with tempfile.TemporaryFile(dir=existing):
                told.append(f"{folder} ({shutil.disk_usage(existing).free / 1e9:.0f} GB free)")
        except OSError as error:
            raise OSError(f"no file can be made in {folder} ({error.strerror}); {name} names another place") from error
    return ", ".join(told)


def hub(asked: bool) -> str:
    """Whether the hub answers at all, within five seconds."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not asked:
        raise Skipped("HF_HUB_OFFLINE is set; --hub tries it all the same")
    came: list[str | Exception] = []

    def ask() -> None:
        try:
            with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_PATIENCE):
                came.append("answers")
        except HTTPError as error:  # also an answer
            came.append(f"answers with {error.code}")
        except Exception as error:
            came.append(error)

    # A name server may keep this waiting much longer than any timeout says.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    answer = came[0] if came else TimeoutError(f"no answer within {_PATIENCE:.0f} seconds")
    if isinstance(answer, Exception):
        raise answer
    return f"{constants.ENDPOINT} {answer}"


def requirements() -> str:
    """Whether every package that this one needs is there, in a version that will do."""
    from packaging.requirements import Requirement

    needed = list(map(Requirement, metadata.requires(DISTRIBUTION) or ()))
    if wrong := [text for one in needed if one.marker is None for text in _wrong(one)]:
        raise LookupError(", ".join(wrong))
    return "all there, in versions that will do"


def extras() -> dict[str, list[str]]:
    """What is missing for each extra, by its name; nothing where it is installed."""
    from packaging.requirements import Requirement

    needed = list(map(Requirement, metadata.requires(DISTRIBUTION) or ()))
    names = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    return {
        name: [text for one in needed if one.marker and one.marker.evaluate({"extra": name}) for text in _wrong(one)]
        for name in sorted(names)
    }


def _wrong(requirement: Any) -> list[str]:
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return [f"{requirement.name}{requirement.specifier} (missing)"]
    if requirement.specifier.contains(found, prereleases=True):
        return []
    return [f"{requirement.name}{requirement.specifier} ({found} is installed)"]


#: What is tried, in this order, by name; the first is the main job.
CHECKS: dict[str, Callable[[], str]] = {
    "embedded model": embedded_model,
    "requirements": requirements,
    "bfloat16": bfloat16,
    "8 bits": eight_bit,
    "4 bits": four_bit,
    "torch.compile": compiler,
    "processes": process_group,
    "cache": caches,
}
