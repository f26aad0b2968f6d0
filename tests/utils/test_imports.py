"""What a command has no need of is not imported, and is there all the same when it is used."""

from __future__ import annotations

import subprocess
import sys

_HELP = """
import sys, contextlib, io
from lightning_ssiuu.__main__ import main
with contextlib.redirect_stdout(io.StringIO()) as told:
    assert main(["fit", "--help"]) == 0
assert "--stopping.score" in told.getvalue()
HEAVY = "accelerate bitsandbytes matplotlib pandas scipy sympy torchmetrics.functional transformers.modeling_utils"
HEAVY += " torch._dynamo.eval_frame torch.distributed.tensor"
assert not (loaded := [name for name in HEAVY.split() if name in sys.modules]), loaded

import torch
from lightning.fabric.wrappers import OptimizedModule
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
optimizer.step()
assert not isinstance(torch.nn.Linear(2, 2), OptimizedModule)
assert "torch._dynamo.eval_frame" not in sys.modules
called = []
once = torch.compiler.disable(lambda value: called.append(value) or torch.compiler.is_compiling())
assert once(1) is False

compiled = torch.compile(torch.nn.Linear(2, 2), backend="eager")
assert isinstance(compiled, OptimizedModule)
assert compiled(torch.ones(1, 2)).shape == (1, 2)
assert torch._dynamo.OptimizedModule is sys.modules["torch._dynamo.eval_frame"].OptimizedModule
assert once(2) is False and called == [1, 2]
import torch._dynamo.config, torch._dynamo.utils
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]

import torchmetrics
from torchmetrics import Metric
assert "torchmetrics.functional" not in sys.modules
from torchmetrics.text import BLEUScore
assert "torchmetrics.functional" in sys.modules
assert issubclass(BLEUScore, Metric) and torchmetrics.Metric is Metric
metric = torchmetrics.MeanMetric()
metric.update(1.0)
import matplotlib
matplotlib.use("agg")
figure, _ = metric.plot()
assert type(figure).__name__ == "Figure"
"""


def test_help_needs_no_compiler_and_no_model_and_both_are_there_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


_AWRY = """
import importlib, sys, threading, types
from lightning_ssiuu.utils.imports import put_off
put_off()
import torch, torchmetrics
assert "torchmetrics.functional" not in sys.modules and "torch._dynamo.eval_frame" not in sys.modules

class Module:
    def __call__(self, value):
        return torch.compiler.is_compiling()
inner = sys.modules["torchmetrics"].__spec__.loader
def fails(module):
    module.half = True
    raise ImportError("the library itself is broken")
real, inner.exec_module = inner.exec_module, fails
for _ in range(2):
    try:
        torchmetrics.MeanMetric
    except ImportError as error:
        assert "itself" in str(error), error
    else:
        raise AssertionError("it went through")
inner.exec_module = real

found = []
def ask(name):
    found.append(getattr(torchmetrics, name).__name__)
threads = [threading.Thread(target=ask, args=[name]) for name in ("MeanMetric", "Accuracy", "CatMetric")]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert sorted(found) == ["Accuracy", "CatMetric", "MeanMetric"], found

plot = importlib.import_module("torchmetrics.utilities.plot")
importlib.reload(torchmetrics)
importlib.reload(plot)
assert type(torchmetrics) is type(plot) is types.ModuleType
assert isinstance(torch.compiler.disable(torch.nn.Linear(2, 2)), torch.nn.Module)
assert isinstance(torch.compiler.disable(Module), type)
"""


def test_modules_that_wait_fail_reload_and_serve_threads_as_others_do() -> None:
    done = subprocess.run([sys.executable, "-c", _AWRY], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
