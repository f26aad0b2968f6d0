"""A run that unlearns further than its threshold ends at it, with a part of its update, and nothing else differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from toys.interrupted import Kill, KilledError
from toys.models import bare_trainer
from toys.training import FewFacts, fit

from lightning_ssiuu import GradientDifference
from lightning_ssiuu.callbacks import (
    ElicitedStop,
    ForgetThresholdStopping,
    KeepCheckpoints,
    NeuronAttributionCallback,
    RunReport,
    SavePretrained,
    WalkBack,
)
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.training.checkpoints import newest_checkpoint
from lightning_ssiuu.utils.errors import UserError


def slow(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-4)


def stopping(walk: WalkBack | None, **kwargs: Any) -> ForgetThresholdStopping:
    return ForgetThresholdStopping("probability", 20.0, walk_back=walk, **kwargs)


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.model.named_parameters() if p.requires_grad}


def score(module: Any, split: str = "forget") -> float:
    loader = FewFacts().eval_dataloader(split)
    return evaluate(module.model, module.tokenizer, [loader], ["probability"])[split]["probability"]


def test_a_run_ends_at_its_threshold_with_a_part_of_its_update(tmp_path: Path) -> None:
    plain = GradientDifference(optimizer=slow)
    steps = fit(plain, [stopping(None)], tmp_path / "plain", 20).global_step
    module, stop = GradientDifference(optimizer=slow), stopping(WalkBack(overshoot=0.25, keep=0.3))
    callbacks = [stop, SavePretrained(), RunReport(print_table=False)]
    further = fit(module, callbacks, tmp_path / "walked", 20)
    assert further.global_step > steps
    assert stop.stopped
    assert stop.walked_back is not None
    scale, keep, _ = stop.walked_back
    assert keep == 0.3
    assert stop.value == pytest.approx(score(module), rel=1e-6)
    assert 20.0 > stop.value > 19.0 > score(plain)  # the search ends near the threshold, one step need not
    # The weights are the original's but for the largest three tenths of the changes, which are scaled alike.
    end = GradientDifference(optimizer=slow)
    fit(end, [], tmp_path / "end", further.global_step)
    original = dict(load_model("tiny").named_parameters())
    before = torch.cat([original[name.removeprefix("hf.")].detach().flatten() for name in weights(module)])
    walked, whole = (torch.cat([w.flatten() for w in weights(each).values()]) - before for each in (module, end))
    kept = walked != 0
    assert int(kept.sum()) == pytest.approx(0.3 * len(kept), rel=0.01)
    assert whole[kept].abs().min() >= whole[~kept].abs().max()
    torch.testing.assert_close(walked[kept], scale * whole[kept], rtol=1e-3, atol=1e-7)
    # What is saved and reported is what there is in the end.
    saved = GradientDifference(checkpoint=str(tmp_path / "walked" / "model"))
    saved.configure_model()
    assert all(torch.equal(a, b) for a, b in zip(weights(saved).values(), weights(module).values(), strict=True))
    metrics = json.loads((tmp_path / "walked" / "metrics.json").read_text())
    assert metrics["walked_back"] == {"scale": scale, "keep": keep, "averaged": False}
    assert metrics["stopped_by"] == "probability <= 20 %, walked back"
    assert metrics["after"]["forget_score"] == stop.value
    # More of what the model knew is left than at the same score without it.
    assert score(module, "test") > score(plain, "test")


def test_what_comes_back_counts_too(tmp_path: Path) -> None:
    adversary = ElicitedStop(share=0.25, learning_rate=5e-4, steps=4)
    alone, both = stopping(WalkBack(0.25)), stopping(WalkBack(0.25), elicited=adversary)
    for name, stop in (("alone", alone), ("both", both)):
        fit(GradientDifference(optimizer=slow), [stop], tmp_path / name, 25)
    assert (both.ended_by, alone.ended_by) == ("elicited", "threshold")
    assert both.elicited_value is not None
    assert both.value is not None
    assert both.elicited_value <= 20 >= both.value
    assert alone.value is not None
    assert both.value < alone.value
    assert both.why() == "elicited probability <= 20 %, walked back"


@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_an_interrupted_run_walks_back_to_the_same_weights(decay: float, tmp_path: Path) -> None:
    ends = []
    for kills in ((), (3, 6)):
        folder = tmp_path / str(len(kills))
        for kill in (*kills, None):
            L.seed_everything(0, verbose=False)
            module, stop = GradientDifference(optimizer=slow), stopping(WalkBack(overshoot=0.25, ema_decay=decay))
            callbacks = [stop, KeepCheckpoints(2), *([] if kill is None else [Kill(kill)])]
            resume = newest_checkpoint(folder / "checkpoints")
            trainer = bare_trainer(20, callbacks=callbacks, default_root_dir=folder, enable_checkpointing=True)
            try:
                trainer.fit(module, FewFacts(), ckpt_path=resume)
            except KilledError:
                continue
        ends.append((stop.walked_back, weights(module)))
    (a, first), (b, second) = ends
    assert a == b
    assert a is not None
    assert a.averaged == (decay > 0)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_steps_that_are_over_before_it(tmp_path: Path) -> None:
    steps = fit(GradientDifference(optimizer=slow), [stopping(None)], tmp_path, 20).global_step
    module, walking = GradientDifference(optimizer=slow), stopping(WalkBack(overshoot=0.01, keep=1.0))
    assert fit(module, [walking], tmp_path, steps).global_step == steps
    assert (walking.stopped, walking.value) == (True, pytest.approx(score(module), rel=1e-6))
    assert walking.walked_back is not None
    assert walking.walked_back[0] < 1
    with pytest.warns(UserWarning, match="training ended before"):
        fit(GradientDifference(optimizer=slow), [never := stopping(WalkBack())], tmp_path, 1)
    assert (never.stopped, never.walked_back) == (False, None)


@pytest.mark.parametrize("name", ["rouge_l", "probability"])
def test_scores_that_are_known_only_when_all_is_seen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_ssiuu.evaluation.scorer.Percentage", type(None))  # none ends early
    module, stop = GradientDifference(optimizer=slow), ForgetThresholdStopping(name, 40.0, walk_back=WalkBack(0.5))
    fit(module, [stop, RunReport(print_table=False)], tmp_path, 25)
    assert stop.walked_back is not None
    assert json.loads((tmp_path / "metrics.json").read_text())["after"]["scores"]["forget"][name] == stop.value
    assert stop.value is not None
    assert 0 < stop.value <= 40


class Stop(L.Callback):
    """Ends a run after a step, as a callback behind the stopping may."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop |= trainer.global_step == self.step


