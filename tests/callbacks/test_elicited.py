"""Stopping on what an adversary brings back: the score by hand, nothing moved, and when it ends a run and why."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from toys.models import bare_trainer, equal, example_log_probability, weights
from toys.training import FewFacts, fit, gpt2_with_dropout, ssiuu

from lightning_ssiuu.callbacks import ForgetThresholdStopping, RunReport
from lightning_ssiuu.callbacks.elicited import ElicitedLooks, ElicitedStop
from lightning_ssiuu.datamodules import RelearnDataModule
from lightning_ssiuu.evaluation.elicitation import Elicitation, elicited_score
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.utils.errors import NotFinite, UserError


def parts(data: RelearnDataModule, epochs: int) -> list[Any]:
    loader: Any = data.train_dataloader()
    found = []
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)
        found += [batch["retain"] for batch in loader]
    return found


def test_the_score_by_hand() -> None:
    data = RelearnDataModule(FewFacts(10), p=0.5, batch_size=3, seed=4)  # batches of 3 and 2
    model = AnswerModel(load_model("tiny", torch.float64))
    before = weights(model)
    adversary = Elicitation(learning_rate=1e-3, steps=3, batch_size=3)
    got = elicited_score(model, data.tokenizer, data, adversary)
    assert equal(before, weights(model))

    hf = copy.deepcopy(model.hf).eval()
    optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    for part in parts(data, 2)[:3]:
        rows = [example_log_probability(hf, part, row) for row in range(len(part["input_ids"]))]
        optimizer.zero_grad()
        (-sum(logp / length for logp, length in rows) / len(rows)).backward()
        optimizer.step()
    with torch.no_grad():
        scored = next(iter(data.eval_dataloader("forget")))["forget"]
        rows = [example_log_probability(hf, scored, row) for row in range(len(scored["input_ids"]))]
    assert len(rows) == 5
    want = 100 * sum((logp / length).exp().item() for logp, length in rows) / len(rows)
    assert got == pytest.approx(want, rel=1e-6)
    plain = evaluate(model, data.tokenizer, [data.scored_batches()], ["probability"])["forget"]["probability"]
    assert abs(got - plain) > 0.1  # three steps move something


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_all_is_as_it_was(lora: LoRA | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = AnswerModel(load_model("tiny")), RelearnDataModule(FewFacts(), p=0.5)
    if lora is not None:
        lora.attach(model.hf)
    model.train()
    model.hf.base_model.eval()  # modes may be mixed
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.grad = None if number % 2 else torch.full_like(parameter, 0.5)
    before, modes = weights(model), [module.training for module in model.modules()]
    gradients, drawn = [p.grad for p in model.parameters()], torch.get_rng_state()

    def unchanged() -> bool:
        kept = all(a is p.grad for a, p in zip(gradients, model.parameters(), strict=True))
        filled = all(bool((g == 0.5).all()) for g in gradients if g is not None)
        same_modes = modes == [module.training for module in model.modules()]
        return equal(before, weights(model)) and kept and filled and same_modes

    elicited_score(model, data.tokenizer, data, Elicitation(steps=2))
    assert unchanged()
    assert torch.equal(drawn, torch.get_rng_state())
    with pytest.raises(NotFinite, match=r"^elicited\.learning_rate: got 1e\+30, allowed: a rate"):
        elicited_score(model, data.tokenizer, data, Elicitation(learning_rate=1e30, steps=2))
    assert unchanged()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_ssiuu.evaluation.elicitation.evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        elicited_score(model, data.tokenizer, data, Elicitation(steps=2))
    assert unchanged()


class Ask(L.Callback):
    """Asks an adversary after every micro-batch."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        data = RelearnDataModule(trainer.datamodule, p=0.3)  # type: ignore[attr-defined]
        elicited_score(pl_module.model, pl_module.tokenizer, data, Elicitation(steps=1))


@pytest.mark.parametrize("lora", [None, LoRA(r=2, dropout=0.1)])
def test_training_goes_on_as_if_nobody_had_asked(lora: LoRA | None, tmp_path: Path) -> None:
    checkpoint = gpt2_with_dropout(tmp_path / "gpt2")
    ends = []
    for callbacks in ([], [Ask()]):
        L.seed_everything(0, verbose=False)
        module = ssiuu(checkpoint=checkpoint, lora=lora)
        fit(module, callbacks, tmp_path, 3, FewFacts(tokenizer=checkpoint), accumulate_grad_batches=2)
        ends.append(weights(module))
    assert equal(*ends)


#: At a level of 10: options, then per step the score at the weights (None: above), what comes back, and the ending.
RUNS: dict[str, tuple[dict[str, Any], list[tuple[float | None, float | None, str | None]]]] = {
    "first at or below": (
        {},
        [(None, None, None), (11, None, None), (9, 30, None), (8, 10.1, None), (8, 10, "elicited")],
    ),
    "two in a row": (
        {"looks": 2},
        [(9, 9, None), (9, 12, None), (9, 9, None), (11, None, None), (9, 9, None), (9, 9, "elicited")],
    ),
    "seldom": ({"every_n_steps": 3}, [(9, 30, None), (9, None, None), (9, None, None), (9, 9, "elicited")]),
    "floor": ({"floor": 0.5, "every_n_steps": 9}, [(9, 30, None), (5, None, None), (4.9, 30, "floor")]),
    "below the floor and erased": ({"floor": 0.5, "every_n_steps": 9}, [(9, 30, None), (4, 9, "elicited")]),
    "below the floor, not sure yet": ({"floor": 0.5, "looks": 2}, [(4, 9, None), (4, 9, "elicited")]),
}


