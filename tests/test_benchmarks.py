"""The benchmark scripts start, gpu_check.py works on toys, cost_model.py's formulas are those of real models."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toys.ranks import ranks

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(file for file in BENCHMARKS.glob("*.py") if "ArgumentParser(" in file.read_text(encoding="utf-8"))


def start_all(folder: Path) -> int:
    """Call every script as a program, all in this process: importing torch is what takes time."""
    sys.path.insert(0, str(BENCHMARKS))
    os.chdir(folder)
    found = {}
    for script in SCRIPTS:
        for option in ("--help", "--no-such-option"):
            sys.argv, text, status = [str(script), option], io.StringIO(), None
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                try:
                    runpy.run_path(str(script), run_name="__main__")
                except SystemExit as end:
                    status = end.code
            found[f"{script.name} {option}"] = status, text.getvalue()
    print(json.dumps(found))
    return 0


def program(script: Path, *arguments: str, folder: Path) -> int:
    """Run a script as a program, in a directory, for the same reason in this process; its exit status."""
    sys.path.insert(0, str(BENCHMARKS))
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_every_script_has_help_and_refuses_unknown_options(tmp_path: Path) -> None:
    assert len(SCRIPTS) >= 6
    (tmp_path / "empty").mkdir()
    end = ranks(lambda: start_all(tmp_path / "empty"), tmp_path / "ranks", 100)
    assert end.status == 0, end.err
    found = json.loads(end.err.splitlines()[-1])
    assert len(found) == 2 * len(SCRIPTS)
    for call, (status, text) in found.items():
        assert status == (0 if call.endswith("--help") else 2), (call, text)
        assert "usage:" in text, call
        if status:
            assert "error: " in text, call
    assert not any((tmp_path / "empty").iterdir())


@pytest.mark.slow
def test_gpu_check_runs_every_section_on_toys(tmp_path: Path) -> None:
    check = partial(program, BENCHMARKS / "gpu_check.py", "--device", "cpu", "--small", folder=tmp_path)
    end = ranks(check, tmp_path / "ranks", 600)
    assert end.status == 0, end.err
    sections = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))["sections"]
    assert {name: result["status"] for name, result in sections.items()} == dict.fromkeys(sections, "ok")
    assert sections["tests"]["counts"]["tests"] >= 20
    assert sections["large"]["SSIUU"]["penalty_gradient_norm"] > 0
    assert sections["large"]["SSIUU"]["seconds_ratio"] > 0
    from lightning_ssiuu.objectives import objectives

    assert objectives().keys() <= sections["objectives"].keys()
    assert {"LoRA, 8bit", "LoRA, 4bit", "full weights, PagedAdamW8bit"} <= sections["quantization"].keys()
    assert sections["attribution"]["tokens_per_second"] > 0
    assert {"gradient, bf16-mixed", "step, bf16-true"} <= sections["precision"].keys()
    assert sections["memory"]["SSIUU"]["estimated_bytes"] > 0
    assert sections["recipe"]["32-true"]["steps"] == 1
    assert sections["speed"].keys() >= {"as it is", "padded", "foreach", "chunked logits", "compiled", "SSIUU"}
    assert sections["adapters"]["toy, 4bit"]["estimated_bytes"] > 0
    assert "--peer" in sections["peer"]["skipped"]


@pytest.mark.usefixtures("_importable")
def test_gpu_check_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_check

    monkeypatch.chdir(tmp_path)
    first = ["gpu_check.py", "--device", "cpu", "--small", "--sections", "environment"]
    calls = [first, [*first, "peer"], [*first, "peer"], [*first, "--again"], [*first[:3], *first[4:]]]
    shown = []
    for call in calls:
        monkeypatch.setattr(sys, "argv", call)
        assert gpu_check.main() == 0
        shown.append([line.split()[:3] for line in capsys.readouterr().out.splitlines()])
    done, ok = ["environment:", "done", "before"], ["environment:", "ok"]
    assert [lines[0] == done for lines in shown] == [False, True, True, False, False]  # other sizes are another check
    assert [lines[0][:2] == ok for lines in shown] == [True, False, False, True, True]
    assert [lines[1][:2] for lines in shown[1:3]] == [["peer:", "ok"]] * 2  # it had no checkout, and may have one now


@pytest.mark.usefixtures("_importable")
def test_the_composition_of_a_score_by_hand() -> None:
    from score_composition import composition

    places = torch.tensor([0, 0, 1, 1, 1])
    oracle = torch.tensor([0.8, 0.05, 0.9, 0.3, 0.02]).double().log()
    model = torch.tensor([0.4, 0.4, 0.1, 0.1, 0.1]).double().log()
    form, between, facts, correlation, mean, median, highest, above, which = composition(model, oracle, places)
    assert (form, between, facts) == pytest.approx((math.log(0.2), math.log(0.1), math.log(0.2)))
    assert (mean, median, highest, above, which) == pytest.approx((25.0, 10.0, 40.0, 1, 0))  # oracle: 20 and 17.5 %
    assert -0.1 < correlation < 0.1
    assert composition(oracle, oracle, places)[3:] == pytest.approx([1.0, 18.77, 17.54, 20.0, 0.0, 0], abs=0.01)


@pytest.mark.usefixtures("_importable")
@pytest.mark.parametrize("shape", ["toy", "1m", "5m"])
def test_formulas_count_the_weights_of_the_model(shape: str) -> None:
    from cost_model import Model
    from shapes import random_llama

    from lightning_ssiuu.models.lora import LoRA

    model = random_llama(shape)
    assert Model(shape).parameters == sum(p.numel() for p in model.parameters())
    LoRA(r=4, target_modules=None).attach(model.hf)
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert Model(shape).adapters(4) == adapters


@pytest.mark.usefixtures("_importable")
@pytest.mark.parametrize("ssiuu", [False, True])
def test_formula_counts_the_arithmetic_of_a_step(ssiuu: bool) -> None:
    from cost_model import Model, Part, step_flops
    from scaling import Stepper

    part = Part(3, 16)
    run = Stepper("toy", part, ssiuu)
    # The plain kernel is all matrix products, which are counted; the fused one is not.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    assert counter.get_total_flops() == step_flops(Model("toy"), part, part, ssiuu, attention_factor=2)


@pytest.mark.usefixtures("_importable")
@pytest.mark.parametrize(("ssiuu", "ranks"), [(False, 8), (True, 1)])
def test_formula_for_memory_is_near_the_simulation(ssiuu: bool, ranks: int) -> None:
    from cost_model import CHUNK_CPU, Model, Part, Setup, memory_bytes
    from simulated import simulated_bytes

    # So many layers that the weights matter, so few tokens that nothing else does.
    part = Part(1, 32)
    setup = Setup(weight=4, optimizer=8, ranks=ranks, sharded=ranks > 1, chunk=CHUNK_CPU)
    moments = memory_bytes(Model("20m"), part, part, ssiuu, setup)
    assert max(moments.values()) == pytest.approx(simulated_bytes("20m", part, ssiuu, setup), rel=0.1)
    assert not torch.distributed.is_initialized()