def test_runs_that_end_for_other_reasons(tmp_path: Path) -> None:
    plain = fit(GradientDifference(optimizer=slow), [stopping(None)], tmp_path, 20).global_step
    ends: dict[str, Any] = {
        "off a look": ({"every_n_steps": 50}, [], {"steps": plain}),
        "by another callback": ({}, [Stop(plain)], {"steps": 50}),
        "when it may": ({}, [], {"steps": 50, "min_steps": plain + 3}),
    }
    for name, (options, more, trainer) in ends.items():
        module = GradientDifference(optimizer=slow)
        stop = stopping(WalkBack(overshoot=0.4 if name == "when it may" else 0.01), **options)
        fit(module, [stop, *more], tmp_path, **trainer)
        assert stop.walked_back is not None, name
        assert (stop.stopped, stop.value) == (True, pytest.approx(score(module), rel=1e-6)), name
        assert 15 < score(module) <= 20, name


def test_whoever_looks_in_the_end_sees_what_there_is(tmp_path: Path) -> None:
    found = []
    for every, is_first in ((None, True), (1, True), (1, False)):
        attribution = NeuronAttributionCallback(2, every_n_steps=every, target="length_normalised", write=False)
        stop, folder = stopping(WalkBack(overshoot=0.25)), tmp_path / f"{every}{is_first}"
        both: list[Any] = [attribution, stop] if is_first else [stop, attribution]
        logger = CSVLogger(folder)
        fit(GradientDifference(optimizer=slow), [*both, RunReport(print_table=False)], folder, 20, logger=logger)
        after = json.loads((folder / "metrics.json").read_text())["after"]
        found.append((after["elicited"], after["influence"], attribution.history[-1]))
        assert [entry["step"] for entry in attribution.history] == sorted({e["step"] for e in attribution.history})
        logged = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        column = logged[0].split(",").index("stopping/probability")
        assert float([line.split(",")[column] for line in logged[1:] if line.split(",")[column]][-1]) == stop.value
    assert found[0] == found[1] == found[2]


