"""``lightning-ssiuu doctor``: what is installed, on which devices, and what works here; for bug reports as JSON."""

from __future__ import annotations

import argparse
import getpass
import json as as_json
import logging
import os
import platform
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning_ssiuu.cli.doctor_checks import CHECKS, Skipped, extras, hub
from lightning_ssiuu.utils.errors import Given, UserError, one_line
from lightning_ssiuu.utils.version import DISTRIBUTION, commit, version

# Nothing heavy is imported before it is tried: what does not even import is told, too.

_BROKEN = 1  # exit status: the main job does not work
_MARKS = {"works": "ok", "fails": "NO", "skipped": "--"}
_LONGEST = 300


@dataclass(frozen=True)
class Check:
    """What came of one trial: ``result`` in words, and the seconds it took."""

    name: str
    state: Literal["works", "fails", "skipped"]
    result: str
    seconds: float


@dataclass(frozen=True)
class Diagnosis:
    """What ``doctor`` found, as ``--json`` prints it."""

    works: bool
    versions: dict[str, str]
    commit: str | None
    system: str
    devices: dict[str, Any]
    checks: list[Check]
    extras: dict[str, dict[str, Any]]


def doctor(json: bool = False, hub_too: bool = False) -> Diagnosis:
    """Try what commands rely on, each for real and quickly, and print what came of it.

    The main job is to load the embedded model and to score a question; the exit status is 0 if that works, 1 if not,
    and 2 for an option that does not exist. All else is told and changes no status. The home directory appears as
    ``~``, the user's name in other paths as ``USER``.

    Args:
        json: Print JSON instead of text.
        hub_too: Ask whether the hub can be reached although ``HF_HUB_OFFLINE`` is set.

    Returns:
        All that was printed.
    """
    checks = [_tried(name, check) for name, check in CHECKS.items()]
    checks.append(_tried("hub", partial(hub, hub_too)))
    works = checks[0].state == "works"
    found = Diagnosis(works, _versions(), commit(), _system(), _devices(), checks, _extras())
    print(as_json.dumps(asdict(found), indent=2) if json else _text(found))
    return found


def _tried(name: str, check: Callable[[], str]) -> Check:
    begin = time.monotonic()
    state: Literal["works", "fails", "skipped"]
    logging.disable(logging.ERROR)  # what libraries have to say; the result says what matters
    try:
        with warnings.catch_warnings(action="ignore"):
            state, result = "works", check()
    except Skipped as why:
        state, result = "skipped", str(why)
    except Exception as error:  # whatever a broken installation may raise
        state, result = "fails", f"{type(error).__name__}: {error}"
    finally:
        logging.disable(logging.NOTSET)
    return Check(name, state, private(one_line(result)[:_LONGEST]), round(time.monotonic() - begin, 2))


def private(text: str) -> str:
    """Text without the user's name in paths.

    >>> private(f"{Path.home()}/.cache, /scratch/{getpass.getuser()}/hub")
    '~/.cache, /scratch/USER/hub'
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # an id without a name, as in some containers
        user = ""
    # Letters of a longer name are none of this one. Path.home() would raise where there is none.
    home = Path(os.path.expanduser("~"))
    if home.is_absolute() and home != Path(home.anchor):
        text = re.sub(rf"(?<![\w.-]){re.escape(str(home))}(?![\w.-])", "~", text)
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?![\w.-])", "USER", text) if user else text


def _versions() -> dict[str, str]:
    try:
        from lightning_ssiuu.utils.provenance import versions

        return versions()
    except Exception:  # no torch
        import lightning_ssiuu

        return {"python": platform.python_version(), DISTRIBUTION: lightning_ssiuu.__version__}


def _system() -> str:
    return f"{platform.system()} {platform.machine()}"


def _devices() -> dict[str, Any]:
    found: dict[str, Any] = {"cpu": {"cores": os.cpu_count()}}
    if hasattr(os, "sched_getaffinity"):
        found["cpu"]["cores"] = len(os.sched_getaffinity(0))
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["cpu"]["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    try:
        import torch

        found["cpu"]["threads"] = torch.get_num_threads()
        found["cuda"] = [_of_cuda(torch.cuda.get_device_properties(n)) for n in range(torch.cuda.device_count())]
        found["cuda_of_torch"] = torch.version.cuda
        found["mps"] = torch.backends.mps.is_available()
    except Exception as error:
        found["torch"] = private(one_line(f"{type(error).__name__}: {error}")[:_LONGEST])
    return found


def _of_cuda(properties: Any) -> dict[str, Any]:
    # In hardware since compute capability 8.0; torch imitates it before.
    memory = round(properties.total_memory / 1e9, 1)
    return {"name": properties.name, "memory_gb": memory, "bfloat16": properties.major >= 8}


def _extras() -> dict[str, dict[str, Any]]:
    try:
        found = extras()
    except Exception:  # a source tree that was never installed
        return {}
    lines = {name: f"pip install '{DISTRIBUTION}[{name}]'" for name in found}
    return {
        name: {"installed": not missing} | ({"missing": missing, "install": lines[name]} if missing else {})
        for name, missing in found.items()
    }


def _text(found: Diagnosis) -> str:
    others = ", ".join(f"{name} {version}" for name, version in found.versions.items() if name != DISTRIBUTION)
    cpu = found.devices["cpu"]
    memory = f", {cpu['memory_gb']} GB of memory" if "memory_gb" in cpu else ""
    lines = [f"{DISTRIBUTION} {version()}", f"{others}, on {found.system}", "", "Devices"]
    lines += [f"  CPU   {cpu['cores']} cores, {cpu.get('threads', '?')} of them used by torch{memory}"]
    for number, card in enumerate(found.devices.get("cuda", [])):
        bits = "bfloat16" if card["bfloat16"] else "no bfloat16"
        lines.append(f"  CUDA  {number}: {card['name']}, {card['memory_gb']} GB, {bits}")
    if "torch" in found.devices:
        lines.append(f"  CUDA  not known: torch cannot be imported ({found.devices['torch']})")
    elif not found.devices["cuda"]:
        why = "" if found.devices["cuda_of_torch"] else " (this torch was built without CUDA)"
        lines.append(f"  CUDA  none{why}")
    if found.devices.get("mps"):
        lines.append("  MPS   there")
    width = max(len(check.name) for check in found.checks)
    lines += ["", "What works here"]
    lines += [f"  {_MARKS[one.state]}  {one.name:<{width}}  {one.result} ({one.seconds:.1f} s)" for one in found.checks]
    width = max(map(len, found.extras), default=0)
    lines += ["", "Extras" if found.extras else "Extras: not known, the package is not installed"]
    lines += [f"  {name:<{width}}  {extra.get('install', 'installed')}" for name, extra in found.extras.items()]
    job = "The main job works" if found.works else "The main job does not work"
    return "\n".join([*lines, "", f"{job}: loading a model and scoring it."])


def run(args: list[str]) -> None:
    """Parse and run ``doctor``."""
    # Not jsonargparse, which may be what is missing.
    text = "Versions, devices, extras, and what works here, each thing tried. Exit status 1 if the main job does not."
    parser = argparse.ArgumentParser(prog="lightning-ssiuu doctor", description=text)
    parser.add_argument("--json", action="store_true", help="print JSON, for a bug report")
    parser.add_argument("--hub", action="store_true", help="try to reach the hub although HF_HUB_OFFLINE is set")
    given, unknown = parser.parse_known_args(args)
    if unknown:
        raise UserError(unknown[0], Given("an option that does not exist"), "--json, --hub")
    if not doctor(given.json, given.hub).works:
        raise SystemExit(_BROKEN)
