"""The robustness benchmark ends runs at one forget score."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys.cli import ROOT, at, script


@pytest.mark.parametrize(("level", "ends"), [(7.0, 7.0), (7.9, 7.95), (8.0, 7.95), (6.0, 6.4), (9.0, 6.4)])
def test_a_step_that_ends_on_the_level_is_not_passed_over(
    level: float, ends: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.robustness.matching import met

    weight, before, after = (torch.tensor([value], dtype=torch.float64) for value in (0.0, 7.95, 6.4))
    met([weight], [before], [after], lambda: float(weight), level, tolerance=0.1)
    assert float(weight) == pytest.approx(ends)


def test_matched_weights_have_the_score_and_are_the_same_after_a_kill(tmp_path: Path) -> None:
    options = ["--config", str(ROOT / "recipes/objective/gradient_difference.yaml"), "--model.init_args.scores"]
    options += ["[probability]", "--stopping.score", "probability", "--stopping.threshold", "70"]
    options += ["--model.init_args.optimizer.init_args.lr", "8e-4", "--attribution.probe_examples", "0"]
    options += [
        "--trainer.callbacks",
        "benchmarks.robustness.matching.MatchForgetScore",
        "--data.init_args.eval_batch_size",
    ]
    options += ["64", "--checkpoints.every_n_steps", "1", "--ckpt_path", "last", "--trainer.logger", "false"]
    from lightning_ssiuu.objectives import UnlearningModule

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    whole = script(tmp_path, "fit", *options, "--trainer.default_root_dir", "whole", path=[ROOT])
    assert whole.status == 0, whole.err
    steps = json.loads((tmp_path / "whole/metrics.json").read_text())["steps"]
    killed = script(  # within the last step
        *(tmp_path, "fit", *options, "--trainer.default_root_dir", "killed"),
        path=[ROOT],
        first=at(UnlearningModule, "optimizer_step", kill, call=steps),
    )
    assert killed.status == -signal.SIGKILL
    again = script(tmp_path, "fit", *options, "--trainer.default_root_dir", "killed", path=[ROOT])
    assert again.status == 0, again.err
    found = [json.loads((tmp_path / name / "matched.json").read_text()) for name in ("whole", "killed")]
    assert found[0] == found[1]
    assert abs(found[0]["score"] - 70) <= 0.1
    assert 0 < found[0]["alpha"] < 1
    assert found[0]["below"] < 69.9
    metrics = json.loads((tmp_path / "whole/metrics.json").read_text())
    assert metrics["after"]["forget_score"] == pytest.approx(found[0]["score"])  # what is saved is what was matched
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    refused = script(
        tmp_path, "fit", *options, "--stopping.every_n_steps", "2", "--trainer.default_root_dir", "r", path=[ROOT]
    )
    assert refused.status == 2
    assert "stopping.every_n_steps: got 2, allowed: 1: what is matched" in refused.err
