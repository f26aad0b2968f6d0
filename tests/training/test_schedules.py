"""Learning-rate schedules by name: the rates, what the Trainer tells them, and what is refused."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from toys.cli import SHORT, csv_logger, fit, refused
from toys.models import answer_model, bare_trainer, batch, loader

from lightning_ssiuu import GradientDifference
from lightning_ssiuu.training.schedules import SCHEDULES, find_schedule, make_schedule
from lightning_ssiuu.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("few_facts")


class Rates(torch.optim.SGD):
    """Notes the rate of each step."""

    def __init__(self, parameters: Any, seen: list[float]) -> None:
        super().__init__(parameters, lr=1.0)
        self.seen = seen

    def step(self, closure: Any = None) -> Any:
        self.seen.append(self.param_groups[0]["lr"])
        return super().step(closure)


def rates(n_steps: int, **options: Any) -> list[float]:
    seen: list[float] = []
    module = GradientDifference(optimizer=lambda parameters: Rates(parameters, seen), **options)
    module.adopt(answer_model().train(), None)  # type: ignore[arg-type]
    bare_trainer(n_steps).fit(module, loader([batch(1)] * n_steps))
    return seen


def test_rates_by_hand() -> None:
    assert rates(6, lr_scheduler="constant_with_warmup", warmup_steps=2) == [0.0, 0.5, 1, 1, 1, 1]
    assert rates(6, lr_scheduler="linear_with_warmup", warmup_steps=2) == [0.0, 0.5, 1, 0.75, 0.5, 0.25]
    assert rates(6, lr_scheduler="linear_with_warmup", warmup_steps=1 / 3) == [0.0, 0.5, 1, 0.75, 0.5, 0.25]
    assert rates(4, lr_scheduler="linear_with_warmup") == [1, 0.75, 0.5, 0.25]
    cosine = [0.0, 0.5, *(0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4))]
    assert rates(6, lr_scheduler="cosine_with_warmup", warmup_steps=2) == pytest.approx(cosine)


def test_functions_and_classes() -> None:
    path = "transformers.get_cosine_with_hard_restarts_schedule_with_warmup"
    named, given = (rates(5, lr_scheduler=one, warmup_steps=1) for one in (path, getattr(transformers, path[13:])))
    assert named == given
    assert rates(3, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)) == [1, 0.5, 0.25]


@pytest.mark.parametrize(
    ("options", "argument", "told"),
    [
        ({"lr_scheduler": "cosine"}, "lr_scheduler", "'cosine_with_warmup'"),
        ({"lr_scheduler": "liner_with_warmup"}, "lr_scheduler", "did you mean 'linear_with_warmup'"),
        ({"lr_scheduler": "math.pi"}, "lr_scheduler", "import path of a function"),
        ({"lr_scheduler": "torch.optim.lr_scheduler.StepLR"}, "lr_scheduler", "init_args for step_size"),
        ({"warmup_steps": 3}, "warmup_steps", "an lr_scheduler with a warm-up"),
        ({"lr_scheduler": "linear_with_warmup", "warmup_steps": -1}, "warmup_steps", "≥ 0"),
        ({"lr_scheduler": "linear_with_warmup", "warmup_steps": 2.5}, "warmup_steps", "a whole number"),
    ],
)
def test_mistakes(options: dict[str, Any], argument: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        GradientDifference(**options)
    assert error.value.argument == argument


def test_what_makes_no_schedule() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    for path in ("os.getpid", "os.path.basename", "builtins.id"):
        with pytest.raises(UserError, match=f"lr_scheduler: got '{path.rpartition('.')[2]}'"):
            make_schedule(find_schedule(path, 0) or str, optimizer, 0, lambda: 1)


def test_the_end_of_a_run_has_to_be_known() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    for name in SCHEDULES:
        schedule: Any = find_schedule(name, 0)
        with pytest.raises(UserError, match=r"trainer\.max_steps: got no limit"):
            make_schedule(schedule, optimizer, 3, lambda: math.inf)


def test_on_the_command_line(tmp_path: Path) -> None:
    named = ("--model.init_args.lr_scheduler", "linear_with_warmup", "--model.init_args.warmup_steps", "1")
    logged_to = csv_logger(tmp_path / "run")
    result = fit(tmp_path / "run", *SHORT, *named, *logged_to, "--trainer.callbacks", "LearningRateMonitor")
    assert result.status == 0, result.err
    [logged] = (tmp_path / "run").rglob("metrics.csv")
    with logged.open(encoding="utf-8") as file:
        seen = [float(row["lr-AdamW"]) for row in csv.DictReader(file) if row["lr-AdamW"]]
    assert seen == [0.0, 2e-4]
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    assert (written["lr_scheduler"], written["warmup_steps"]) == ("linear_with_warmup", 1.0)
    for path in ("os.system", "torch.nn.ReLU"):
        result = fit(tmp_path / "none", *SHORT, "--model.init_args.lr_scheduler", path)
        refused(result, "lr_scheduler", path.rpartition(".")[2], "what makes a schedule of an optimiser")
    result = fit(tmp_path / "none", *SHORT, "--model.init_args.lr_scheduler", "cosine")
    refused(result, "model.init_args.lr_scheduler", "linear_with_warmup", "did you mean 'cosine_with_warmup'")
    assert not (tmp_path / "none").exists()


def test_functions_of_transformers_by_path(tmp_path: Path) -> None:
    path = "transformers.get_cosine_schedule_with_warmup"
    for run, name in (("path", path), ("name", "cosine_with_warmup")):
        named = ("--model.init_args.lr_scheduler", name, "--model.init_args.warmup_steps", "1")
        result = fit(tmp_path / run, *SHORT, *named)
        assert result.status == 0, result.err
    written = yaml.safe_load((tmp_path / "path" / "config.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    assert written["lr_scheduler"] == path
    models = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("path", "name")]
    assert models[0] == models[1]
