"""``torch_compile``: the same training, plain names, scores and attributions of the model itself, and refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.cli import SHORT, fit, refused
from toys.data import byte_tokenizer
from toys.models import bare_trainer, batch, distance, loader, random_model

from lightning_ssiuu import RMU, SSIUU, GradientDifference
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.compiling import compile_backend
from lightning_ssiuu.objectives import UnlearningModule
from lightning_ssiuu.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("few_facts")

graphs: list[int] = []


@torch._dynamo.register_backend
def counting(graph: Any, inputs: Any) -> Any:
    """Runs what it is given as it is; counts how often that was."""

    def run(*args: Any) -> Any:
        graphs.append(1)
        return graph.forward(*args)

    return run


@pytest.fixture(autouse=True)
def anew() -> None:
    torch._dynamo.reset()
    graphs.clear()


def trained(module: UnlearningModule, n_steps: int = 2) -> Any:
    model = AnswerModel(random_model(num_hidden_layers=1))
    module.adopt(model.train(), byte_tokenizer())
    bare_trainer(n_steps).fit(module, loader([batch(0)] * n_steps))
    return model


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def test_the_same_training() -> None:
    plain = trained(GradientDifference(optimizer=sgd))
    compiled = trained(GradientDifference(torch_compile="counting", optimizer=sgd))
    assert len(graphs) >= 4  # forget and retain part of two steps
    assert distance(list(plain.parameters()), list(compiled.parameters())) < 1e-10
    assert list(plain.state_dict()) == list(compiled.state_dict())


def test_looking_is_not_compiled() -> None:
    model = AnswerModel(random_model(num_hidden_layers=1)).train()
    model.compile_training("counting")
    some = {key: batch(0)["forget"][key] for key in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        model(**some)
    model.eval()(**some).logps.sum().backward()
    model.generate(input_ids=some["input_ids"], max_new_tokens=2)
    assert not graphs


def test_watched_layers_are_not_compiled() -> None:
    with pytest.warns(UserWarning, match="watches the model's layers"):
        compiled = trained(RMU(layer=0, torch_compile="counting", optimizer=sgd, seed=1, retain_weight=0.0))
    plain = trained(RMU(layer=0, optimizer=sgd, seed=1, retain_weight=0.0))
    assert distance(list(plain.parameters()), list(compiled.parameters())) < 1e-10


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torch_compile: got 'nope', allowed: true, false or a backend"):
        GradientDifference(torch_compile="nope")
    with pytest.raises(UserError, match="torch_compile: got 'counting', allowed: false with a regularizer"):
        trained(SSIUU(torch_compile="counting"))
    with pytest.raises(UserError, match="false with gradient_checkpointing"):
        trained(GradientDifference(torch_compile="counting", gradient_checkpointing=True))
    result = fit(tmp_path / "run", *SHORT, "--model.init_args.torch_compile", "eager")
    refused(result, "torch_compile", "a regularizer")
    assert not (tmp_path / "run").exists()
    assert compile_backend(True) == "inductor"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="without a C\\+\\+ compiler"):
        compile_backend(True)
    assert compile_backend("eager") == "eager"
    assert compile_backend(False) is None
