"""``lightning-ssiuu attack``: a sweep of relearning attacks on a saved model, with its oracle beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.adapters import LoRA
from lightning_ssiuu.attacks.relearning import (
    RecoveryCurve,
    Snapshot,
    check_attack,
    curve_dicts,
    relearn,
    stronger,
    table,
)
from lightning_ssiuu.command_line import run_function
from lightning_ssiuu.datamodules import RelearnDataModule, UnlearningDataModule
from lightning_ssiuu.devices import Devices, Precision, Strategy
from lightning_ssiuu.errors import UserError
from lightning_ssiuu.export import save_pretrained
from lightning_ssiuu.files import check_space, refuse_existing, write_json
from lightning_ssiuu.models import AnswerModel, load_tokenizer
from lightning_ssiuu.provenance import provenance
from lightning_ssiuu.runs import check_tokenizers, naming, output_directory, resolve_models, run_data, run_score
from lightning_ssiuu.screen import hide_short_bars

#: How often an attack is made stronger for one model and p.
_MOST_WIDENINGS = 8


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
    lora: LoRA | None = None,
    until_saturated: bool = False,
    score: str | None = None,
    benign_path: str | None = None,
    benign_size: int = 1000,
    output: str | None = None,
    save_attacked: bool = False,
    accelerator: str = "auto",
    devices: int | Literal["auto"] = 1,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
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
        batch_size: Attack sequences per step, over all devices.
        lora: Fine-tune adapters instead of the weights; null for the weights.
        until_saturated: Where the highest score lies at the largest learning rate or in the last epoch, go on with
            larger rates, then with twice the epochs, until it lies inside (at most 8 times for a model and p).
        score: The forget score; by default the one the run was stopped by, else probability.
        benign_path: Instruction data (file or hub id) for benign attacks; by default the data module's own.
        benign_size: Number of benign items at most.
        output: Directory for ``attack.json``; by default the model's run.
        save_attacked: Also save the attacked model with the highest score, at the end of its attack, as
            ``attacked_<kind>/``, for ``audit --after_attack``.
        accelerator: Lightning's.
        devices: How many, one process each; ``auto``: all GPUs, or one process on the CPU. The curves do not depend
            on it, but for rounding.
        strategy: ``ddp``: the whole model on every device; ``fsdp2``: its weights cut over them.
        precision: Of the attack's steps and, but for ``bf16-mixed``, of the weights. In ``bf16-true`` small learning
            rates round away.
        overwrite: Replace an earlier ``attack.json``.

    Returns:
        Every recovery curve, on every process.

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
    where = Devices(accelerator, devices, strategy, precision)
    if lora is not None and where.sharded:
        raise UserError(
            "lora", "adapters", "null with strategy fsdp2, which cuts the weights before adapters are there"
        )
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
        where.check_share(cell)  # every selection is made and checked before a model is loaded
    adapters = None if lora is None else asdict(lora)
    grid = [list(learning_rates), list(seeds), epochs, every_n_epochs, batch_size, until_saturated]
    config = json.dumps([kind, fractions, grid, score, precision, adapters])
    with where.launched():
        saved = folder / f"attacked_{kind}" if save_attacked else None
        run_one = partial(relearn, score=score, devices=where, every_n_epochs=every_n_epochs, lora=lora)
        grid_of = list(product(cells, learning_rates))
        curves = _sweep(models, grid_of, epochs, where, saved, run_one, until_saturated)
        if where.is_first:
            rows = table(curves)
            origin = provenance(time.monotonic() - start, where.device, config, data.content_sha256())
            content = {
                "score": score,
                "lora": adapters,
                "attacks": rows,
                "curves": curve_dicts(curves),
                "provenance": origin,
            }
            write_json(folder / "attack.json", content)
            print_attacks(rows, score)
    return curves


def _sweep(
    models: Mapping[str, str],
    attacks: Sequence[tuple[RelearnDataModule, float]],
    epochs: int,
    where: Devices,
    saved: Path | None,
    run_one: Callable[..., RecoveryCurve],
    until_saturated: bool,
) -> list[RecoveryCurve]:
    """Put every model under every attack, one after another; each model is loaded once and alone."""
    curves: list[RecoveryCurve] = []
    highest = -1.0
    total, description = len(models) * len(attacks), f"{attacks[0][0].kind} attack"
    with tqdm(total=total, desc=description, unit="run", disable=not where.is_first) as bar:
        for argument, checkpoint in models.items():
            name = "unlearned" if argument == "model" else argument
            with naming(argument):
                loaded, tokenizer = where.load(checkpoint), load_tokenizer(checkpoint)
            snapshot = Snapshot(loaded)

            def attacked(
                cell: RelearnDataModule,
                learning_rate: float,
                epochs: int,
                name: str = name,
                loaded: AnswerModel = loaded,
                tokenizer: PreTrainedTokenizerBase = tokenizer,
                snapshot: Snapshot = snapshot,
            ) -> RecoveryCurve:
                nonlocal highest
                curve = run_one(loaded, tokenizer, cell, learning_rate, epochs, name=name)
                if saved is not None and name == "unlearned" and max(curve.forget_scores) > highest:
                    highest = max(curve.forget_scores)
                    save_pretrained(loaded.hf, tokenizer, saved)
                LoRA.detach(loaded)
                snapshot.restore()
                bar.update()
                return curve

            found = [(cell, attacked(cell, learning_rate, epochs)) for cell, learning_rate in attacks]
            if until_saturated:
                for p in dict.fromkeys(cell.p for cell, _ in attacks):
                    _saturate(found, [cell for cell in dict.fromkeys(c for c, _ in attacks) if cell.p == p], attacked)
            curves += [curve for _, curve in found]
            del loaded, snapshot, attacked  # before the next one is loaded
    return curves


def _saturate(
    found: list[tuple[RelearnDataModule, RecoveryCurve]],
    cells: Sequence[RelearnDataModule],
    attacked: Callable[[RelearnDataModule, float, int], RecoveryCurve],
) -> None:
    """Attack more and more strongly until the highest score of these cells lies inside what was tried."""
    for _ in range(_MOST_WIDENINGS):
        if (attack := stronger([curve for cell, curve in found if cell in cells])) is None:
            return
        rate, epochs = attack
        for cell in cells:
            curve = attacked(cell, rate, epochs)
            # A longer attack begins as the shorter one did, and takes its place.
            found[:] = [(c, old) for c, old in found if c is not cell or old.learning_rate != rate]
            found.append((cell, curve))


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