def test_a_checkpoint_of_the_last_step_or_later_ends_with_the_same_weights(tmp_path: Path) -> None:
    module, stop = GradientDifference(optimizer=slow), stopping(WalkBack(overshoot=0.25))
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=1)
    trainer = fit(module, [stop, keep], tmp_path, 20, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for path in (tmp_path / "kept" / "last.ckpt", tmp_path / "after.ckpt"):
        again, later = GradientDifference(optimizer=slow), stopping(WalkBack(overshoot=0.25))
        resumed = bare_trainer(20, callbacks=[later], default_root_dir=tmp_path / "again")
        resumed.fit(again, FewFacts(), ckpt_path=path)
        assert resumed.global_step == trainer.global_step
        assert (later.walked_back, later.value) == (stop.walked_back, stop.value)
        assert all(torch.equal(a, b) for a, b in zip(weights(module).values(), weights(again).values(), strict=True))


def test_a_callback_that_is_used_again(tmp_path: Path) -> None:
    stop, found = stopping(WalkBack(overshoot=0.25)), []
    for _ in range(2):
        module = GradientDifference(optimizer=slow)
        fit(module, [stop], tmp_path, 20)
        found.append((stop.walked_back, stop.value, score(module)))
    assert found[0] == found[1]


def test_adapters_are_scaled_by_one_of_their_factors(tmp_path: Path) -> None:
    def adapted() -> GradientDifference:
        torch.manual_seed(0)
        return GradientDifference(optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), lora=LoRA(r=4, alpha=8.0))

    module, stop = adapted(), stopping(WalkBack(overshoot=0.25))
    steps = fit(module, [stop], tmp_path / "walked", 30).global_step
    end = adapted()
    fit(end, [], tmp_path / "end", steps)
    assert stop.walked_back is not None
    (scale, keep, _), walked = stop.walked_back, weights(module)
    assert keep == 1
    assert 0 < scale < 1
    assert stop.value is not None
    assert 19 < stop.value <= 20
    for name, whole in weights(end).items():
        torch.testing.assert_close(walked[name], scale * whole if "lora_B" in name else whole)


