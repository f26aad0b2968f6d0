"""Learning-rate schedules by name; those with a warm-up learn from the Trainer how many steps there will be."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer

from lightning_ssiuu.utils.errors import Given, UserError, check_number
from lightning_ssiuu.utils.registry import resolve, shortened

Schedule = Callable[..., Any]
ScheduleName = Literal["constant_with_warmup", "linear_with_warmup", "cosine_with_warmup"]


def _of_transformers(name: str) -> Schedule:
    def make(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> Any:
        from transformers import get_scheduler  # slow to import, and bitsandbytes with it

        return get_scheduler(name, optimizer, num_warmup_steps, num_training_steps)

    return make


#: After the warm-up, in which the rate rises from 0 in a line: constant, down to 0 in a line, or along half a cosine.
SCHEDULES: dict[str, Schedule] = {
    "constant_with_warmup": _of_transformers("constant_with_warmup"),
    "linear_with_warmup": _of_transformers("linear"),
    "cosine_with_warmup": _of_transformers("cosine"),
}
_WARMUP, _TOTAL = "num_warmup_steps", "num_training_steps"  # transformers' names for what is filled in


def find_schedule(given: str | Schedule | None, warmup_steps: float) -> Schedule | None:
    """What an option ``lr_scheduler`` means: a name of :data:`SCHEDULES`, an import path, or a callable itself.

    A function may have ``num_warmup_steps`` and ``num_training_steps``, as those of transformers; they are filled in.

    Raises:
        UserError: If there is none of that name, it needs what nobody gives it, or there is a warm-up that it ignores.
    """
    check_number("warmup_steps", warmup_steps)
    if warmup_steps >= 1 and warmup_steps != int(warmup_steps):
        raise UserError("warmup_steps", warmup_steps, "a whole number of steps, or a share of all steps below 1")
    schedule = resolve(given, SCHEDULES, "lr_scheduler") if isinstance(given, str) else given
    if schedule is not None and not callable(schedule):
        raise UserError("lr_scheduler", given, "the import path of a function or a class that makes a schedule")
    parameters = list(_parameters(schedule).values())[1:]
    required = {
        p.name for p in parameters if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }
    if missing := sorted(required - {_WARMUP, _TOTAL}):
        raise UserError("lr_scheduler", given, f"a class_path with init_args for {', '.join(missing)}")
    if warmup_steps and _WARMUP not in _parameters(schedule):
        raise UserError("warmup_steps", warmup_steps, f"0, or an lr_scheduler with a warm-up: {list(SCHEDULES)}")
    return schedule


def follows_length(name: str, warmup_steps: float) -> bool:
    """Whether the rates of the schedule of that name or import path depend on how many steps there will be."""
    constant = name == "constant_with_warmup"
    return 0 < warmup_steps < 1 or (not constant and _TOTAL in _parameters(resolve(name, SCHEDULES, "lr_scheduler")))


def make_schedule(schedule: Schedule, optimizer: Optimizer, warmup_steps: float, total: Callable[[], float]) -> Any:
    """A schedule for an optimiser; ``total()``, the number of steps, is asked only where it is needed.

    Raises:
        UserError: If the number of steps is needed and has no limit.
    """
    options: dict[str, int] = {}
    wanted = _parameters(schedule)
    if _TOTAL in wanted or 0 < warmup_steps < 1:
        if math.isinf(n_steps := total()):
            allowed = "a number: the schedule has to know how many steps there will be"
            raise UserError("trainer.max_steps", Given("no limit, and none of trainer.max_epochs"), allowed)
        options = {
            _WARMUP: math.ceil(warmup_steps * n_steps) if warmup_steps < 1 else int(warmup_steps),
            _TOTAL: int(n_steps),
        }
    elif _WARMUP in wanted:
        options = {_WARMUP: int(warmup_steps)}
    try:
        made = schedule(optimizer, **{name: value for name, value in options.items() if name in wanted})
    except (TypeError, ValueError) as error:
        allowed = f"what makes a schedule of an optimiser ({shortened(str(error))})"
        raise UserError("lr_scheduler", _name(schedule), allowed) from error
    if not callable(getattr(made, "step", None)):
        raise UserError("lr_scheduler", _name(schedule), "what makes a schedule of an optimiser")
    return made


def with_schedule(
    optimizer: Optimizer, schedule: Schedule | None, warmup_steps: float, total: Callable[[], float]
) -> Any:
    """What Lightning takes from ``configure_optimizers``, with :func:`make_schedule`'s arguments; None for constant."""
    if schedule is None:
        return optimizer
    made = make_schedule(schedule, optimizer, warmup_steps, total)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}


def _name(schedule: Schedule) -> str:
    return getattr(schedule, "__name__", type(schedule).__name__)


def _parameters(schedule: Schedule | None) -> dict[str, inspect.Parameter]:
    try:
        return {} if schedule is None else dict(inspect.signature(schedule).parameters)
    except (TypeError, ValueError):  # of what is not written in Python
        return {}
