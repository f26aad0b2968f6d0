"""Tables and lines for the screen. Imports no torch: some commands need none."""

from __future__ import annotations

from rich.console import Console


def text_console() -> Console:
    """A console that prints text as it is, in a notebook too: there rich would show HTML past a redirected stdout."""
    return Console(markup=False, force_jupyter=False)
