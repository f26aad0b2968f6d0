"""A part of the way back to the weights before unlearning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys.models import random_model
from toys.sweeps import run

from lightning_ssiuu.attacks import Interpolation
from lightning_ssiuu.attacks.finetune import Snapshot
from lightning_ssiuu.attacks.interpolation import interpolate
from lightning_ssiuu.utils.errors import UserError


def test_weights_on_the_way() -> None:
    model, goal = random_model(seed=0), random_model(seed=1)
    start = Snapshot(model).tensors
    for alpha in (0.25, 1.0):
        interpolate(model, start, Snapshot(goal).tensors, alpha)
        for name, weight in model.named_parameters():
            expected = start[name] + alpha * (goal.get_parameter(name) - start[name])
            assert torch.allclose(weight, expected, atol=1e-15), name


def test_both_models_come_to_the_original(models: Path, tmp_path: Path) -> None:
    """All the way to what is the oracle here; the oracle itself is there from the beginning."""
    method = Interpolation(str(models / "oracle"), [0.5, 1.0])
    content = run(models, tmp_path, attack=method)
    half, whole = content["attacks"]
    assert (half["variant"], whole["variant"]) == ("alpha=0.5", "alpha=1")
    assert half["n_attack"] is None
    at_goal = whole["oracle"]["before"]["mean"]
    for name in ("unlearned", "oracle"):
        assert whole[name]["forget_score"]["mean"] == pytest.approx(at_goal, rel=1e-6)
    assert half["unlearned"]["forget_score"]["mean"] != pytest.approx(half["unlearned"]["before"]["mean"], rel=1e-3)
    assert half["oracle"]["forget_score"]["mean"] == pytest.approx(at_goal, rel=1e-6)
    assert whole["gap"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert str(models) not in str(content["settings"])
    assert "control" not in whole


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"alphas": []}, r"attack\.alphas: got \[\]"),
        ({"alphas": [0.0]}, r"attack\.alphas: got 0\.0, allowed: parts of the way"),
        ({"alphas": [1.5]}, r"attack\.alphas: got 1\.5"),
        ({"original": None}, r"attack\.original: got None, allowed: the model before unlearning"),
        ({"original": "/no/such"}, r"attack\.original: got '/no/such'"),
    ],
)
def test_mistakes(models: Path, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"^{told}"):
        run(models, tmp_path, attack=Interpolation(**({"original": str(models / "oracle")} | options)))
