"""Numbers that are none: a run that diverged ends with an error that says when, and leaves what was good before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys.cli import FAST, attacking, command, files, fit, read_json, refused
from toys.models import answer_model, bare_trainer, loader
from toys.models import batch as toy_batch
from toys.training import FewFacts

from lightning_ssiuu.callbacks import ForgetThresholdStopping, KeepCheckpoints, RunReport, SavePretrained
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.export import save_pretrained
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.objectives import UnlearningModule
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.objectives.losses import answer_nll
from lightning_ssiuu.objectives.sam import SAM
from lightning_ssiuu.utils.errors import NotFinite, UserError

RATE = "--model.init_args.optimizer.init_args.lr"


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one weight that is NaN."""
    folder, model = tmp_path_factory.mktemp("broken") / "model", load_model("tiny")
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    save_pretrained(model, load_tokenizer("tiny"), folder)
    return folder


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        (("fit", "--model", "SSIUU", "--model.checkpoint", "{}", "--data", "Facts"), "checkpoint"),
        (("attack", "--model", "{}"), "model"),
        (("audit", "--original", "{}", "--unlearned", "tiny"), "original"),
        (("audit", "--original", "tiny", "--unlearned", "{}", "--probe_examples", "2"), "unlearned"),
        (("utility", "--model", "{}"), "model"),
        (("privacy", "--model", "tiny", "--oracle", "{}", "--gradient_norm", "false"), "oracle"),
    ],
)
def test_a_model_with_a_weight_that_is_none(
    given: tuple[str, ...], argument: str, broken: Path, tmp_path: Path
) -> None:
    where = "--trainer.default_root_dir" if given[0] == "fit" else "--output"
    result = command(*(word.format(broken) for word in given), where, tmp_path / "out")
    refused(result, argument, "finite", "1 tensors, first model.layers.1.mlp.down_proj.weight")
    assert not files(tmp_path)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_weights(value: float, precision: torch.dtype) -> None:
    from lightning_ssiuu.models.checks import check_weights

    model = answer_model().to(precision)
    check_weights(model, "x")
    next(model.parameters()).data.view(-1)[7] = value
    with pytest.raises(NotFinite, match=r"^checkpoint: got 'x', allowed: a model whose weights are finite"):
        check_weights(model, "x")


@pytest.mark.parametrize("more", [(), ("--stopping.threshold", "null", "--trainer.max_steps", "1")])
def test_a_learning_rate_beyond_all_measure(more: tuple[str, ...], tmp_path: Path) -> None:
    result = fit(tmp_path / "run", *FAST, RATE, "1e30", *more)
    refused(result, "model.optimizer", "a run that diverged", "after step 1", "learning rate", "precision")
    assert "before" not in result.out
    assert not {"metrics.json", "model/config.json"} & files(tmp_path / "run")


def test_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    """The third step breaks the weights: neither the checkpoint after it nor the model is written."""

    def jumping(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 1e33)

    module = GradientDifference(optimizer=sgd, lr_scheduler=jumping)
    keep = [KeepCheckpoints(every_n_steps=1), SavePretrained(), RunReport(print_table=False)]
    trainer = bare_trainer(6, callbacks=keep, default_root_dir=tmp_path, enable_checkpointing=True)
    with pytest.raises(UserError, match=r"^model\.optimizer: got a run that diverged: .* after step 3"):
        trainer.fit(module, FewFacts())
    assert files(tmp_path) == {"checkpoints/step=2.ckpt"}
    state = torch.load(tmp_path / "checkpoints" / "step=2.ckpt", weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())


class Breaking(UnlearningModule):
    """Its forget loss, or that loss's gradient alone, is NaN from the second step on."""

    def __init__(self, what: str, **kwargs: Any) -> None:
        super().__init__(optimizer=sgd, **kwargs)
        self.what, self.asked = what, 0

    def forget_loss(self, batch: Any) -> torch.Tensor:
        loss = answer_nll(self.answers(batch))
        self.asked += 1
        if self.asked < 2:
            return loss
        return loss * torch.nan if self.what == "loss" else loss + (0 * loss).sqrt()


def trained(module: UnlearningModule, scaler: object = None) -> None:
    module.adopt(answer_model().train(), None)  # type: ignore[arg-type]
    trainer = bare_trainer(3)
    trainer.precision_plugin.scaler = scaler  # type: ignore[attr-defined]
    trainer.fit(module, loader([toy_batch(n) for n in range(3)]))


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_loss_that_is_none(weight: float) -> None:
    with pytest.raises(NotFinite, match="diverged: forget_loss is nan in step 2, allowed: a smaller learning rate"):
        trained(Breaking("loss", retain_weight=weight))


