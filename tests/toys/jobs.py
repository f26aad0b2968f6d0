"""Training runs of tiny models, described, and done on any number of gloo processes."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from toys.data import Toy, byte_tokenizer
from toys.models import bare_trainer, random_model, widened
from toys.ranks import ranks

from lightning_ssiuu import regularizers
from lightning_ssiuu.callbacks import ForgetThresholdStopping, NeuronAttributionCallback, RunReport
from lightning_ssiuu.callbacks.elicited import ElicitedStop
from lightning_ssiuu.callbacks.walk_back import WalkBack, WayBack
from lightning_ssiuu.evaluation.chance import mismatched_level
from lightning_ssiuu.evaluation.loaders import evaluation_loaders
from lightning_ssiuu.models import source
from lightning_ssiuu.models.export import _whole
from lightning_ssiuu.models.loading import evaluation_mode, load_model, load_tokenizer
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives import objectives
from lightning_ssiuu.utils.errors import UserError

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}
# Text first: nothing else has gathered the shards before.
SCORES = ["rouge_l", "probability", "all_tokens", "first_token", "multiple_choice"]


@dataclass(frozen=True)
class Job:
    """One training run.

    Args:
        name: What it is about.
        strategy: ``"auto"``, ``"ddp"``, ``"ddp_views"`` (gradients are views of what is communicated), ``"fsdp"``
            (checkpoints are folders), ``"fsdp_file"`` (they are files).
        objective: Class name.
        regularizer: Arguments of ``AttributionRegularizer``, or of the one under ``"class"``; None for none.
        module: More arguments of the objective.
        trainer: More arguments of the Trainer.
        data: Arguments of the data module.
        model: ``"plain"``, in float64; ``"shallow"``, that with a single layer; ``"dropout"``, a single layer in
            float32 with dropout; ``"experts"``, a single layer of which is a mixture of experts; ``"windowed"``, a
            single layer that sees 50 tokens back.
        rank: Of LoRA's adapters; None for none.
        optimizer: Key of ``OPTIMIZERS``.
        steps: Where training ends.
        looking: Whether attribution, stopping and report are at work.
        walks: Whether the largest third of the update alone is kept in the end, and three quarters of that.
        save: Save a checkpoint every second step under this name, with ``{step}`` in it.
        resume: Go on from step 2 of what was saved under this name.
        broken: The checkpoint cannot be read, which only the process that reads it can notice.
    """

    name: str
    strategy: str = "auto"
    objective: str = "SSIUU"
    regularizer: dict[str, Any] | None = None
    module: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    model: str = "plain"
    rank: int | None = None
    optimizer: str = "sgd"
    steps: int = 2
    looking: bool = False
    walks: bool = False
    save: str | None = None
    resume: str | None = None
    broken: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """What tells jobs apart."""
        return self.name, self.strategy


def save_models(folder: Path) -> None:
    """The checkpoints that the jobs start from."""
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    plain = {"dtype": torch.float64, "tie_word_embeddings": True}
    for name, kind, options in (
        ("plain", "llama", plain),
        ("shallow", "llama", {**plain, "num_hidden_layers": 1}),
        ("dropout", "gpt2", {"dtype": torch.float32, "n_layer": 1, **dropout}),
        ("experts", "mixtral", {"dtype": torch.float64, "num_hidden_layers": 1}),
        ("windowed", "mistral", {**plain, "num_hidden_layers": 1, "sliding_window": 50}),
    ):
        random_model(kind, **{"vocab_size": 260, **options}).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)


def _regularizer(given: dict[str, Any]) -> regularizers.Regularizer:
    arguments = {"class": "AttributionRegularizer", **given}
    if "regularizers" in given:
        arguments["regularizers"] = [_regularizer(one) for one in given["regularizers"]]
    return getattr(regularizers, arguments.pop("class"))(**arguments)


def _load_model(checkpoint: str, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    """In the type that was saved: ModelParallelStrategy knows no precision 64-true."""
    return copy.deepcopy(_loaded(checkpoint, *args, **kwargs))


@cache
def _loaded(checkpoint: str, *args: Any, **kwargs: Any) -> Any:
    return _wide(load_model(checkpoint, "auto", *args, **kwargs))


def _wide(model: Any) -> Any:
    model.set_experts_implementation("eager")  # products of all experts at once are not there in float64
    return widened(model)


@cache
def _tokenizer(checkpoint: str) -> Any:
    return load_tokenizer(checkpoint)


def _unreadable(*args: Any, **kwargs: Any) -> Any:
    if "device_map" not in kwargs:
        raise UserError("checkpoint", "broken", "a whole one")
    return load_model(*args, **kwargs)


class Evaluated(L.Callback):
    """Knows the step a run begins at, and looks at the model then, as reports do: FSDP2 leaves its root gathered."""

    step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.step = trainer.global_step
        with torch.no_grad(), evaluation_mode(pl_module.model):
            pl_module(next(pl_module.training_parts("forget", 2)))


class Walk(ForgetThresholdStopping):
    """Goes three quarters of the way to the average of the weights, whatever the scores."""

    def __init__(self) -> None:
        super().__init__("probability", None, walk_back=WalkBack(keep=1 / 3, looks=2, ema_decay=0.5))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stay where it is, behind the one that looks at the scores."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert self.walk_back is not None
        assert (self._average is not None) == (trainer.global_step > 0)
        self._way = WayBack(self.walk_back, pl_module, trainer.global_step > 0, self._average)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        passed = iter([True, False, True])  # at 1, 1/2 and 3/4
        assert self._way is not None
        assert self._way.walk(pl_module, lambda: next(passed)) == (0.75, 1 / 3, True)


def train(job: Job, n_ranks: int, folder: Path) -> dict[str, Any]:
    """Train; weights, figures and what the callbacks measured."""
    checkpoint = str(folder / job.model)
    torch.manual_seed(0)  # on every rank, as the command does
    module = objectives()[job.objective](
        checkpoint=checkpoint,
        regularizer=None if job.regularizer is None else _regularizer(job.regularizer),
        optimizer=OPTIMIZERS[job.optimizer],
        lora=None if job.rank is None else LoRA(job.rank),
        scores=SCORES,
        **job.module,
    )
    strategy: Any = job.strategy
    if strategy == "ddp_views":
        strategy = DDPStrategy(gradient_as_bucket_view=True)
    elif strategy.startswith("fsdp"):
        strategy = ModelParallelStrategy(n_ranks, 1, save_distributed_checkpoint=strategy == "fsdp")
    attribution = NeuronAttributionCallback(3, every_n_steps=1, alpha=0.2, target="length_normalised", write=False)
    adversary = ElicitedStop(share=0.25, steps=3, batch_size=3, optimizer=OPTIMIZERS["sgd"])  # one rank learns nothing
    stopping = ForgetThresholdStopping("probability", "mismatched", unknown="warn", elicited=adversary)
    report = RunReport(print_table=False)
    keep: list[Any] = []
    if job.save is not None:
        name = job.save.replace("{strategy}", job.strategy)
        keep = [ModelCheckpoint(folder, name, every_n_train_steps=2, save_top_k=-1)]
    restored = Evaluated()
    trainer = bare_trainer(
        job.steps,
        strategy=strategy,
        devices=n_ranks,
        callbacks=[restored, *keep, *([attribution, stopping, report] if job.looking else []), *[Walk()][: job.walks]],
        enable_checkpointing=bool(keep),
        limit_val_batches=1.0 if job.looking else 0,
        log_every_n_steps=1,
        default_root_dir=folder / "run",
        **job.trainer,
    )
    model = patch.object(source, "load_model", _unreadable if job.broken else _load_model)
    with model, patch.object(source, "load_tokenizer", _tokenizer):
        data = Toy(tokenizer=_tokenizer(checkpoint), **{"batch_size": 4, "eval_batch_size": 1, **job.data})
        resume = None if job.resume is None else str(folder / f"{job.resume}-step=2.ckpt")
        try:
            trainer.fit(module, data, ckpt_path=resume)
        except UserError as error:
            return {"mistake": str(error)}
    whole = [_whole(p) for p in module.model.parameters()]
    result: dict[str, Any] = {"weights": whole, "steps": trainer.global_step, "restored": restored.step}
    result["n_optimised"] = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
    result["figures"] = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
    if job.looking and attribution.variation is not None:
        forget = next(one for one in evaluation_loaders(trainer) if "forget" in next(iter(one)))
        result |= {
            "d_plus": attribution.variation.d_plus,
            "d_minus": attribution.variation.d_minus,
            "flagged": [(one.module, one.layer, one.index) for one in attribution.flagged],
            "scores": {f"{s}/{k}": v for s, values in report.after.items() for k, v in values.items()},
            "value": stopping.value,
            "level": stopping.level,
            "elicited": stopping.elicited_value,
            "rouge_level": mismatched_level("rouge_l", module.model, module.tokenizer, forget),
        }
    return result


def run(n_ranks: int, jobs: list[Job], folder: Path, timeout: float = 300) -> dict[tuple[str, str], Any]:
    """Do jobs on several processes, all in one process group; by job, every rank's results."""

    def do() -> int:
        rank = os.environ.get("LOCAL_RANK", 0)  # none for the first until its launcher has started the others
        for number, job in enumerate(jobs):
            torch.save(train(job, n_ranks, folder), folder / f"{number}.{rank}")
        return 0

    end = ranks(do, folder / "ranks", timeout)
    if end.status != 0:
        raise RuntimeError(end.err[-3000:])
    return {
        job.key: [torch.load(folder / f"{number}.{rank}", weights_only=True) for rank in range(n_ranks)]
        for number, job in enumerate(jobs)
    }
