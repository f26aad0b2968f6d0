"""``lightning-ssiuu attack``: a sweep of relearning attacks on a saved model, with its oracle beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import product
from typing import Literal

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from lightning_ssiuu.attacks.relearning import (
    RecoveryCurve,
    Snapshot,
    check_attack,
    curve_dicts,
    make_trainer,
    relearn,
    table,
)
from lightning_ssiuu.callbacks.save_pretrained import save_pretrained
from lightning_ssiuu.command_line import run_function
from lightning_ssiuu.datamodules import RelearnDataModule, UnlearningDataModule
from lightning_ssiuu.errors import UserError
from lightning_ssiuu.files import check_space, refuse_existing, write_json
from lightning_ssiuu.models import AnswerModel, load_model, load_tokenizer
from lightning_ssiuu.provenance import provenance
from lightning_ssiuu.runs import check_tokenizers, output_directory, resolve_models, run_data, run_score
from lightning_ssiuu.screen import hide_short_bars


def attack(
    model: str,
    oracle: str | None = None,
    data: UnlearningDataModule | None = None,
    kind: Literal["harmful", "benign"] = "harmful",
    p: Sequence[float] = (0.1, 0.3),
    learning_rates: Sequence[float] = (1e-5, 5e-6, 1e-6),
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 10,
    every_n_epochs: int = 1,
    batch_size: int = 8,
    score: str | None = None,
    benign_path: str | None = None,
    benign_size: int = 1000,
    output: str | None = None,
    save_attacked: bool = False,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> list[RecoveryCurve]:
    """Attack a saved model by relearning and write ``attack.json``.

    Args:
        model: The unlearned model: a directory written by ``fit``, or any checkpoint.
        oracle: A model retrained without the forget set; put under the same attacks, seed by seed.
        data: The data module the model was unlearned with; by default its run's, else the embedded facts.
        kind: ``harmful`` trains on a fraction p of the forget set and scores the rest; ``benign`` trains on harmless
            instruction data and scores the whole forget set.
        p: Fractions for harmful attacks.
        learning_rates: AdamW's; the default is the paper's harmful grid for 3B models. Small models need larger ones:
            widen until ``inside_grid`` is true.
        seeds: Of the selection and the order.
        epochs: Passes over the attack set.
        every_n_epochs: Epochs from one score to the next; the last is always scored. Scoring can cost more than the
            attack itself.
        batch_size: Attack sequences per step.
        score: The forget score; by default the one the run was stopped by, else probability.
        benign_path: Instruction data (file or hub id) for benign attacks; by default the data module's own.
        benign_size: Number of benign items at most.
        output: Directory for ``attack.json``; by default the model's run.
        save_attacked: Also save the attacked model with the highest score, at the end of its attack, as
            ``attacked_<kind>/``, for ``audit --after_attack``.
        accelerator: Lightning's.
        overwrite: Replace an earlier ``attack.json``.

    Returns:
        Every recovery curve.

    Raises:
        UserError: If an argument is outside its range, before a model is loaded.
    """
    start = time.monotonic()
    for name, values in (("p", p if kind == "harmful" else (1,)), ("learning_rates", learning_rates), ("seeds", seeds)):
        if not values:
            raise UserError(name, list(values), "at least one value")
    models = {"model": model} | ({"oracle": oracle} if oracle else {})
    sources = resolve_models(models)
    hide_short_bars(*sources)
    score = score or run_score(model)
    check_attack(score, learning_rates, epochs, every_n_epochs)
    device = make_trainer(accelerator, epochs, []).strategy.root_device
    folder = output_directory(model, output)
    refuse_existing("output", folder, ["attack.json", *([f"attacked_{kind}"] if save_attacked else [])], overwrite)
    check_space("output", folder, 1 << 20)
    data = run_data(model, data)
    check_tokenizers(models, data)
    fractions: list[float] = list(p) if kind == "harmful" else [0.5]

    # Selected and tokenised once for all learning rates and models.
    cells = [
        RelearnDataModule(data, kind, fraction, benign_path, benign_size, batch_size=batch_size, seed=seed)
        for fraction in fractions
        for seed in seeds
    ]
    for cell in cells:
        _ = cell.splits  # every selection is checked before a model is loaded
    curves: list[RecoveryCurve] = []
    highest = -1.0
    models = {"unlearned" if name == "model" else name: checkpoint for name, checkpoint in models.items()}
    total = len(models) * len(cells) * len(learning_rates)
    with tqdm(total=total, desc=f"{kind} attack", unit="run") as bar:
        for name, checkpoint in models.items():
            loaded, tokenizer = AnswerModel(load_model(checkpoint)), load_tokenizer(checkpoint)
            snapshot = Snapshot(loaded)
            for cell, learning_rate in product(cells, learning_rates):
                curve = relearn(
                    loaded, tokenizer, cell, learning_rate, epochs, score, name, accelerator, every_n_epochs
                )
                curves.append(curve)
                if save_attacked and name == "unlearned" and max(curve.forget_scores) > highest:
                    highest = max(curve.forget_scores)
                    save_pretrained(loaded.hf, tokenizer, folder / f"attacked_{kind}")
                loaded.cpu()
                snapshot.restore()
                bar.update()
    rows = table(curves)
    config = json.dumps(
        [kind, list(fractions), list(learning_rates), list(seeds), epochs, every_n_epochs, batch_size, score]
    )
    write_json(
        folder / "attack.json",
        {
            "score": score,
            "attacks": rows,
            "curves": curve_dicts(curves),
            "provenance": provenance(time.monotonic() - start, device, config, data.content_sha256()),
        },
    )
    print_attacks(rows, score)
    return curves


def print_attacks(rows: list[dict], score: str, console: Console | None = None) -> None:
    """Print the rows of ``attack.json`` as a table.

    Example:
        >>> cell = {"before": {"mean": 5.0, "std": 0.0}, "forget_score": {"mean": 30.0, "std": 1.0}}
        >>> cell["inside_grid"] = True
        >>> rows = [{"kind": "harmful", "p": 0.1, "n_attack": 4, "n_scored": 36, "unlearned": cell}]
        >>> print_attacks(rows, "probability", Console(width=70, color_system=None))  # doctest: +NORMALIZE_WHITESPACE
        Highest forget probability under attack, %
        attack       model      before   highest
        harmful 0.1  unlearned  5.0      30.0 ± 1.0
    """
    console = console or Console()
    console.print(f"Highest forget {score} under attack, %")
    output = Table(box=None)
    for column in ("attack", "model", "before", "highest"):
        output.add_column(column)
    for row in rows:
        label = row["kind"] if row["p"] is None else f"{row['kind']} {row['p']}"
        for name in ("unlearned", "oracle"):
            if name in row:
                top, edge = row[name]["forget_score"], "" if row[name]["inside_grid"] else "  (at the edge of the grid)"
                value = f"{top['mean']:.1f} ± {top['std']:.1f}{edge}"
                output.add_row(label, name, f"{row[name]['before']['mean']:.1f}", value)
        if "gap" in row:
            output.add_row(label, "gap", "", f"{row['gap']['mean']:.1f} ± {row['gap']['std']:.1f}")
    console.print(output)


def run(args: list[str]) -> None:
    """Parse and run ``attack``.

    Args:
        args: ``["--config", "recipes/attack/harmful.yaml", "--model", "runs/ssiuu/model", ...]``.
    """
    run_function(attack, "attack", args)
