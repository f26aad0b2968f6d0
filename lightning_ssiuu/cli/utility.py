"""``lightning-ssiuu utility``: what a model can still do besides what it was unlearned on (US)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_ssiuu.cli.parsing import run_function
from lightning_ssiuu.cli.report import Report, print_table
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.datamodules.templates import Chat
from lightning_ssiuu.evaluation.lm_eval import PAPER, check_harness, harness_scores
from lightning_ssiuu.evaluation.utility import SUITES, encoding_like, score_tasks, seen_questions, suite_of, suite_tasks
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError, naming
from lightning_ssiuu.utils.files import print_written


def utility(
    model: str,
    suite: Literal["embedded", "world_facts", "paper"] | None = None,
    tasks: Sequence[str] | None = None,
    task_directory: str | None = None,
    data: UnlearningDataModule | None = None,
    limit: int = 500,
    batch_size: int = 16,
    chat: bool = False,
    output: str | None = None,
    accelerator: str = "auto",
    precision: Literal["32-true", "bf16-true"] = "32-true",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure a model's utility and write ``utility.json``.

    Args:
        model: A directory written by ``fit``, or any checkpoint.
        suite: ``embedded``: the harmless items that the tiny model was trained on, answered in full; ``world_facts``:
            WorldFacts, the choice among three (chance: 33); ``paper``: MMLU, GSM8K, HellaSwag, ARC-Challenge and
            Winogrande by lm-eval. By default ``embedded`` for the tiny model and its descendants, else
            ``world_facts``; both are offline.
        tasks: Tasks or groups of lm-eval instead of a suite.
        task_directory: Task files of one's own for lm-eval.
        data: The data module the model was unlearned with, for how to ask and what to leave out; by default its run's.
            Of ``world_facts`` what the model was unlearned or trained on is left out.
        limit: Items of each task at most.
        batch_size: Items at a time.
        chat: Ask lm-eval's tasks through the chat template.
        output: Directory for ``utility.json``; by default the model's run.
        accelerator: As in Lightning's Trainer: ``auto``, ``cpu`` or ``gpu``; one device.
        precision: Precision of the weights.
        overwrite: Replace an earlier ``utility.json``.

    Returns:
        The contents of ``utility.json``: the mean over the tasks as ``utility_score``, all in percent.

    Raises:
        UserError: If an argument is outside its range, or what a suite needs is not there; nothing is written then.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(name, value, "at least 1")
    if tasks is not None and (suite is not None or not tasks):
        raise UserError("tasks", list(tasks), "at least one task, and no suite")
    if tasks is not None or suite == "paper":
        check_harness("suite" if tasks is None else "tasks", suite if tasks is None else list(tasks))
    devices = Devices(accelerator, 1, precision=precision)
    with Report({"model": model}, data, devices, output, ["utility.json"], overwrite) as report:
        data = report.data
        with naming("model"):
            tokenizer, loaded = data.tokenizer, devices.load(model)
        sha256 = None
        if tasks is not None or suite == "paper":
            wanted = list(PAPER) if tasks is None else list(dict.fromkeys(tasks))
            named = "lm_eval" if tasks is not None else "paper"
            if chat and tokenizer.chat_template:
                tokenizer = Chat(tokenizer, None, data.template_options or {}, data.date).dated()
            scores, counts = harness_scores(loaded, tokenizer, wanted, limit, batch_size, chat, task_directory)
        else:
            named = suite or suite_of(data)
            items = suite_tasks(named, seen_questions(named, data), limit)
            asking = encoding_like(named, data, batch_size)
            scores, counts = score_tasks(loaded, items, SUITES[named], asking), {n: len(i) for n, i in items.items()}
            sha256 = asking.content_sha256()
        content = {
            "utility_score": sum(scores.values()) / len(scores),
            "tasks": scores,
            "suite": named,
            "n_items": counts,
            "provenance": report.provenance([named, tasks, limit, chat, precision]) | {"data_sha256": sha256},
        }
        try:
            report.write("utility.json", content)
        finally:  # also where the disk refuses
            print_utility(content)
        print_written(report.folder, ["utility.json"])
        return content


def print_utility(content: dict[str, Any]) -> None:
    """Print the contents of ``utility.json`` as a table."""
    rows = [(name, str(content["n_items"][name]), f"{value:.1f}") for name, value in content["tasks"].items()]
    mean = ("mean", "", f"{content['utility_score']:.1f}")
    print_table([("task", "items", "score"), *rows, mean], f"Utility ({content['suite']}), %")


def run(args: list[str]) -> None:
    """Parse and run ``utility``."""
    run_function(utility, "utility", args)
