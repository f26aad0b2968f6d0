"""The before/after table of a run, on the screen and as ``metrics.json``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from rich.table import Column, Table
from rich.text import Text

from lightning_ssiuu.callbacks.forget_threshold import ForgetThresholdStopping
from lightning_ssiuu.callbacks.neuron_attribution import NeuronAttributionCallback
from lightning_ssiuu.evaluation.chance import chance_of, first_batches
from lightning_ssiuu.evaluation.loaders import evaluation_loaders, run_directory, split_loader
from lightning_ssiuu.evaluation.retention import Retention
from lightning_ssiuu.evaluation.scorer import evaluate, untouched
from lightning_ssiuu.utils.files import write_json
from lightning_ssiuu.utils.loggers import identities
from lightning_ssiuu.utils.provenance import provenance
from lightning_ssiuu.utils.terminal import text_console, three_digits
from lightning_ssiuu.utils.version import commit

Scores = dict[str, dict[str, float]]


class RunReport(L.Callback):
    """Scores every split before and after training, prints the table and writes ``metrics.json``.

    ``forget_score``, ``retain_score`` and ``test_score`` hold the stopping criterion's score (or the first one measured
    where it was not), in percent; all others stand under ``scores``. ``test_score`` is the retention score of arXiv
    2509.22263: on people neither unlearned nor held on to. ``collapsed`` says that the retain score is at chance
    (``retain_chance``) and was not before (:class:`~lightning_ssiuu.evaluation.retention.Retention`; None where no
    chance is known): such a model has forgotten everything. ``elicited`` is what came back to an adversary at the end
    (where one was asked), ``{score: percent}``, ``stopped_by`` the rule that ended the run, ``walked_back`` what was
    left of the update (``{scale, keep, averaged}``, as :class:`WalkBack` has them; None: all of it), ``loggers`` what
    each of the run's calls it (None but for TensorBoard, W&B and MLflow), so that ``audit`` can go on there. The scores
    go to the loggers, too (``report/forget_probability``), before the first step and at the end. No data-set text is
    written.
    Give it after :class:`NeuronAttributionCallback`, whose figures it reports, and after the stopping.
    ``before``, ``after``: ``{split: {score: percent}}``.

    Args:
        print_table: Whether to print the table of scores.

    Example:
        >>> RunReport().before
        {}
    """

    def __init__(self, print_table: bool = True) -> None:
        self.print_table = print_table
        self.before: Scores = {}
        self.after: Scores = {}
        self.chance: float | None = None  # of the retain score
        self.config_text: str | None = None
        self._start = 0.0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stopping := _find(trainer, ForgetThresholdStopping):
            stopping.scores = pl_module.scores  # what it scores of the forget set is not scored again

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._start = time.monotonic()
        commit()  # of the code that was loaded; another one may be checked out by the end
        if not self.before:
            self.before = self._evaluate(trainer, pl_module)
            self.chance = self._retain_chance(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == batch_idx == 0:  # not before: a run that is refused logs nothing
            _log(trainer, self.before)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.after = self._evaluate(trainer, pl_module)
        _log(trainer, self.after)
        content = self._content(trainer, pl_module)
        if trainer.is_global_zero:
            try:
                write_json(Path(run_directory(trainer)) / "metrics.json", content)
            finally:  # also where the disk refuses
                if self.print_table:
                    print_before_after(content)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "chance": self.chance}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.chance = state_dict["before"], state_dict.get("chance")

    def _evaluate(self, trainer: Any, pl_module: Any) -> Scores:
        names = pl_module.scores
        stopping = _find(trainer, ForgetThresholdStopping)
        if names is not None and stopping and stopping.score not in names:
            names = [stopping.score, *names]
        also = [stopping.score] if stopping and stopping.threshold is not None else []
        loaders, step, known = evaluation_loaders(trainer), trainer.global_step, {}
        if stopping and stopping.scored is not None and stopping.scored[0] == step:
            known["forget"] = stopping.scored[1]
            forgotten = split_loader(trainer, "forget")
            loaders = [loader for loader in loaders if loader is not forgotten]
        return known | evaluate(pl_module.model, pl_module.tokenizer, loaders, names, also, step)

    def _main(self, trainer: Any) -> str:
        stopping, measured = _find(trainer, ForgetThresholdStopping), next(iter(self.before.values()))
        return stopping.score if stopping and stopping.score in measured else next(iter(measured))

    def _retain_chance(self, trainer: Any, pl_module: Any) -> float | None:
        with untouched(pl_module.model):
            loader = split_loader(trainer, "retain")
            batches = [] if loader is None else first_batches(loader)
        return chance_of(self._main(trainer), pl_module.model, pl_module.tokenizer, batches) if batches else None

    def _retention(self, trainer: Any) -> Retention | None:
        main = self._main(trainer)
        if self.chance is None or main not in self.before.get("retain", {}):
            return None
        dataset = getattr(split_loader(trainer, "retain"), "dataset", ())
        return Retention(main, self.before["retain"][main], self.after["retain"][main], self.chance, len(dataset))

    def _content(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        stopping = _find(trainer, ForgetThresholdStopping)
        attribution = _find(trainer, NeuronAttributionCallback)
        main, retention = self._main(trainer), self._retention(trainer)
        stopped_by = "steps" if 0 < trainer.max_steps <= trainer.global_step else "epochs"
        if trainer.should_stop and (early := _find(trainer, EarlyStopping)):
            stopped_by = f"EarlyStopping on {early.monitor}"
        if stopping and (why := stopping.why()) is not None:
            stopped_by = why
        influence = attribution.influence() if attribution else {}
        data_sha256 = getattr(trainer.datamodule, "content_sha256", lambda: None)()
        return {
            "objective": type(pl_module).__name__,
            "steps": trainer.global_step,
            "stopped_by": stopped_by,
            "walked_back": _walked_back(stopping),
            "score": main,
            "collapsed": None if retention is None else retention.collapsed,
            "retain_chance": self.chance,
            "before": _block(self.before, main) | {"influence": dict.fromkeys(influence, 0.0)},
            "after": _block(self.after, main) | _elicited(stopping, attribution) | {"influence": influence},
            "loggers": identities(trainer.loggers) if trainer.is_global_zero else [],
            "provenance": provenance(time.monotonic() - self._start, pl_module.device, self.config_text, data_sha256),
        }


def _block(scores: Scores, main: str) -> dict[str, Any]:
    block: dict[str, Any] = {f"{split}_score": values[main] for split, values in scores.items() if main in values}
    return block | {"scores": scores}


def _walked_back(stopping: ForgetThresholdStopping | None) -> dict[str, Any] | None:
    if stopping is None or stopping.walked_back is None:
        return None
    return stopping.walked_back._asdict()


def _elicited(*callbacks: ForgetThresholdStopping | NeuronAttributionCallback | None) -> dict[str, Any]:
    # Of the model as it is after the last step, where an adversary was asked.
    values = {each.score: each.elicited_value for each in callbacks if each and each.elicited_value is not None}
    return {"elicited": values} if values else {}


def _log(trainer: Any, scores: Scores) -> None:
    figures = {f"report/{split}_{score}": value for split, own in scores.items() for score, value in own.items()}
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=trainer.global_step)


def _find(trainer: Any, kind: type[Any]) -> Any:
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)


def print_before_after(content: dict[str, Any]) -> None:
    """Print the contents of a ``metrics.json`` as a short table."""
    console = text_console()
    console.print(f"{content['objective']}, {content['steps']} steps, stopped by: {content['stopped_by']}")
    table = Table("", Column("before", justify="right"), Column("after", justify="right"), "", box=None)
    before, after = content["before"], content["after"]
    for split, scores in before["scores"].items():
        for score, value in scores.items():
            table.add_row(Text(f"{split} {score}"), f"{value:.1f}", f"{after['scores'][split][score]:.1f}", "%")
    for score, value in after.get("elicited", {}).items():
        table.add_row(Text(f"forget {score}, elicited"), "", f"{value:.1f}", "%")
    for name, value in after["influence"].items():
        table.add_row(name, three_digits(before["influence"][name]), three_digits(value), "")
    console.print(table)
    if content.get("collapsed"):
        chance, score = f"{content['retain_chance']:.1f} %", content["score"].replace("_", " ")
        console.print(f"Collapsed: the retain {score} fell to chance ({chance}). Not only the forget set is gone.")
