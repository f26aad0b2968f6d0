"""What an objective was made with is in its checkpoint, and ``load_from_checkpoint`` makes the same one again."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import CSVLogger
from toys.cli import FAST, RECIPES, fit
from toys.data import Toy
from toys.models import bare_trainer, equal, weights

from lightning_ssiuu import NPO, SSIUU, AttributionRegularizer, GradientDifference, L2ToStart, Regularizer
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives import UnlearningModule, objectives
from lightning_ssiuu.regularizers.controls import Combined
from lightning_ssiuu.training.hyperparameters import hyperparameters, restored
from lightning_ssiuu.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("few_facts")


class Tempered(UnlearningModule):
    """As a user writes one: an option of its own, everything else handed on."""

    def __init__(self, temperature: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature = temperature

    def forget_loss(self, batch: Any) -> torch.Tensor:
        return self.answers(batch).mean_logps.mean() / self.temperature


class Everything(GradientDifference):
    """One that hands on by place."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Halve(Regularizer):
    def apply(self, model: torch.nn.Module) -> dict[str, float]:
        return {}


def saved(module: UnlearningModule, path: Path, **options: Any) -> Path:
    trainer = bare_trainer(1, **options)
    trainer.fit(module, Toy(batch_size=4, tokenizer="tiny"))
    trainer.save_checkpoint(path, weights_only=False)
    return path


SGD = partial(torch.optim.SGD, lr=0.1)


def test_an_objective_of_a_users_own(tmp_path: Path) -> None:
    step = partial(torch.optim.lr_scheduler.StepLR, step_size=3)
    module = Tempered(3.0, retain_weight=7.0, optimizer=SGD, lr_scheduler=step, regularizer=L2ToStart(0.3), scores=[])
    path = saved(module, tmp_path / "a.ckpt")
    for kind in (Tempered, UnlearningModule):  # the class itself, or whatever the checkpoint is of
        again = kind.load_from_checkpoint(path)
        assert type(again) is Tempered
        assert (again.temperature, again.retain_weight, again.scores) == (3.0, 7.0, [])
        assert isinstance(again.regularizer, L2ToStart)
        assert again.regularizer.weight == 0.3
        for name in ("optimizer", "lr_scheduler"):
            ours, theirs = getattr(module, name), getattr(again, name)
            assert (theirs.func, theirs.keywords) == (ours.func, ours.keywords)
        assert equal(weights(again), weights(module))
        assert dict(again.hparams) == dict(module.hparams)


def test_backbones_adapters_and_arguments_by_place(tmp_path: Path) -> None:
    penalty = AttributionRegularizer(0.2, "relative", passes="two")
    module = SSIUU(NPO(retain_weight=4.0, beta=0.3), penalty, lora=LoRA(r=2, alpha=3.0), optimizer=SGD)
    again = SSIUU.load_from_checkpoint(saved(module, tmp_path / "a.ckpt"))
    assert (type(again.backbone), again.retain_weight) == (NPO, 4.0)
    assert again.backbone.beta == 0.3  # type: ignore[union-attr]
    assert again.lora == LoRA(r=2, alpha=3.0)
    regularizer: Any = again.regularizer
    assert (regularizer.weight, regularizer.weight_mode, regularizer.passes) == (0.2, "relative", "two")
    assert equal(weights(again), weights(module))
    assert dict(Everything("tiny", SGD, None, 0.5).hparams)["forget_weight"] == 0.5


def test_what_is_given_replaces_what_was_saved(tmp_path: Path) -> None:
    path = saved(Tempered(3.0, checkpoint="tiny", optimizer=SGD, retain_weight=7.0), tmp_path / "a.ckpt")
    again = Tempered.load_from_checkpoint(path, checkpoint="tiny", retain_weight=2.0)
    assert (again.temperature, again.retain_weight) == (3.0, 2.0)


def test_what_has_no_plain_form_has_to_be_given(tmp_path: Path) -> None:
    module = Tempered(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), retain_weight=7.0)
    path = saved(module, tmp_path / "a.ckpt")
    with pytest.raises(
        UserError, match=r"optimizer: got 'function', allowed: .*load_from_checkpoint\(path, optimizer="
    ):
        Tempered.load_from_checkpoint(path)
    assert Tempered.load_from_checkpoint(path, optimizer=SGD).retain_weight == 7.0
    with pytest.raises(UserError, match=r"checkpoint_path: got .*Tempered.*, allowed: a checkpoint of SSIUU"):
        SSIUU.load_from_checkpoint(path)
    with pytest.raises(UserError, match="checkpoint"):
        Tempered.load_from_checkpoint(tmp_path / "none.ckpt")


