"""Training runs on one process and on two, done once for all tests that compare them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from toys.data import examples
from toys.jobs import Job, run, save_models, train

from lightning_ssiuu.datamodules.splits import QAExample, Splits
from lightning_ssiuu.objectives import UnlearningModule, objectives

PENALTY = {"weight": 1e4, "target": "length_normalised"}
NEURONS = {"class": "NeuronAttributionRegularizer", "weight": 3e4, "target": "length_normalised"}
SETTINGS: dict[str, dict[str, Any]] = {
    "alone": {"steps": 3},
    "accumulated": {"trainer": {"accumulate_grad_batches": 3}, "model": "shallow"},
    "recomputed": {"module": {"gradient_checkpointing": True}, "model": "shallow"},
    "with adapters": {"rank": 2, "steps": 3, "model": "shallow"},
}
#: Each has a state of its own, and they act one after the other.
SEVERAL = {
    "class": "Combined",
    "regularizers": [
        {"class": "NeuronAttributionRegularizer", "weight": 0.3, "weight_mode": "relative"},
        {"class": "L2ToStart", "weight": 0.2, "weight_mode": "relative", "weight_schedule": "adaptive"},
        {"class": "DualMask", "n_examples": 3},
        {"class": "MatchedUpdateNorm", "norm": 0.05},
    ],
}


def _gives_losses_alone(objective: type[UnlearningModule]) -> bool:
    """Whether it does nothing else in a step, so that a step with a penalty holds all that one without does."""
    known = objective.__mro__[: objective.__mro__.index(UnlearningModule)]
    methods = {name for one in known for name, value in vars(one).items() if callable(value) and name[:2] != "__"}
    return bool(methods) and methods <= {"forget_loss", "retain_loss", "references", "_rejection_logps"}


def short(first: int, count: int) -> list[QAExample]:
    """Numbered examples of few tokens: under FSDP2 every generated one gathers all weights."""
    numbered = ((e.example_id, e) for e in examples(first, count))
    return [replace(e, question=f"{n}?", answer=f"A {n}{'x' * (n % 3)}", distractors=("so", "no")) for n, e in numbered]


def _unequal() -> Splits:
    return Splits(*(short(*some) for some in ((0, 5), (10, 4), (20, 2))))


def _with_a_long_one() -> Splits:
    first, *rest = short(0, 5)
    return Splits([replace(first, answer=20 * "long "), *rest], short(10, 4), short(20, 2))


#: The same global batches on any number of processes.
JOBS = [
    *(Job(f"{name} regularised", objective=name, regularizer=PENALTY, model="shallow") for name in objectives()),
    *(
        Job(f"{name} alone", objective=name, model="shallow")
        for name, objective in objectives().items()
        if not _gives_losses_alone(objective)
    ),
    # three micro-batches per step, both sharing the sum over micro-batches and over ranks
    Job("accumulated", regularizer=PENALTY, trainer={"accumulate_grad_batches": 3}),
    # what is evaluated on the way must agree too: thresholds that differ between ranks would hang the run
    Job(
        "looked at",
        regularizer={"weight": 1.0, "weight_mode": "relative", "anchor": "original"},
        trainer={"gradient_clip_val": 0.5},
        data={"eval_batch_size": 2, "splits": _unequal()},
        looking=True,
    ),
    Job(
        "recomputed",
        regularizer=PENALTY,
        module={"gradient_checkpointing": True},
        trainer={"accumulate_grad_batches": 2},
    ),
    # the forget parts are run again, and differentiated twice, outside the strategy's own forward pass
    Job(
        "exact",
        regularizer=PENALTY | {"derivative": "exact", "anchor_batch": "same"},
        trainer={"accumulate_grad_batches": 2},
        model="shallow",
        steps=3,
    ),
    Job("adapters", regularizer=PENALTY, rank=2, steps=3),
    Job("experts", regularizer=PENALTY, rank=2, model="experts"),
    *(Job(f"neurons {name}", regularizer=NEURONS, **options) for name, options in SETTINGS.items()),
    # longer than the window: one rank's parts go in one pass, the other's cannot
    Job("windowed", objective="GradientDifference", model="windowed", data={"splits": _with_a_long_one()}),
    # ranks' shares have unequal numbers of tokens
    Job(
        "by tokens",
        regularizer=PENALTY,
        module={"reduction": "token"},
        trainer={"accumulate_grad_batches": 2},
        data={"splits": _unequal()},
        model="shallow",
    ),
    Job("walked back", objective="GradientDifference", walks=True, model="shallow"),
    Job("l2 to start", regularizer={"class": "L2ToStart", "weight": 0.5}, steps=3, model="shallow"),
    Job("matched", regularizer={"class": "MatchedUpdateNorm", "norm": 0.05}, model="shallow"),
]


def _strategies(number: int, job: Job) -> tuple[str, ...]:
    """Both, but for what shows under either: a step without a penalty, beside the same with one, takes one in turn."""
    # Views of the communicated buffers as gradients: what stashes and restores gradients must not lose them.
    replicas = "ddp_views" if job.trainer else "ddp"
    if job.name == "exact":  # refused under FSDP2
        return (replicas,)
    if job.name == f"{job.objective} alone":
        return (replicas, "fsdp")[number % 2 :][:1]
    return replicas, "fsdp"


ON_TWO = [replace(job, strategy=s) for number, job in enumerate(JOBS) for s in _strategies(number, job)]

# Three batches an epoch: step 2 is in the middle of the first, step 4 in the second.
_INTERRUPTED: dict[str, Any] = {"steps": 4, "data": {"batch_size": 2}}
#: Every step draws random numbers, other ones on every rank.
DRAWING = Job(
    "drawing",
    regularizer={"weight": 0.2, "weight_mode": "relative", "target": "length_normalised"},
    optimizer="adamw",
    model="dropout",
    save="drawing-{strategy}-{step}",
    **_INTERRUPTED,
)
#: With every kind of state a regulariser may have.
SEVERALLY = replace(DRAWING, name="severally", regularizer=SEVERAL, save="severally-{strategy}-{step}")
#: Nothing is drawn; the anchor is the first step's, so a resumed run needs the checkpoint's.
MOVED = Job(
    "moved",
    regularizer=PENALTY | {"anchor": "original"},
    optimizer="momentum",
    model="shallow",
    walks=True,  # from the original's weights, which a resumed run no longer has
    save="moved-{strategy}-{step}",
    **_INTERRUPTED,
)
#: Most weights are frozen.
ADAPTED = replace(DRAWING, name="adapted", rank=2, save="adapted-{strategy}-{step}")
EXPERTS = replace(ADAPTED, name="adapted experts", model="experts", save="adapted experts-{strategy}-{step}")
_STRATEGIES = ("ddp", "fsdp", "fsdp_file")
CHECKPOINTED = [replace(job, strategy=s) for job in (DRAWING, SEVERALLY, ADAPTED, EXPERTS, MOVED) for s in _STRATEGIES]
RESUMED = [
    *(
        replace(job, name=f"{job.name} again", strategy=s, save=None, resume=f"{job.name}-{s}")
        for job in (DRAWING, SEVERALLY, ADAPTED, EXPERTS)
        for s in _STRATEGIES
    ),
    *(replace(MOVED, name="moved from one", strategy=s, save=None, resume="moved-auto") for s in _STRATEGIES),
]
BROKEN = Job("broken", strategy="fsdp", broken=True)


Results = tuple[Path, dict[tuple[str, str], Any]]


def results() -> Results:
    """The folder with the checkpoints, and by job one process's results or a list of two processes'."""
    outcome = _outcome()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@cache
def _outcome() -> Results | Exception:
    # A failure is kept as well: every test that asks would run, or hang, for itself.
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        save_models(folder)
        alone = {job.key: train(job, 1, folder) for job in (*JOBS, MOVED)}
        return folder, alone | run(2, [*ON_TWO, *CHECKPOINTED, *RESUMED, BROKEN], folder)
    except Exception as error:
        return error