def test_a_gradient_that_is_none() -> None:
    with pytest.raises(NotFinite, match=r"diverged: gradients of \d+ tensors are NaN or infinite in step 2, first"):
        trained(Breaking("gradient"))


def test_a_scaler_of_losses_may_skip_a_step() -> None:
    """Such gradients are how it finds its scale; here nobody skips, so the weights are seen to be broken instead."""
    with pytest.raises(NotFinite, match=r"diverged: forget_loss is nan"):
        trained(Breaking("gradient"), scaler=object())


def test_a_displaced_objective_is_looked_at_alike() -> None:
    with pytest.raises(NotFinite, match="diverged: forget_loss is nan in step"):
        trained(SAM(backbone=Breaking("loss"), optimizer=sgd))


@pytest.mark.parametrize("score", ["first_token", "all_tokens", "multiple_choice", "probability", "rouge_l"])
def test_a_score_of_a_model_without_numbers(score: str) -> None:
    model, data = AnswerModel(load_model("tiny")), FewFacts()
    next(model.parameters()).data[:] = torch.nan
    batches = [data.eval_dataloader("forget")]
    with pytest.raises(NotFinite, match=r"^checkpoint: got a model whose predictions are NaN or infinite"):
        evaluate(model, data.tokenizer, batches, [score])
    with pytest.raises(NotFinite, match=r"^model\.optimizer: got a run that diverged: after step 7 "):
        evaluate(model, data.tokenizer, batches, [score], step=7)


def test_stopping_is_not_fooled(tmp_path: Path) -> None:
    """Weights that stay finite, and give no finite logits."""

    class Breaks(GradientDifference):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            if self.global_step == 1:
                self.model.hf.lm_head.weight.data.fill_(3e17)
                self.model.hf.model.norm.weight.data.fill_(1e18)
                self.model.hf.model.norm.weight.data *= 1e4 / 1e3

    stop = ForgetThresholdStopping("all_tokens", 50.0)
    with pytest.raises(UserError, match=r"a run that diverged: "):
        bare_trainer(4, callbacks=[stop, SavePretrained()], default_root_dir=tmp_path).fit(
            Breaks(optimizer=sgd), FewFacts()
        )
    assert not stop.stopped
    assert not files(tmp_path)


def test_an_attack_that_diverges_names_its_rate(tmp_path: Path) -> None:
    options = attacking(learning_rates=[1e30], seeds=[0], p=[0.3], epochs=1)
    result = command("attack", "--model", "tiny", "--output", tmp_path, *options)
    refused(result, "attack.learning_rates", "got 1e+30", "unlearned model", "diverged", "step")
    assert "attack.json" not in files(tmp_path)


def test_a_rate_too_high_costs_no_other_result(tmp_path: Path) -> None:
    """Nor the epochs before it diverged, nor the model that is saved."""
    options = attacking(learning_rates=[1e-3, 1e30], seeds=[0], p=[0.3], epochs=1)
    result = command(
        "attack", "--model", "tiny", "--output", tmp_path, "--save_attacked", *options, "--control", "none"
    )
    assert result.status == 0, result.err
    assert "note: attack.learning_rates: got 1e+30" in result.err
    whole, cut = read_json(tmp_path / "attack.json")["curves"]
    assert (whole["epochs"], cut["epochs"], len(cut["forget_scores"])) == ([0, 1], [0], 1)
    assert whole["forget_scores"][0] == cut["forget_scores"][0]
    load_model(str(tmp_path / "attacked_harmful"))  # refused if it were not finite


def test_collapsed_is_said(tmp_path: Path) -> None:
    short = ("--stopping.threshold", "null", "--trainer.max_steps", "2", "--attribution.probe_examples", "0")
    result = fit(tmp_path / "run", *FAST, *short, RATE, "0.3")
    assert result.status == 0, result.err
    content = read_json(tmp_path / "run" / "metrics.json")
    assert content["collapsed"] is True
    assert content["after"]["retain_score"] < 5 < content["before"]["retain_score"]
    assert "Collapsed: the retain all tokens fell to chance" in " ".join(result.out.split())
    attack = ("--attack", "Sampling", *attacking(k=1, temperature=0.0, seeds=[0]))
    result = command("attack", "--model", tmp_path / "run" / "model", *attack)
    assert result.status == 0, result.err
    assert "The unlearned model has collapsed" in " ".join(result.out.split())
    assert read_json(tmp_path / "run" / "attack.json")["settings"]["sampling"]["collapsed"] is True
