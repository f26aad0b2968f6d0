"""``lightning-ssiuu privacy``: does it show that a set was trained on? Membership inference and forget quality."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_ssiuu.command_line import run_function
from lightning_ssiuu.datamodules import QAExample, UnlearningDataModule
from lightning_ssiuu.datamodules.readers import column, read_records
from lightning_ssiuu.evaluation import Evaluated, untouched
from lightning_ssiuu.functional.membership import (
    gradient_norm_score,
    loss_score,
    membership_auc,
    min_k,
    min_k_plus_plus,
    privleak,
    reference_score,
    zlib_score,
)
from lightning_ssiuu.functional.truth_ratio import forget_quality, truth_ratio
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.runs import check_tokenizers, output_directory, resolve_models, run_data
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.console import hide_short_bars, progress
from lightning_ssiuu.utils.errors import UserError, naming
from lightning_ssiuu.utils.files import check_space, refuse_existing, write_json
from lightning_ssiuu.utils.provenance import provenance

_SETS = ("forget", "test")


@dataclass
class Measured:
    """What one model says about the members (the forget set) and the others.

    Args:
        scores: ``{attack: {"forget" | "test": [B]}}``, higher for what looks like a member.
        logps: Of each set, batch by batch: token log-probabilities, their rows, and the number of rows.
        ratios: ``[B]`` truth ratios of the forget set; empty where it has no wrong options.
    """

    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    logps: dict[str, list[tuple[Tensor, Tensor, int]]] = field(default_factory=dict)
    ratios: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def auc(self) -> dict[str, float]:
        """Area under the ROC curve of each attack, in percent."""
        return {name: 100 * membership_auc(sets["forget"], sets["test"]) for name, sets in self.scores.items()}


def privacy(
    model: str,
    oracle: str | None = None,
    data: UnlearningDataModule | None = None,
    nonmembers: str | None = None,
    k: float = 0.4,
    gradient_norm: bool = True,
    output: str | None = None,
    accelerator: str = "auto",
    precision: Literal["32-true", "bf16-true"] = "32-true",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Attack a model by membership inference, compare it with its oracle and write ``privacy.json``.

    Args:
        model: The unlearned model: a directory written by ``fit``, or any checkpoint.
        oracle: A model retrained without the forget set: adds its AUC, ``privleak``, forget quality and the attack with
            the oracle as reference.
        data: The data module the model was unlearned with; by default its run's, else the embedded facts.
        nonmembers: Questions and answers that no model was trained on (file or hub id). By default the test set, which
            is that only if the model before unlearning was not trained on it either.
        k: Share of the least probable tokens that min-k and min-k++ look at.
        gradient_norm: Whether to take the gradient norms, a backward pass for each answer.
        output: Directory for ``privacy.json``; by default the model's run.
        accelerator: Lightning's; one device.
        precision: Of the weights.
        overwrite: Replace an earlier ``privacy.json``.

    Returns:
        The contents of ``privacy.json``; AUC and privleak in percent, forget quality a p-value, or null without wrong
        options in the data.

    Raises:
        UserError: If an argument is outside its range, or there is nothing to compare the forget set with.
    """
    start = time.monotonic()
    if not 0 < k <= 1:
        raise UserError("k", k, "a fraction in (0, 1]")
    models = {"model": model} | ({"oracle": oracle} if oracle else {})
    hide_short_bars(*resolve_models(models))
    where = Devices(accelerator, 1, precision=precision)
    folder = output_directory(model, output)
    refuse_existing("output", folder, ["privacy.json"], overwrite)
    check_space("output", folder, 1 << 20)
    data = run_data(model, data)
    others = data.splits.test if nonmembers is None else _read(nonmembers)
    if not others:
        raise UserError("nonmembers", nonmembers, "at least one example: the data have no test set")
    check_tokenizers(models, data)
    measured = {}
    for name, checkpoint in models.items():
        with naming(name):
            loaded = where.load(checkpoint)
        measured[name] = measure(loaded, data, others, k, gradient_norm)
        del loaded  # before the next one is loaded
    content: dict[str, Any] = {"membership_auc": {name: one.auc() for name, one in measured.items()}}
    if oracle is not None:
        content |= compare_with_oracle(measured["model"], measured["oracle"])
    content |= {
        "n_forget": len(data.splits.forget),
        "n_nonmembers": len(others),
        "nonmembers": "given" if nonmembers else "test",
    }
    config = json.dumps([k, gradient_norm, nonmembers is None, precision])
    content["provenance"] = provenance(time.monotonic() - start, where.device, config, data.content_sha256())
    write_json(folder / "privacy.json", content)
    print_privacy(content)
    return content


