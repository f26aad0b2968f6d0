"""Tasks of the LM Evaluation Harness (the extra ``[lm-eval]``), which brings their data from the hub."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.models.answers import AnswerModel, nothing_stored
from lightning_ssiuu.utils.errors import Given, UserError, causes
from lightning_ssiuu.utils.extras import check_extra

#: The tasks of arXiv 2509.22263 with the figure that is reported of each.
PAPER = {
    "mmlu": "acc,none",
    "gsm8k": "exact_match,strict-match",
    "hellaswag": "acc_norm,none",
    "arc_challenge": "acc_norm,none",
    "winogrande": "acc,none",
}
#: What is reported of any other task: the first of these that it has.
FIGURES = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none")
_SUBJECTS = {"mmlu": 57}  # the limit is one for each member of a group


def check_harness(argument: str, given: object) -> None:
    """Check that the harness is installed, without importing it."""
    check_extra("lm_eval", argument, given, "embedded or world_facts")


def harness_scores(
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int,
    batch_size: int,
    chat: bool = False,
    directory: str | None = None,
) -> tuple[dict[str, float], dict[str, int]]:
    """Percent and number of items by task or group of the harness, on the first ``limit`` items of each.

    Of MMLU as many items of each of its 57 subjects, rounded up, as make that. ``chat`` asks through the tokenizer's
    chat template, ``directory`` holds task files of one's own.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=directory)
    known = set(manager.all_tasks)
    for name in tasks:
        if name not in known:
            raise UserError("tasks", name, "a task or group of lm-eval (lm-eval ls tasks), or of task_directory")
    language_model = HFLM(pretrained=model.hf, tokenizer=tokenizer, batch_size=batch_size)
    scores, counts = {}, {}
    for name in tasks:
        try:
            with nothing_stored(model.hf):
                results = simple_evaluate(
                    language_model,
                    tasks=[name],
                    limit=math.ceil(limit / _SUBJECTS.get(name, 1)),
                    task_manager=manager,
                    log_samples=False,
                    bootstrap_iters=0,
                    apply_chat_template=chat,
                )
        except Exception as error:
            if not _of_the_hub(error):
                raise
            allowed = f"tasks whose data can be had: the hub cannot be reached or lacks them ({type(error).__name__})"
            raise UserError("tasks", name, allowed) from error
        scores[name] = 100 * _figure(name, results)
        counts[name] = sum(n["effective"] for n in results["n-samples"].values())
    return scores, counts


def _figure(name: str, results: Mapping[str, Any]) -> float:
    measured = {**results["results"], **results.get("groups", {})}.get(name, {})
    for figure in (PAPER.get(name), *FIGURES):
        if figure in measured:
            return float(measured[figure])
    there = ", ".join(sorted(key for key, value in measured.items() if isinstance(value, float)))
    raise UserError("tasks", Given(f"{name}, which reports {there or 'nothing'}"), ", ".join(FIGURES))


def _of_the_hub(error: BaseException) -> bool:
    modules = ("datasets", "huggingface_hub", "httpx", "requests", "urllib3")
    return any(isinstance(e, OSError) or type(e).__module__.split(".")[0] in modules for e in causes(error))
