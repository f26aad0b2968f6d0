"""How many threads a process computes with on a CPU: as many as the work is worth, and none that waits busily."""

from __future__ import annotations

import math
import os
from pathlib import Path

#: What a user sets to decide for themselves.
_USERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_MARK = "LIGHTNING_SSIUU_THREADS"  # says to the processes of a run, which inherit it, that the user has not decided
#: Parameters × tokens of a forward pass that a thread needs to be worth waking.
WORTH_A_THREAD = 2_000_000_000
_CGROUPS = Path("/sys/fs/cgroup")
_known: set[int] = set()  # numbers of threads that nobody but torch, Lightning and this file has set


def wait_passively(environment: dict[str, str] | os._Environ[str] = os.environ) -> None:
    """Have threads that wait for others sleep; to be called before torch is loaded.

    OpenMP's own way is to look again and again for milliseconds: where other programs need the cores, that takes them
    from the very threads that are waited for. A policy of the user's stays.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not any(_decides(environment.get(name, "")) for name in _USERS):
        environment.setdefault(_MARK, "auto")


def remember_threads() -> None:
    """Take the present number of threads for torch's own; another one found later is the user's."""
    import torch  # not before wait_passively

    _known.add(torch.get_num_threads())


def are_free() -> bool:
    """Whether nobody has decided on the number of threads: neither by environment nor by ``torch.set_num_threads``."""
    import torch

    if os.environ.get(_MARK) != "auto":
        return False
    lightnings = os.environ.get("OMP_NUM_THREADS", "")  # which it sets for the processes it starts
    return torch.get_num_threads() in {*_known, *([int(lightnings)] if lightnings.isdecimal() else [])}


def _decides(given: str) -> bool:
    # OpenMP takes a number or, for nested threads, several; it ignores anything else, as if nothing were set.
    return given.split(",")[0].strip().isdecimal() and int(given.split(",")[0]) > 0


def threads_for(parameters: int, tokens: int, cores: int) -> int:
    """Threads for passes of so many tokens through a model of so many parameters, on so many cores.

    Example:
        >>> threads_for(918_656, 16 * 30, cores=64), threads_for(134_515_008, 16 * 64, cores=2)
        (1, 2)
    """
    return max(1, min(cores, parameters * tokens // WORTH_A_THREAD))


def set_threads(number: int) -> None:
    """Compute with so many threads; :func:`are_free` stays true."""
    import torch

    torch.set_num_threads(number)
    _known.add(number)


def cores(local_processes: int = 1) -> int:
    """Cores for each of the processes of a run on this machine: those it may run on, within its cgroup's quota."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available, _quota(_CGROUPS)) // local_processes)


def _quota(folder: Path) -> int:
    # Of a container, in cores; without one far more than any machine has.
    for name in ("cpu.max", "cpu/cpu.cfs_quota_us"):
        try:
            limit, *period = (folder / name).read_text(encoding="ascii").split()
            length = period[0] if period else (folder / "cpu/cpu.cfs_period_us").read_text(encoding="ascii")
            if limit.isdigit():
                return max(1, math.floor(int(limit) / int(length)))
        except (OSError, ValueError):
            continue
    return 1 << 20


def choose_threads(parameters: int, tokens: int, local_processes: int, recorded: int | None = None) -> str | None:
    """Set the number of threads by the work of a pass, unless the user did; returns what to say of it.

    ``recorded`` is the number with which a run began that is gone on with: sums in another order have other bits.
    """
    if not are_free():
        return None
    most = cores(local_processes)
    number = threads_for(parameters, tokens, most) if recorded is None else recorded
    set_threads(number)
    why = f"{parameters / 1e6:.3g}M parameters, {tokens} tokens a pass" if recorded is None else "as the run began"
    return f"threads: {number} of {most} ({why}); OMP_NUM_THREADS sets another number"