def measure(
    model: AnswerModel, data: UnlearningDataModule, others: Sequence[QAExample], k: float, gradient_norm: bool
) -> Measured:
    """Run every attack that needs one model.

    Args:
        model: The model.
        data: Its forget set are the members; encodes and batches.
        others: What no model was trained on.
        k: For min-k and min-k++.
        gradient_norm: Whether to take gradient norms.
    """
    found = Measured()
    device = next(model.parameters()).device
    ratios = []
    for name, loader in zip(_SETS, (data.eval_dataloader("forget"), data.eval_dataloader("test", others)), strict=True):
        kept: dict[str, list[Tensor]] = {}
        with untouched(model):
            for batch in progress(loader, "membership"):
                one = Evaluated(model, data.tokenizer, move_data_to_device(batch[name], device))
                with torch.set_grad_enabled(gradient_norm):
                    answers = one.answers
                if gradient_norm:
                    gradients = gradient_norm_score(-answers.mean_logps, model.parameters())
                    kept.setdefault("gradient_norm", []).append(gradients)
                with torch.no_grad():
                    logps = answers.token_logps.detach()
                    rows = logps, answers.sequence_index, answers.n_sequences
                    kept.setdefault("loss", []).append(loss_score(*rows))
                    kept.setdefault("min_k", []).append(min_k(*rows, k))
                    spread = min_k_plus_plus(answers.logits.detach(), answers.targets, *rows[1:], k)
                    kept.setdefault("min_k_plus_plus", []).append(spread)
                    kept.setdefault("zlib", []).append(zlib_score(*rows, one.references))
                    found.logps.setdefault(name, []).append((logps.cpu(), rows[1].cpu(), rows[2]))
                    if name == "forget" and "options" in one.part:
                        ratios.append(truth_ratio(one.option_scores, one.option_of, answers.n_sequences).cpu())
        for attack, scores in kept.items():
            found.scores.setdefault(attack, {})[name] = torch.cat(scores).cpu()
    found.ratios = torch.cat(ratios) if ratios else found.ratios
    return found


def compare_with_oracle(unlearned: Measured, oracle: Measured) -> dict[str, Any]:
    """What is said of an unlearned model against one retrained without the forget set.

    Args:
        unlearned: Of :func:`measure`.
        oracle: Of :func:`measure`, on the same examples.

    Returns:
        ``reference_auc`` in percent, ``privleak`` by attack in percent (NaN where the oracle's AUC is 100) and
        ``forget_quality``.

    Example:
        >>> one = {"loss": {"forget": torch.tensor([3.0, 2.0]), "test": torch.tensor([1.0, 2.0])}}
        >>> other = {"loss": {"forget": torch.tensor([1.0]), "test": torch.tensor([1.0])}}
        >>> logps = {name: [(torch.tensor([-1.0]), torch.tensor([0]), 1)] for name in ("forget", "test")}
        >>> compare_with_oracle(Measured(one, logps), Measured(other, logps))
        {'reference_auc': 50.0, 'privleak': {'loss': -75.0}, 'forget_quality': None}
    """
    relative = {
        name: torch.cat([
            reference_score(logps, theirs, rows, n)
            for (logps, rows, n), (theirs, _, _) in zip(unlearned.logps[name], oracle.logps[name], strict=True)
        ])
        for name in _SETS
    }  # fmt: skip
    ours, theirs = unlearned.auc(), oracle.auc()
    return {
        "reference_auc": 100 * membership_auc(relative["forget"], relative["test"]),
        "privleak": {
            name: privleak(ours[name] / 100, theirs[name] / 100) if theirs[name] < 100 else math.nan for name in ours
        },
        "forget_quality": forget_quality(unlearned.ratios, oracle.ratios) if len(unlearned.ratios) else None,
    }


def print_privacy(content: dict[str, Any], console: Console | None = None) -> None:
    """Print the contents of ``privacy.json`` as a table.

    Example:
        >>> content = {"membership_auc": {"model": {"loss": 40.0}, "oracle": {"loss": 50.0}}, "reference_auc": 30.0,
        ...            "privleak": {"loss": 20.0}, "forget_quality": 0.5, "n_forget": 4, "n_nonmembers": 9}
        >>> print_privacy(content, Console(width=70, color_system=None))  # doctest: +NORMALIZE_WHITESPACE
        Membership inference, AUC in %: 4 members, 9 others
        attack     model  oracle  privleak
        loss        40.0    50.0     +20.0
        reference   30.0
        forget quality: p = 0.5
    """
    console = console or Console()
    sizes = f"{content['n_forget']} members, {content['n_nonmembers']} others"
    console.print(f"Membership inference, AUC in %: {sizes}")
    auc = content["membership_auc"]
    table = Table(box=None)
    for name in ("attack", *auc, *(["privleak"] if "privleak" in content else [])):
        table.add_column(name, justify="left" if name == "attack" else "right")
    for attack in auc["model"]:
        leak = [f"{content['privleak'][attack]:+.1f}"] if "privleak" in content else []
        table.add_row(attack, *(f"{one[attack]:.1f}" for one in auc.values()), *leak)
    if "reference_auc" in content:
        table.add_row("reference", f"{content['reference_auc']:.1f}")
    console.print(table)
    if content.get("forget_quality") is not None:
        console.print(f"forget quality: p = {content['forget_quality']:.3g}")


def _read(path: str) -> list[QAExample]:
    records = read_records(path, "nonmembers")
    questions, answers = column(records, "question", "nonmembers"), column(records, "answer", "nonmembers")
    return [QAExample(n, question, answer) for n, (question, answer) in enumerate(zip(questions, answers, strict=True))]


def run(args: list[str]) -> None:
    """Parse and run ``privacy``.

    Args:
        args: ``["--model", "runs/ssiuu/model", "--oracle", "runs/oracle/model", ...]``.
    """
    run_function(privacy, "privacy", args)
