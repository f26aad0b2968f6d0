"""Under which conditions SSIUU's penalty changes what a relearning attack finds: one condition after another.

    python benchmarks/penalty_conditions.py [--only a b ...] [--seeds 0 1 2] [--budget MINUTES] [--output DIR]
    python benchmarks/penalty_conditions.py --checkpoint DIR --forget FILE --retain FILE [--test FILE] --rate 2e-5 ...
    python benchmarks/penalty_conditions.py --per_step 4 --batch 4 --retain_batch 4 --checkpoint DIR --forget FILE ...

Every run is stopped by the forget probability, looked at after every step, and then set, between the weights before and
after the last one, to exactly ``--level`` percent: what is compared has forgotten equally. Each is then attacked
(``recipes/attack/harmful.yaml`` without its smallest rate and scored after every other epoch, by probability on the
disjoint remainder; the highest score over rates and epochs, mean over attack seeds); runs that did not come down to the
level in ``--max_steps`` are counted and not compared. Finished runs in ``--output`` are
kept, so a command that was ended goes on; ``--budget`` begins no run after so many minutes. The differences to gradient
difference with the same optimiser and data are paired by training seed, with the 95 % interval of Student's t.
``--per_step`` trains nothing but a few steps of gradient difference, and prints what the penalty's gradients, to first
order and exact, would be in each.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
from penalty_arms import ARMS, COMPARED, OPTIMIZERS, Arm, orthogonal
from penalty_tables import place_of, reached, report
from robustness.matching import met
from timing import markdown
from torch import Tensor

from lightning_ssiuu import CustomData, Facts, GradientDifference, Harmful
from lightning_ssiuu.attacks.base import Target
from lightning_ssiuu.callbacks import UpdateSigns
from lightning_ssiuu.evaluation.scorer import evaluate, untouched
from lightning_ssiuu.models.export import save_pretrained
from lightning_ssiuu.regularizers import AttributionRegularizer, Regularizer
from lightning_ssiuu.training.devices import Devices, quiet_lightning
from lightning_ssiuu.training.shards import snapshot
from lightning_ssiuu.utils.files import write_json


class Matched(L.Callback):
    """Ends training at a forget probability, to a tenth of a percent, between the last two steps' weights."""

    def __init__(self, level: float, tolerance: float = 0.05) -> None:
        self.level, self.tolerance = level, tolerance
        self.before: list[Tensor] = []
        self.figures: list[dict[str, float]] = []
        self.passed: float | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = snapshot(pl_module.model.parameters())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        found = {k.removeprefix("train/"): float(v) for k, v in trainer.callback_metrics.items() if "train/" in k}
        self.figures.append(found)
        # No step makes a quarter of the probability of the batch before it.
        if 100 * math.exp(found["forget_loss"]) > 4 * self.level:
            return
        self.figures[-1]["forget"] = probability = self._probability(trainer, pl_module)
        if probability > self.level:
            return
        self.passed, parameters = probability, list(pl_module.model.parameters())
        score = partial(self._probability, trainer, pl_module)
        met(parameters, self.before, snapshot(parameters), score, self.level, self.tolerance)
        trainer.should_stop = True

    @staticmethod
    def _probability(trainer: L.Trainer, pl_module: Any) -> float:
        with untouched(pl_module.model):
            loader = trainer.datamodule.eval_dataloader("forget")  # type: ignore[attr-defined]
            return evaluate(pl_module.model, pl_module.tokenizer, [loader], ["probability"])["forget"]["probability"]


def data_of(options: argparse.Namespace, seed: int, **more: Any) -> Any:
    """The data module."""
    sizes = {"batch_size": options.batch, "retain_batch_size": options.retain_batch, "seed": seed}
    given = {**sizes, **more, "tokenizer": options.checkpoint}
    if options.forget is None:
        return Facts(**given)
    return CustomData(options.forget, options.retain, options.test, **given)