class Averages(L.Callback):
    """Averages the weights itself."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.before, self.average, self.step = weights(pl_module), weights(pl_module), 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            for name, now in weights(pl_module).items():
                self.average[name] = self.decay * self.average[name] + (1 - self.decay) * now


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}])
def test_an_average_is_scaled_where_it_meets_the_rule(options: dict[str, Any], tmp_path: Path) -> None:
    module, stop, own = GradientDifference(optimizer=slow), stopping(WalkBack(0.2, 1.0, ema_decay=0.6)), Averages(0.6)
    fit(module, [stop, own], tmp_path, 40, **options)
    assert stop.walked_back is not None
    scale, keep, averaged = stop.walked_back
    assert (keep, averaged) == (1.0, True)
    assert stop.value is not None
    assert 19 < stop.value <= 20
    for name, walked in weights(module).items():
        expected = own.before[name] + scale * (own.average[name] - own.before[name])
        torch.testing.assert_close(walked, expected, atol=1e-6, rtol=1e-5)


def test_an_average_that_lags_too_far_is_not_used(tmp_path: Path) -> None:
    ends = []
    for decay in (0.0, 0.999):
        module, stop = GradientDifference(optimizer=slow), stopping(WalkBack(overshoot=0.25, ema_decay=decay))
        fit(module, [stop], tmp_path, 20)
        ends.append((stop.walked_back, weights(module)))
    (a, first), (b, second) = ends
    assert a == b
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_average_goes_with_its_run_alone(tmp_path: Path) -> None:
    def run(stop: ForgetThresholdStopping, steps: int, start: Path | None = None) -> tuple[Any, Any]:
        L.seed_everything(0, verbose=False)
        module = GradientDifference(optimizer=slow)
        trainer = bare_trainer(steps, callbacks=[stop], default_root_dir=tmp_path)
        trainer.fit(module, FewFacts(), ckpt_path=start)
        if steps < 20:
            trainer.save_checkpoint(tmp_path / "4.ckpt")
        return stop.walked_back, weights(module)

    def averaging(decay: float = 0.6) -> ForgetThresholdStopping:
        return stopping(WalkBack(overshoot=0.25, ema_decay=decay))

    expected = run(averaging(), 20)
    assert expected[0] is not None
    with pytest.warns(UserWarning, match="training ended before"):
        run(averaging(), 4)
    used = averaging()
    module = GradientDifference(optimizer=slow)
    bare_trainer(1, callbacks=[used], default_root_dir=tmp_path).validate(module, FewFacts(), tmp_path / "4.ckpt")
    ends = [
        run(used, 20),  # what it has seen is not its own
        run(averaging(), 20, tmp_path / "4.ckpt"),  # of a run that ended above its threshold
    ]
    for walked, found in ends:
        assert walked == expected[0]
        assert all(torch.equal(found[name], value) for name, value in expected[1].items())
    with pytest.warns(UserWarning, match="training ended before"):
        run(averaging(0.0), 4)
    with pytest.warns(UserWarning, match="the checkpoint has no average"):
        run(averaging(), 20, tmp_path / "4.ckpt")


def test_what_an_earlier_version_saved() -> None:
    stop = stopping(WalkBack())
    stop.load_state_dict({"value": 20.0, "level": 20.0, "looked_at": 9, "walked_back": (0.5, 0.3)})
    assert stop.walked_back == (0.5, 0.3, False)


def test_averaged_adapters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = GradientDifference(optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), lora=LoRA(r=4, alpha=8.0))
    stop, own = stopping(WalkBack(0.25, ema_decay=0.5)), Averages(0.5)
    fit(module, [stop, own], tmp_path, 30)
    assert stop.walked_back is not None
    scale, keep, averaged = stop.walked_back
    assert (keep, averaged) == (1.0, True)
    for name, walked in weights(module).items():
        expected = (scale if "lora_B" in name else 1.0) * own.average[name]
        torch.testing.assert_close(walked, expected, atol=1e-6, rtol=1e-5)


def test_bad_options(tmp_path: Path) -> None:
    for options in (
        {"overshoot": 0.0},
        {"overshoot": 1.1},
        {"keep": 0.0},
        {"keep": 2.0},
        {"looks": 0},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
    ):
        with pytest.raises(UserError, match=rf"^stopping\.walk_back\.{next(iter(options))}: "):
            WalkBack(**options)
    lengths = LoRA(r=2, options={"use_dora": True})
    with pytest.raises(UserError, match=r"^lora\.options\.use_dora: got True, allowed: false with stopping\.walk_back"):
        fit(GradientDifference(lora=lengths), [stopping(WalkBack(keep=1.0))], tmp_path, 1)
