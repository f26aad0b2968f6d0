"""``lightning-ssiuu privacy``: does it show that a set was trained on? Membership inference and forget quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning_ssiuu.cli.parsing import run_function
from lightning_ssiuu.cli.report import Report, print_table
from lightning_ssiuu.datamodules import QAExample, UnlearningDataModule
from lightning_ssiuu.datamodules.columns import Columns, read_examples
from lightning_ssiuu.datamodules.readers import read_records
from lightning_ssiuu.datamodules.splits import name_ids
from lightning_ssiuu.evaluation.privacy import compare_with_oracle, measure
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import Given, UserError, naming
from lightning_ssiuu.utils.files import print_written


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
        accelerator: As in Lightning's Trainer: ``auto``, ``cpu`` or ``gpu``; one device.
        precision: Precision of the weights.
        overwrite: Replace an earlier ``privacy.json``.

    Returns:
        The contents of ``privacy.json``; AUC and privleak in percent, forget quality a p-value, or null without wrong
        options in the data.

    Raises:
        UserError: If an argument is outside its range, or there is nothing to compare the forget set with.
    """
    if not 0 < k <= 1:
        raise UserError("k", k, "a fraction in (0, 1]")
    devices = Devices(accelerator, 1, precision=precision)
    with Report({"model": model, "oracle": oracle}, data, devices, output, ["privacy.json"], overwrite) as report:
        data = report.data
        others = data.splits.test if nonmembers is None else _read(nonmembers, data)
        if not others:
            raise UserError("nonmembers", nonmembers, "at least one example: the data have no test set")
        _check_nonmembers(others, data)
        measured = {}
        for name, checkpoint in report.models.items():
            with naming(name):
                loaded = devices.load(checkpoint)
            measured[name] = measure(loaded, data, others, k, gradient_norm)
            del loaded  # before the next one is loaded
        content: dict[str, Any] = {"membership_auc": {name: attacks.auc() for name, attacks in measured.items()}}
        if oracle is not None:
            content |= compare_with_oracle(measured["model"], measured["oracle"])
        content |= {
            "n_forget": len(data.splits.forget),
            "n_nonmembers": len(others),
            "nonmembers": "given" if nonmembers else "test",
        }
        content["provenance"] = report.provenance([k, gradient_norm, nonmembers is None, precision])
        try:
            report.write("privacy.json", content)
        finally:  # also where the disk refuses
            print_privacy(content)
        print_written(report.folder, ["privacy.json"])
        return content


def print_privacy(content: dict[str, Any]) -> None:
    """Print the contents of ``privacy.json`` as a table."""
    auc, privleak = content["membership_auc"], content.get("privleak")
    rows = [["attack", *auc, *(["privleak"] if privleak else [])]]
    for attack in auc["model"]:
        leak = [f"{privleak[attack]:+.1f}"] if privleak else []
        rows.append([attack, *(f"{of_model[attack]:.1f}" for of_model in auc.values()), *leak])
    if "reference_auc" in content:
        rows.append(["reference", f"{content['reference_auc']:.1f}"])
    quality = content.get("forget_quality")
    sizes = f"{content['n_forget']} members, {content['n_nonmembers']} others"
    notes = [] if quality is None else [f"forget quality: p = {quality:.3g}"]
    print_table(rows, f"Membership inference, AUC in %: {sizes}", notes)


def _read(path: str, data: UnlearningDataModule) -> Sequence[QAExample]:
    if (found := data.more(path, "nonmembers")) is not None:
        return found
    examples = read_examples(read_records(path, "nonmembers"), Columns(argument="nonmembers"))
    return [replace(example, example_id=n) for n, example in enumerate(examples)]


def _check_nonmembers(others: Sequence[QAExample], data: UnlearningDataModule) -> None:
    if blank := [example.name for example in others if example.blank]:
        raise UserError("nonmembers", Given(f"blank question or answer in {name_ids(blank)}"), "non-empty text")
    members = {example.folded for example in data.splits.forget}
    if same := [example.name for example in others if example.folded in members]:
        given = Given(f"{len(same)} questions that are also in forget ({name_ids(same)})")
        raise UserError("nonmembers", given, "questions disjoint from forget")


def run(args: list[str]) -> None:
    """Parse and run ``privacy``."""
    run_function(privacy, "privacy", args)
