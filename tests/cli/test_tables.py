"""What commands print: the contents of their JSON files as tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lightning_ssiuu.cli.attack import print_attacks
from lightning_ssiuu.cli.audit import print_audit
from lightning_ssiuu.cli.privacy import print_privacy
from lightning_ssiuu.cli.utility import print_utility


def spread(mean: float, std: float = 0.0) -> dict[str, float]:
    return {"mean": mean, "std": std}


ATTACKS: list[dict[str, Any]] = [
    {
        **{"attack": "harmful", "p": 0.1, "variant": None, "gap": spread(20.0)},
        "unlearned": {"before": spread(5.0), "forget_score": spread(30.0, 1.0), "inside_grid": True},
        "oracle": {"before": spread(4.0), "forget_score": spread(10.0), "inside_grid": False},
    },
    {
        **{"attack": "ablation", "p": None, "variant": "zero", "control": {"forget_score": spread(6.0)}},
        "unlearned": {"before": spread(5.0), "forget_score": spread(30.0)},
    },
]
AUDIT = {
    "scores": {name: {"forget": {"probability": p}} for name, p in (("original", 90.0), ("unlearned", 9.0))},
    "influence": {"unlearned": {"d_plus_total": 1.0, "d_minus_total": 2.0}},
    "attribution_correlation": 0.5,
    "verdict": {"sentence": "Mixed: [sic]."},
}
PRIVACY = {
    **{"membership_auc": {"model": {"loss": 40.0}, "oracle": {"loss": 50.0}}, "reference_auc": 30.0},
    **{"privleak": {"loss": 20.0}, "forget_quality": 0.5, "n_forget": 4, "n_nonmembers": 9},
}
UTILITY = {
    **{"utility_score": 75.0, "suite": "embedded", "tasks": {"days": 50.0, "numbers": 100.0}},
    "n_items": {"days": 14, "numbers": 22},
}


@pytest.mark.parametrize(
    ("show", "lines"),
    [
        (
            lambda: print_attacks(ATTACKS, "probability"),
            [
                "Highest forget probability under attack, %",
                "attack model before highest",
                "harmful 0.1 unlearned 5.0 30.0 ± 1.0",
                "harmful 0.1 oracle 4.0 10.0 ± 0.0 (at the edge of the grid)",
                "harmful 0.1 gap 20.0 ± 0.0",
                "ablation zero unlearned 5.0 30.0 ± 0.0",
                "ablation zero unlearned, control 6.0 ± 0.0",
            ],
        ),
        (
            lambda: print_audit(AUDIT),
            [
                "original unlearned",
                "forget probability 90.0 9.0 %",
                "d_plus_total 1",
                "d_minus_total 2",
                "attribution correlation before/after attack: 0.500",
                "Mixed: [sic].",
            ],
        ),
        (
            lambda: print_privacy(PRIVACY),
            [
                "Membership inference, AUC in %: 4 members, 9 others",
                "attack model oracle privleak",
                "loss 40.0 50.0 +20.0",
                "reference 30.0",
                "forget quality: p = 0.5",
            ],
        ),
        (
            lambda: print_utility(UTILITY),
            ["Utility (embedded), %", "task items score", "days 14 50.0", "numbers 22 100.0", "mean 75.0"],
        ),
    ],
)
def test_tables(
    show: Callable[[], None], lines: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    show()
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == lines