def test_a_checkpoint_without_hyperparameters_says_so(tmp_path: Path) -> None:
    content = torch.load(saved(Tempered(optimizer=SGD), tmp_path / "a.ckpt"), weights_only=True)
    for key in ("hyper_parameters", "objective_class"):
        del content[key]
    torch.save(content, tmp_path / "old.ckpt")
    with pytest.warns(UserWarning, match="holds no hyperparameters"):
        assert Tempered.load_from_checkpoint(tmp_path / "old.ckpt", retain_weight=3.0).retain_weight == 3.0


def test_a_checkpoint_makes_only_what_it_may(tmp_path: Path) -> None:
    """A class path in a checkpoint is looked up among known classes; nothing is imported, nothing else is called."""
    content = torch.load(saved(Tempered(optimizer=SGD), tmp_path / "a.ckpt"), weights_only=True)
    mark = tmp_path / "mark"
    for path in ("os.system", "subprocess.Popen", "this.Halve"):
        content["hyper_parameters"]["regularizer"] = {"class_path": path, "init_args": {"args": ["touch", str(mark)]}}
        torch.save(content, tmp_path / "bad.ckpt")
        with pytest.raises(UserError, match=f"regularizer: got '{path}', allowed: "):
            Tempered.load_from_checkpoint(tmp_path / "bad.ckpt")
    assert subprocess.Popen is not None
    assert not mark.exists()


def test_a_regulariser_without_options_takes_none() -> None:
    assert isinstance(Halve(), Halve)
    with pytest.raises(TypeError):
        Halve(weight=1.0)  # type: ignore[call-arg]


def test_regularisers_in_regularisers() -> None:
    module = GradientDifference(regularizer=Combined([L2ToStart(0.1), Halve()]))
    both: Any = restored(hyperparameters(module))["regularizer"]
    assert [type(one) for one in both.regularizers] == [L2ToStart, Halve]
    assert both.regularizers[0].weight == 0.1


@pytest.mark.parametrize("recipe", sorted((RECIPES / "objective").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_objective_as_the_command_line_makes_it(recipe: Path) -> None:
    objectives()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(UnlearningModule, "model", fail_untyped=False)
    for name in ("seed_everything", "data", "trainer", "stopping", "attribution", "saving", "report", "checkpoints"):
        parser.add_argument(f"--{name}", type=Any)
    module = parser.instantiate_classes(parser.parse_args([f"--config={recipe}"])).model
    written = hyperparameters(module)
    assert json.loads(json.dumps(written)) == written
    assert "not_saved" not in json.dumps(written)
    assert hyperparameters(type(module)(**restored(written))) == written


def test_loggers_get_them_and_a_refused_run_writes_none(tmp_path: Path) -> None:
    module = Tempered(3.0, optimizer=SGD, retain_weight=7.0)
    logger = CSVLogger(tmp_path, version=0)
    saved(module, tmp_path / "a.ckpt", logger=logger)
    file = tmp_path / "lightning_logs" / "version_0" / "hparams.yaml"
    again = Tempered.load_from_checkpoint(tmp_path / "a.ckpt", hparams_file=file)
    assert (again.temperature, again.retain_weight) == (3.0, 7.0)
    assert "7.0" in file.read_text(encoding="utf-8")
    high = ("--stopping.score", "probability", "--stopping.threshold", "99.99")
    refused = fit(tmp_path / "run", *FAST, *high)
    assert refused.status == 2
    assert not list(tmp_path.rglob("run/**/hparams.yaml"))


def test_a_checkpoint_of_the_command_line(tmp_path: Path) -> None:
    own = ("--model.init_args.retain_weight", "3.5", "--checkpoints.every_n_steps", "1", "--stopping.threshold", "null")
    assert fit(tmp_path / "run", *FAST, *own, "--trainer.max_steps", "2").status == 0
    [path] = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    again = UnlearningModule.load_from_checkpoint(path)
    assert type(again) is SSIUU
    assert again.retain_weight == 3.5
    assert again.optimizer.keywords["lr"] == 2e-4  # type: ignore[attr-defined]
    assert (again.regularizer.weight, again.regularizer.anchor) == (0.1, "previous")  # type: ignore[union-attr]