@pytest.mark.parametrize("name", RUNS)
def test_when_it_ends(name: str) -> None:
    options, steps = RUNS[name]
    looks = ElicitedLooks(ElicitedStop(**options))
    for step, (value, back, ending) in enumerate(steps, 1):
        asked: list[float] = []

        def look(back: Any = back, asked: list[float] = asked) -> float:
            asked.append(back)
            return float(back)

        assert looks.judge(value, 10.0, step, look, 10.0) == ending, step
        assert asked == ([] if back is None else [back]), step
        again = ElicitedLooks(looks.options)
        again.load_state_dict(looks.state_dict())
        looks = again


def slow(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-4)


def run(folder: Path, steps: int, elicited: ElicitedStop | None) -> tuple[int, ForgetThresholdStopping, dict[str, Any]]:
    stop = ForgetThresholdStopping("probability", 20.0, elicited=elicited)
    report = RunReport(print_table=False)
    trainer = fit(GradientDifference(optimizer=slow), [stop, report], folder, steps)
    return trainer.global_step, stop, json.loads((folder / "metrics.json").read_text())


def test_a_run_goes_on_until_little_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, stop, _ = run(tmp_path / "plain", 12, None)
    assert stop.why() == "probability <= 20 %"
    steps, stop, metrics = run(tmp_path / "elicited", 12, ElicitedStop(share=0.25, learning_rate=5e-4))
    assert steps > plain
    assert (stop.stopped, stop.ended_by) == (True, "elicited")
    assert stop.elicited_value is not None
    assert stop.value is not None
    assert stop.value <= 20 >= stop.elicited_value
    assert metrics["stopped_by"] == "elicited probability <= 20 %"
    assert metrics["after"]["elicited"] == {stop.score: stop.elicited_value}

    strong = ElicitedStop(share=0.5, learning_rate=1e-3, floor=0.5)
    with pytest.warns(UserWarning, match=r"before elicited probability fell to 20 % \(last: "):
        ended, stop, metrics = run(tmp_path / "floor", 12, strong)
    assert plain <= ended < 12
    assert (stop.stopped, stop.ended_by) == (False, "floor")
    assert stop.value is not None
    assert stop.elicited_value is not None
    assert stop.value < 10 < 20 < stop.elicited_value
    assert metrics["stopped_by"].startswith("floor, not erased: probability < 10 %, elicited ")

    with pytest.warns(UserWarning, match=r"before probability fell to 20 %"):  # asked all the same, for the table
        _, stop, metrics = run(tmp_path / "short", 1, strong)
    assert metrics["after"]["elicited"] == {stop.score: stop.elicited_value}
    never = ForgetThresholdStopping(threshold=None, elicited=strong)
    assert fit(GradientDifference(optimizer=slow), [never], tmp_path / "never", 1).global_step == 1
    assert never.elicited_value == stop.elicited_value
    capsys.readouterr()
    stop, report = ForgetThresholdStopping("probability", 80.0, elicited=ElicitedStop(steps=1, looks=9)), RunReport()
    with pytest.warns(UserWarning, match="training ended before"):
        fit(GradientDifference(optimizer=slow), [stop, report], tmp_path / "table", 2)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "elicited" in line]
    assert row.split() == ["forget", "probability,", "elicited", f"{stop.elicited_value:.1f}", "%"]


def test_a_model_that_only_hides_may_be_begun_with(tmp_path: Path) -> None:
    hiding, module = (
        GradientDifference(optimizer=slow),
        GradientDifference(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)),
    )
    fit(hiding, [ForgetThresholdStopping("probability", 20.0)], tmp_path, 12)
    module.configure_model()
    module.model.load_state_dict(hiding.model.state_dict())
    strong = ElicitedStop(share=0.5, learning_rate=1e-3)
    with pytest.warns(UserWarning, match="elicited probability fell"):
        assert (
            fit(module, [ForgetThresholdStopping("probability", 20.0, elicited=strong)], tmp_path, 2).global_step == 2
        )
    weak = ElicitedStop(learning_rate=1e-9, steps=1)
    with pytest.raises(UserError, match=r"^stopping\.threshold: got '25', allowed: below .* elicited probability"):
        fit(module, [ForgetThresholdStopping("probability", 25.0, elicited=weak)], tmp_path, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"share": 0.0},
        {"share": 1.0},
        {"learning_rate": 0.0},
        {"steps": 0},
        {"batch_size": 0},
        {"every_n_steps": 0},
        {"looks": 0},
        {"floor": 1.1},
        {"floor": -0.1},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^stopping\.elicited\.{next(iter(options))}: "):
        ElicitedStop(**options)


def test_where_it_cannot_be_asked(tmp_path: Path) -> None:
    module, stop = GradientDifference(), ForgetThresholdStopping(elicited=ElicitedStop(share=0.05))
    with pytest.raises(
        UserError, match=r"^stopping\.elicited\.share: got 0\.05, allowed: a fraction that leaves items"
    ):
        fit(module, [stop], tmp_path)
    stop = ForgetThresholdStopping(elicited=ElicitedStop())
    with pytest.raises(UserError, match=r"^trainer\.precision: got '16-true', allowed: 32-true"):
        fit(module, [stop], tmp_path, precision="16-true")
    data = FewFacts()
    with pytest.raises(UserError, match=r"^data: got 'NoneType', allowed: an UnlearningDataModule"):
        bare_trainer(1, callbacks=[stop]).fit(module, data.train_dataloader(), data.val_dataloader())
    assert not module.is_loaded
    assert load_tokenizer("tiny") is not None