def objective_of(options: argparse.Namespace, arm: Arm, regularizer: Regularizer | None) -> Any:
    """Gradient difference with what the arm adds to it."""
    make, given, factor, _ = OPTIMIZERS[arm.optimizer]
    return GradientDifference(
        checkpoint=options.checkpoint,
        optimizer=lambda parameters: make(parameters, lr=options.rate * factor / arm.slower, **given),
        retain_weight=options.retain_weight,
        regularizer=regularizer,
    )


def trained(
    options: argparse.Namespace, arm: Arm, seed: int, regularizer: Any, callbacks: list[Any], steps: int
) -> Any:
    """The objective after training, and its data module."""
    L.seed_everything(seed, verbose=False)
    module, data = objective_of(options, arm, regularizer), data_of(options, seed, **arm.data)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    clip = OPTIMIZERS[arm.optimizer][3]
    with quiet_lightning():
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=steps, callbacks=callbacks, gradient_clip_val=clip, **quiet
        )
        trainer.fit(module, datamodule=data)
    return module, data


def fit(options: argparse.Namespace, arm: Arm, seed: int, folder: Path) -> None:
    """Unlearn once and save."""
    penalty = arm.regularizer
    matched, begin = Matched(options.level if arm.level is None else arm.level), time.process_time()
    signs = [UpdateSigns(options.signs)] if penalty is not None else []
    module, data = trained(options, arm, seed, penalty, [matched, *signs], options.max_steps)
    loaders = [loader for split in ("forget", "retain", "test") if (loader := loader_of(data, split)) is not None]
    scores = {
        s: each["probability"] for s, each in evaluate(module.model, module.tokenizer, loaders, ["probability"]).items()
    }
    save_pretrained(module.model.hf, module.tokenizer, folder / "model")
    row = {"arm": asdict(arm), "seed": seed, "steps": len(matched.figures), "passed": matched.passed, "scores": scores}
    write_json(folder / "fit.json", {**row, "cpu_seconds": time.process_time() - begin, "figures": matched.figures})


def loader_of(data: Any, split: str) -> Any:
    """The evaluation batches of a split, if there is one."""
    return data.eval_dataloader(split) if getattr(data.splits, split) else None


def attack(options: argparse.Namespace, arm: Arm, seed: int, folder: Path, name: str, score: str, **given: Any) -> None:
    """Attack what was saved, once."""
    if (folder / f"{name}.json").is_file():
        return
    settings = {"p": [0.1, 0.3], "learning_rates": options.attack_rates, "seeds": options.attack_seeds, **given}
    method, devices = Harmful(epochs=options.attack_epochs, every_n_epochs=2, batch_size=8, **settings), Devices("cpu")
    with devices.launched():
        targets = [Target("model", str(folder / "model"), devices)]
        curves = method.run(targets, data_of(options, seed, **arm.data), score, devices)
    write_json(folder / f"{name}.json", {"score": score, "curves": [asdict(curve) for curve in curves]})


class Beside(Regularizer):
    """Measures two forms of the penalty in every step and changes nothing."""

    def __init__(self, **options: Any) -> None:
        given = {"weight": 1.0, "weight_mode": "relative", **options}
        self.forms = {d: AttributionRegularizer(derivative=d, **given) for d in ("first_order", "exact")}
        self.rows: list[dict[str, float]] = []

    @property
    def differentiates(self) -> bool:
        return any(form.differentiates for form in self.forms.values())

    def collect(self, model: Any, answers: Any, part: Any) -> None:
        for form in self.forms.values():
            form.collect(model, answers, part)

    def apply(self, model: Any) -> dict[str, float]:
        trained = [p for p in model.parameters() if p.requires_grad]
        own, row, pushes = [p.grad.clone() for p in trained], dict[str, float](), []
        for name, form in self.forms.items():
            begin = time.process_time()
            row |= {f"{name} {key}": value for key, value in form.apply(model).items()}
            row[f"{name} cpu_seconds"] = time.process_time() - begin
            pushes.append(torch.cat([(p.grad - v).flatten() for p, v in zip(trained, own, strict=True)]))
            torch._foreach_copy_([p.grad for p in trained], own)
        loss = torch.cat([v.flatten() for v in own])
        for name, push in zip(self.forms, pushes, strict=True):
            row[f"{name} outweighs"] = 100 * float((push.abs() > loss.abs()).double().mean())
        if all(push.any() for push in pushes):
            row["cosine"] = float(torch.nn.functional.cosine_similarity(*pushes, dim=0))
        self.rows.append(row)
        return row


