"""The one exception a user's mistake raises, whatever part of the package finds it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

_LONGEST = 300  # characters shown of what was given


class UserError(ValueError):
    """A mistake only the user can mend; its text is one line, safe to print, without data-set text.

    The command line prints it to stderr and exits with status 2 before anything is trained or written.

    Args:
        argument: Name of the argument as the user wrote it, e.g. ``"regularizer.weight"``.
        value: What was given. Never pass forget-set text here; pass ids or counts.
        allowed: What would have been accepted.

    Example:
        >>> raise UserError("p", 1.5, "a fraction in (0, 1)")
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: p: got 1.5, allowed: a fraction in (0, 1)
    """

    def __init__(self, argument: str, value: object, allowed: str) -> None:
        self.argument, self.value, self.allowed = argument, value, allowed
        super().__init__(one_line(f"{argument}: got {_shown(value)}, allowed: {allowed}"))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str]]:
        # ValueError would be rebuilt from the one-line text alone, and a spawned rank must be able to send it.
        return type(self), (self.argument, self.value, self.allowed)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


UserError.__module__ = "lightning_ssiuu"  # its public place: what a traceback shows


class NotFinite(UserError):  # noqa: N818 (as UserError, it says what is wrong with the value)
    """NaN or infinity where figures rest on a number: a broken model, or a training run that diverged."""


def one_line(text: str) -> str:
    """Text without line breaks and control characters, which terminals obey."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def check_number(argument: str, value: float, positive: bool = False) -> None:
    """Refuse what is not a finite number ≥ 0, or > 0 where it has to be positive."""
    if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
        raise UserError(argument, value, f"a finite number {'>' if positive else '≥'} 0")


def check_choice(argument: str, value: object, choices: object) -> None:
    """Refuse what is not one of the words of the ``Literal`` ``choices``."""
    if value not in get_args(choices):
        raise UserError(argument, value, f"one of {list(get_args(choices))}")


def check_at_least(argument: str, value: float, least: float) -> None:
    """Refuse a number below ``least``, and what is not a number."""
    if not value >= least:
        raise UserError(argument, value, f"a number ≥ {least}")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those behind it, as a traceback would show them; those of other ranks where it carries them."""
    while error is not None:
        yield error
        # torch.distributed.checkpoint hands every rank the failures of all: {rank: (exception, where)}.
        failures = getattr(error, "failures", None)
        for failure in failures.values() if isinstance(failures, dict) else ():
            yield from causes(failure[0])
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


class Given(str):
    """Text describing what was given, shown without quotation marks in a :class:`UserError`."""

    def __repr__(self) -> str:
        return str(self)


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """Inside, an error about a ``checkpoint`` names the argument that the checkpoint was given for."""
    try:
        yield
    except UserError as error:
        if error.argument != "checkpoint":
            raise
        raise type(error)(argument, error.value, error.allowed) from error
