"""How a function's parameters become options."""

from __future__ import annotations

from lightning_ssiuu.attacks import Attack, Harmful, SoftPrompt
from lightning_ssiuu.cli.parsing import run_function


def told(attack: Attack | None = None) -> Attack | None:
    """Give back what was chosen.

    Args:
        attack: A class and its options.
    """
    return attack


def test_options_of_the_default_class_stay_with_it() -> None:
    def chosen(*args: str) -> Attack:
        return run_function(told, "told", list(args), {"attack": "Harmful"})  # type: ignore[no-any-return]

    soft = chosen("--attack", "SoftPrompt", "--attack.steps", "3")
    assert isinstance(soft, SoftPrompt)
    assert (list(soft.p), soft.steps) == ([0.3], 3)  # and not Harmful's fractions
    harmful = chosen("--attack.seeds", "[5]")
    assert isinstance(harmful, Harmful)
    assert (list(harmful.p), harmful.seeds) == ([0.1, 0.3], [5])