def per_step(options: argparse.Namespace) -> None:
    """A few steps of gradient difference, and the penalty's gradients beside the loss's."""
    beside = Beside(target=options.target)
    trained(options, Arm(), options.seeds[0], beside, [], options.per_step)
    first = beside.forms["first_order"].target
    rows = []
    for number, row in enumerate(beside.rows):
        if "cosine" not in row:
            continue
        gap = row["exact log10_penalty_ratio"] - row["first_order log10_penalty_ratio"]
        cells = [
            number,
            math.exp(row.get("exact max_log_probability", math.nan)),
            row["first_order objective_participation"],
        ]
        for name in ("first_order", "exact"):
            cells += [row[f"{name} {key}"] for key in ("log10_penalty_ratio", "penalty_participation", "outweighs")]
        rows.append([f"{value:.3g}" for value in (*cells, 10**gap, row["cosine"], row["exact cpu_seconds"])])
    named = ["step", "highest P", "participation, loss %"]
    named += [
        f"{name}: {key}"
        for name in ("first order", "exact")
        for key in ("log10 ratio", "participation %", "outweighs %")
    ]
    print(f"target {first}\n\n" + markdown([*named, "exact / first order", "cosine", "CPU s of exact"], rows))


def run_all(options: argparse.Namespace) -> None:
    """Every run that is wanted and not there, condition by condition."""
    end = time.monotonic() + 60 * options.budget
    chosen = [arm for letter in options.only for arm in ARMS.get(letter, [])[: options.first]]
    for arm in {str(arm): arm for own in chosen for arm in (own.control, own)}.values():
        for seed in options.seeds:
            if time.monotonic() > end:
                return
            folder = place_of(options, arm, seed)
            if not (folder / "fit.json").is_file():
                fit(options, arm, seed, folder)
            if reached(folder):
                attack(options, arm, seed, folder, "attack", "probability")
            print(arm, seed, flush=True)
    others: dict[str, tuple[str, str, dict[str, Any]]] = {
        "g": ("wide", "probability", {"learning_rates": options.wide_rates}),
        "f": ("choice", "multiple_choice", {}),
    }
    for name, score, more in (others[letter] for letter in options.only if letter in others):
        for arm, seed in product(COMPARED, options.seeds):
            folder = place_of(options, arm, seed)
            if (folder / "fit.json").is_file() and reached(folder) and time.monotonic() < end:
                attack(options, arm, seed, folder, name, score, **more)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*ARMS, "g", "f"], choices=[*ARMS, "g", "f"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--output", type=Path, default=Path("runs/penalty"))
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes after which no run begins")
    parser.add_argument("--first", type=int, help="so many arms of every condition, the most telling ones, alone")
    parser.add_argument("--report_only", action="store_true")
    parser.add_argument("--level", type=float, default=10.0, help="forget probability of what is compared, percent")
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--signs", type=int, default=5, help="steps between two looks at changed signs")
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--forget", help="JSON lines with question and answer; default: the embedded facts")
    parser.add_argument("--retain")
    parser.add_argument("--test")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--retain_batch", type=int, default=36)
    parser.add_argument("--rate", type=float, default=2e-4, help="AdamW's learning rate; the others' are parts of it")
    parser.add_argument("--retain_weight", type=float, default=5.0)
    parser.add_argument("--attack_rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--wide_rates", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--attack_seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--attack_epochs", type=int, default=10)
    parser.add_argument(
        "--per_step", type=int, default=0, help="steps of gradient difference to measure, and nothing else"
    )
    parser.add_argument("--target", default="sequence", help="of --per_step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        torch.optim._muon._zeropower_via_newtonschulz = orthogonal
    if options.per_step:
        per_step(options)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.report_only:
        run_all(options)
    report(options)


if __name__ == "__main__":
    main()
