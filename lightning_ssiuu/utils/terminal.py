"""Tables and lines for the screen. Imports no torch: some commands need none."""

from __future__ import annotations

from rich.console import Console


def text_console() -> Console:
    """A console that prints text as it is, in a notebook too: there rich would show HTML past a redirected stdout."""
    return Console(markup=False, force_jupyter=False)


def three_digits(value: float) -> str:
    """A figure with three digits; a count in full.

    >>> three_digits(0.29230), three_digits(2996)
    ('0.292', '2996')
    """
    return str(value) if isinstance(value, int) else f"{value:.3g}"
