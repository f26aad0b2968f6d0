"""What each Trainer strategy cannot do here, said before anything is loaded."""

from __future__ import annotations

from typing import Any


def check_strategy(trainer: Any, module: Any) -> None:
    """Refuse combinations that would train something else than asked."""
