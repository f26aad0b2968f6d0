"""``lightning-ssiuu oracle``: the embedded model, trained anew without the forget set."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_ssiuu.cli.parsing import run_function
from lightning_ssiuu.cli.report import print_table
from lightning_ssiuu.datamodules.embedded import FACTS
from lightning_ssiuu.datamodules.embedded.build import STEPS, build_tiny
from lightning_ssiuu.models.loading import TINY
from lightning_ssiuu.utils.console import hide_short_bars
from lightning_ssiuu.utils.errors import UserError, check_at_least
from lightning_ssiuu.utils.files import check_space, print_written, refuse_existing, written_atomically

_FOLDER = "model"


def oracle(output: str = "runs/oracle", seed: int = 0, steps: int = STEPS, overwrite: bool = False) -> None:
    """Train the embedded model from its first step on everything but the forget set: what erasing should look like.

    It takes about a minute of one CPU core. The result is ``--oracle`` for ``attack``, ``audit`` and ``privacy``. The
    oracle of a model and data of your own is made by ``fit`` with the recipes ``objective/fine_tuning``, a model, data,
    and ``teach/oracle`` as the last.

    Args:
        output: Directory that gets ``model/``.
        seed: Of initial weights and of the order of the training pairs.
        steps: Training steps.
        overwrite: Replace an earlier oracle.

    Raises:
        UserError: If the directory holds one already or cannot be written, or a number is out of its range.
    """
    check_at_least("steps", steps, 1)
    if not 0 <= seed < 1 << 32:
        raise UserError("seed", seed, f"a number from 0 to {(1 << 32) - 1}")
    refuse_existing("output", output, [_FOLDER], overwrite)
    check_space("output", output, 1 << 24)
    hide_short_bars(str(TINY))  # of the same size
    world = json.loads(FACTS.read_text(encoding="utf-8"))
    with written_atomically(Path(output) / _FOLDER) as temporary:
        seconds, measured = build_tiny(temporary, world, without_forget=True, seed=seed, steps=steps)
    splits = ("forget", "retain", "test")
    names = ("accuracy", "probability", "choice")
    rows = [(name, *(f"{measured[split][name]:.1f}" for split in splits)) for name in names]
    print_table([("%", *splits), *rows], f"The oracle, {steps} steps, {seconds:.0f} s")
    print_written(output, [_FOLDER])


def run(args: list[str]) -> None:
    """Parse and run ``oracle``."""
    run_function(oracle, "oracle", args)
