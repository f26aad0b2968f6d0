"""Two processes against one with the same global batch, in float64 with SGD: DDP and FSDP2, weights equal to 1e-12."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_script import SCRIPT, train

SETTINGS: dict[str, dict[str, Any]] = {
    # three micro-batches per step, both sharing the sum over micro-batches and over ranks
    "absolute": {"weight": 1000.0, "target": "length_normalised", "accumulate": 3, "steps": 2},
    # what is evaluated on the way must agree too: thresholds that differ between ranks would hang the run
    "relative": {"weight": 1.0, "weight_mode": "relative", "clip": 0.5, "looking": True},
}


def _run(ranks: int, strategies: list[str], folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # nothing of a launcher that may have started this test itself
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK")}
    environment |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    jobs = [(name, strategy, settings) for strategy in strategies for name, settings in SETTINGS.items()]
    command = [sys.executable, SCRIPT, str(ranks), str(folder), json.dumps(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        (name, strategy): [torch.load(folder / f"{name}.{strategy}.{rank}", weights_only=True) for rank in range(ranks)]
        for name, strategy, _ in jobs
    }


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Any]]:
    """One process's results: this one's."""
    return {name: train("auto", 1, settings) for name, settings in SETTINGS.items()}


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two processes' results."""
    return _run(2, ["ddp", "fsdp"], tmp_path_factory.mktemp("double"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_two_ranks_equal_one(single: Any, double: Any, strategy: str, name: str) -> None:
    expected = single[name]
    assert expected["figures"]["train/penalty_gradient_norm"] > 0.01
    for result in double[name, strategy]:
        assert result["steps"] == expected["steps"]
        for a, b in zip(result["weights"], expected["weights"], strict=True):
            assert (a - b).abs().max() < 1e-12
        for figure in ("negative_share", "max_log_probability", "objective_gradient_norm", "penalty_gradient_norm"):
            given = expected["figures"][f"train/{figure}"]
            assert result["figures"][f"train/{figure}"] == pytest.approx(given, rel=1e-6)
        if "looking" in SETTINGS[name]:
            torch.testing.assert_close(result["d_minus"], expected["d_minus"], rtol=1e-9, atol=0)
            assert result["value"] == pytest.approx(expected["value"], rel=1e-6)
            assert result["rouge_level"] == pytest.approx(expected["rouge_level"], rel=1e-9)
