"""How a function's parameters become options."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ssiuu.attacks import Attack, Harmful, SoftPrompt
from lightning_ssiuu.cli.parsing import run_function


def told(attack: Attack | None = None) -> Attack | None:
    """Give back what was chosen.

    Args:
        attack: A class and its options.
    """
    return attack


def chosen(*args: str) -> Attack:
    return run_function(told, "told", list(args), {"attack": "Harmful"})  # type: ignore[no-any-return]


@pytest.mark.parametrize("attack", [Harmful(), SoftPrompt()])
def test_what_is_printed_is_what_is_run(attack: Attack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class named alone has its own options, and a configuration that was printed can be given back."""
    with pytest.raises(SystemExit) as ended:
        chosen("--attack", type(attack).__name__, "--print_config")
    assert ended.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert chosen("--config", str(tmp_path / "printed.yaml")).options() == attack.options()


def test_options_of_the_default_class_stay_with_it() -> None:
    soft = chosen("--attack", "SoftPrompt", "--attack.steps", "3")
    assert isinstance(soft, SoftPrompt)
    assert (list(soft.p), soft.steps) == ([0.3], 3)  # and not Harmful's fractions
    harmful = chosen("--attack.seeds", "[5]")
    assert isinstance(harmful, Harmful)
    assert (list(harmful.p), harmful.seeds) == ([0.1, 0.3], [5])
