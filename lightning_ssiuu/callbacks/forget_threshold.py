"""Stop unlearning as soon as the forget set is forgotten enough, and no later."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_ssiuu.callbacks.elicited import ElicitedLooks, ElicitedStop, Ending
from lightning_ssiuu.callbacks.walk_back import WalkBack, Walked, WayBack
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.chance import Level, level_of
from lightning_ssiuu.evaluation.knowledge import Knowledge, knowledge
from lightning_ssiuu.evaluation.loaders import batches_of, split_loader
from lightning_ssiuu.evaluation.scorer import evaluate, score_above, untouched
from lightning_ssiuu.evaluation.scores import check_score
from lightning_ssiuu.training.checkpoints import put_state, take_state
from lightning_ssiuu.utils.errors import UserError, check_at_least, check_choice

Unknown = Literal["refuse", "warn"]
#: The key of the average of the weights in a checkpoint.
_AVERAGE = "walk_back"


class ForgetThresholdStopping(L.Callback):
    """Stops training when a score of the forget set is at or below a threshold (arXiv 2509.22263, Sec. 4).

    Unlearning further than the threshold costs retained knowledge and makes methods incomparable. ``value`` is the last
    score measured, ``level`` the threshold in force (both in percent); ``stopped`` tells whether it ended the training.
    A score that is low says nothing of what is hidden. With ``elicited`` the run goes on until it is low at an
    adversary's weights, too, who relearns a part of the forget set and is scored on the rest: what a harmful attack
    scores. ``elicited_value`` is the last such score. Weights, gradients, random states and the optimiser are untouched
    by a look. A look after a step ends as soon as the score is certain to be above the level
    (:func:`~lightning_ssiuu.evaluation.scorer.score_above`): it has no value then, and nothing to log.

    Args:
        score: ``"multiple_choice"``, ``"first_token"``, ``"all_tokens"``, ``"probability"`` or ``"rouge_l"``.
        threshold: In percent, or a level measured at the start (:func:`~.chance.level_of`): ``"mismatched"``, the
            score of questions and answers re-paired at random, ``"chance"``, of those worded alike, or ``"test"``, of
            a test set that the model never learned. None never stops.
        every_n_steps: Optimiser steps between two looks.
        seed: Seed of the re-pairing.
        unknown: What becomes of a run that unlearns where the model's forget score before the first step is no more
            than chance (that of re-paired questions and answers, or of guessing among options), whatever the threshold:
            it would end as a success that unlearned nothing. ``"refuse"`` names the template with which the model knows
            most, if there is one; ``"warn"`` goes on.
        elicited: Also ask an adversary (:class:`ElicitedStop`); None stops at the first look at or below the threshold.
            Without a threshold it is asked at the end alone.
        walk_back: Unlearn further than the threshold and go back to it (:class:`WalkBack`), which keeps more of what
            is retained; ``walked_back`` is then the scale of the update, the share of weights it changes, and whether
            it is an average's. It takes a copy of the trained weights in the host's memory (for an average another one
            beside the weights), and goes to the front of the Trainer's callbacks, so that all others see the weights
            it ends with. None ends at the threshold.

    Raises:
        UserError: If an argument is outside its range, the model does not know the forget set, or the threshold is met
            before the first step; with ``elicited`` under float16, whose small gradients vanish, or on a data module
            that is no :class:`~lightning_ssiuu.UnlearningDataModule`.

    Example:
        >>> ForgetThresholdStopping(score="rouge_l", threshold=10.0, every_n_steps=5).stopped
        False
        >>> ForgetThresholdStopping(threshold=10.0, elicited=ElicitedStop(steps=20, floor=0.5)).elicited.share
        0.3
    """

    def __init__(
        self,
        score: str = "probability",
        threshold: float | Level | None = "mismatched",
        every_n_steps: int = 1,
        seed: int = 0,
        unknown: Unknown = "refuse",
        elicited: ElicitedStop | None = None,
        walk_back: WalkBack | None = None,
    ) -> None:
        check_score(score, "stopping.score")
        measured = threshold in get_args(Level)
        if not (threshold is None or measured or (not isinstance(threshold, str) and 0 <= threshold < 100)):
            allowed = 'a percentage in [0, 100), "mismatched", "chance", "test" or null'
            raise UserError("stopping.threshold", threshold, allowed)
        check_at_least("stopping.every_n_steps", every_n_steps, 1)
        check_choice("stopping.unknown", unknown, Unknown)
        self.unknown = unknown
        self.score, self.threshold, self.every_n_steps, self.seed = score, threshold, every_n_steps, seed
        self.value: float | None = None
        self.level: float | None = None
        self.elicited = elicited
        self.ended_by: Ending | None = None  # "floor": over-unlearned, and what was to be erased still comes back
        self._looks = None if elicited is None else ElicitedLooks(elicited)
        self.walk_back = walk_back
        self.walked_back: Walked | None = None
        self._way: WayBack | None = None
        self._average: Mapping[str, Tensor] | None = None  # an interrupted run's, until its way is there
        self._stepped = 0
        self.scores: Sequence[str] | None = ()  # of the forget set that another callback wants, too; None: all of them
        self.scored: tuple[int, dict[str, float]] | None = None  # these, and after which step
        self._loader: Any = None
        self._looked_at = 0

    @property
    def stopped(self) -> bool:
        """Whether it ended the training as forgotten."""
        return self.ended_by in ("threshold", "elicited")

    @property
    def elicited_value(self) -> float | None:
        """The last score at an adversary's weights, in percent; None: not asked."""
        return None if self._looks is None else self._looks.value

    @property
    def ending_level(self) -> float | None:
        """The score in percent at which training ends: the threshold, or what lies beyond it to walk back from."""
        if self.level is None or self.walk_back is None or self.walked_back is not None:
            return self.level
        return self.walk_back.overshoot * self.level

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.walk_back is not None and stage == "fit":
            self.walk_back.check(pl_module)
            # Before the others: what they measure, log and save at the end is what there is in the end.
            trainer.callbacks = [self, *(each for each in trainer.callbacks if each is not self)]  # type: ignore[attr-defined]
        if self.elicited is None or stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, UnlearningDataModule):
            raise UserError("data", type(data).__name__, "an UnlearningDataModule, for stopping.elicited")
        if str(trainer.precision).startswith("16-"):
            allowed = "32-true, bf16-mixed or bf16-true with stopping.elicited, whose gradients vanish in float16"
            raise UserError("trainer.precision", trainer.precision, allowed)
        self.elicited.fold(data, self.seed, 0)  # its mistakes are told before anything is trained

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        begins = trainer.global_step == 0
        average, self._average, self._way = None if begins else self._average, None, None
        if self.threshold is not None:
            with untouched(model := pl_module.model):
                self._loader = split_loader(trainer, "forget")
                if self._loader is None:
                    raise UserError("data", None, "an evaluation loader for the forget set")
                if not isinstance(self.threshold, str):
                    self.level = float(self.threshold)
                elif self.level is None:  # a resumed run brings the original model's
                    others, test = (batches_of(trainer, split) for split in ("retain", "test"))
                    asked = (self.score, model, pl_module.tokenizer, self._loader, self.seed, others, test)
                    self.level = level_of(self.threshold, *asked)
                pl_module.stopping_level = self.level if self.score == "probability" else None
            if begins:
                self.walked_back = None  # of an earlier run
                self._score(pl_module)
            if self.walk_back is not None and self.walked_back is None:
                if not begins and self.walk_back.ema_decay > 0 and average is None:
                    rank_zero_warn("ForgetThresholdStopping: the checkpoint has no average; it begins with its weights")
                self._way, self._stepped = WayBack(self.walk_back, pl_module, not begins, average), trainer.global_step
        known = self._check_known(trainer, pl_module) if begins and _unlearns(trainer, pl_module) else None
        if self.level is None or self.value is None:
            return
        if begins and self._judge(trainer, pl_module, self.level) not in (None, "floor"):
            allowed = f"below the forget set's {self.score}, which is {self.value:.4g} % before the first step"
            if (back := self.elicited_value) is not None:
                allowed += f", or its elicited {self.score}, {back:.4g} %"
            if known is not None and (best := known.elsewhere) is not None:
                allowed += f"; or data.init_args.template {best.template!r}, with which the model knows most ({best})"
            raise UserError("stopping.threshold", f"{self.level:.4g}", allowed)
        if self._looked_at == trainer.global_step > 0:  # a resumed run may have come to its end already
            if self._looks is None:
                self._judge(trainer, pl_module, self.ending_level)
            trainer.should_stop |= self.ended_by is not None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self._way is not None and step != self._stepped:
            self._way.after_step(pl_module)
            self._stepped = step
        if self.level is None or step == self._looked_at or step % self.every_n_steps:
            return
        self._looked_at = step
        if (value := self._look(pl_module, self.ending_level)) is not None:
            self._log(trainer, self.score, value)
        trainer.should_stop |= self._judge(trainer, pl_module, self.ending_level) is not None

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._way is not None:
            self._walk(trainer, pl_module, self._way)
        if self._looks is not None and self._looks.step != trainer.global_step:
            self._looks.value, self._looks.step = self._ask(trainer, pl_module), trainer.global_step
        if self.level is not None and not self.stopped:
            if self._looked_at == trainer.global_step and self.value is None:
                self._score(pl_module)
            what, value = self.score, self.value
            if self._looks is not None and value is not None and value <= self.level:
                what, value = f"elicited {self.score}", self._looks.value
            last = "not measured" if value is None else f"{value:.4g} %"
            text = f"training ended before {what} fell to {self.level:.4g} % (last: {last})"
            warnings.warn(f"ForgetThresholdStopping: {text}", stacklevel=2)

    def why(self) -> str | None:
        """Which rule of this callback ended the training, in words; None if none did."""
        level, back = self.level, self.elicited_value
        if self.ended_by is None or level is None or self.value is None:
            return None
        walked = "" if self.walked_back is None else ", walked back"
        if self.ended_by == "threshold" or self.elicited is None or back is None:
            return f"{self.score} <= {level:.4g} %{walked}"
        if self.ended_by == "elicited":
            return f"elicited {self.score} <= {level:.4g} %{walked}"
        floor = (self.elicited.floor or 0.0) * level
        return f"floor, not erased: {self.score} < {floor:.4g} %, elicited {back:.4g} % > {level:.4g} %"

    def state_dict(self) -> dict[str, Any]:
        looks = None if self._looks is None else self._looks.state_dict()
        state: dict[str, Any] = {"value": self.value, "level": self.level, "looked_at": self._looked_at}
        walked = None if self.walked_back is None else tuple(self.walked_back)
        return state | {"ended_by": self.ended_by, "elicited": looks, "walked_back": walked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value, self.level, self._looked_at = (state_dict[name] for name in ("value", "level", "looked_at"))
        self.ended_by = state_dict.get("ended_by", "threshold" if state_dict.get("stopped") else None)
        walked = state_dict.get("walked_back")
        self.walked_back = None if walked is None else Walked(*walked)
        if self._looks is not None and (looks := state_dict.get("elicited")) is not None:
            self._looks.load_state_dict(looks)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._way is not None and self._way.state is not None:
            put_state(checkpoint, _AVERAGE, self._way.state)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self.walk_back is not None:
            self._average = take_state(checkpoint, _AVERAGE, pl_module.model, trainer.ckpt_path)

    def _look(self, pl_module: Any, level: float | None) -> float | None:
        # The score of the weights as they are; None as soon as it is certain that it is above the level.
        assert level is not None
        model, tokenizer, step = pl_module.model, pl_module.tokenizer, pl_module.global_step
        self.value = score_above(level, model, tokenizer, self._loader, "forget", self.score, step)
        return self.value

    def _judge(self, trainer: Any, pl_module: Any, ending: float | None) -> Ending | None:
        value = self.value
        if self.level is None or ending is None:
            return None
        if self._looks is None:
            self.ended_by = "threshold" if value is not None and value <= ending else None
        else:
            ask = partial(self._ask, trainer, pl_module)
            self.ended_by = self._looks.judge(value, self.level, trainer.global_step, ask, ending)
        return self.ended_by

    def _walk(self, trainer: Any, pl_module: Any, way: WayBack) -> None:
        step, level = trainer.global_step, self.level
        assert level is not None
        if not self.stopped or self._looked_at != step:  # it may be below the threshold all the same
            self._looked_at = step
            self._look(pl_module, level)
            self._judge(trainer, pl_module, level)
        if not self.stopped:
            return
        self._way = None
        met = [(self.value, self.elicited_value)]

        def passes() -> bool:
            value, back = self._look(pl_module, level), None
            if value is None or value > level:  # not every score is known to be above before all of it is
                return False
            if self._looks is not None and (back := self._looks.ask(trainer, pl_module, self.score, self.seed)) > level:
                return False
            met.append((value, back))
            return True

        self.walked_back = way.walk(pl_module, passes)
        self.value, back = met[-1]
        self._log(trainer, self.score, self.value)
        if self._looks is not None:
            self._looks.value, self._looks.step = back, step
            self._log(trainer, f"elicited_{self.score}", back)

    def _log(self, trainer: Any, name: str, value: float | None) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"stopping/{name}": value}, step=trainer.global_step)

    def _ask(self, trainer: Any, pl_module: Any) -> float:
        assert self._looks is not None
        value = self._looks.ask(trainer, pl_module, self.score, self.seed)
        self._log(trainer, f"elicited_{self.score}", value)
        return value

    def _check_known(self, trainer: Any, pl_module: Any) -> Knowledge | None:
        value, chance = self.value, self.level if self.threshold == "chance" else None
        known = knowledge(self.score, pl_module.model, pl_module.tokenizer, trainer.datamodule, value, chance)
        if known is None:
            return None
        if known.nothing and self.unknown == "refuse":
            raise known.mistake("model.checkpoint")
        if (text := known.warning()) is not None:
            rank_zero_warn(f"ForgetThresholdStopping: {text}")
        return known

    def _score(self, pl_module: Any) -> None:
        model, tokenizer, step = pl_module.model, pl_module.tokenizer, pl_module.global_step
        names = self.scores
        if names is not None and self.score not in names:
            names = [self.score, *names]
        scores = evaluate(model, tokenizer, [self._loader], names, [self.score], step)["forget"]
        self.value, self.scored = scores[self.score], (step, scores)


def _unlearns(trainer: Any, pl_module: Any) -> bool:
    # A data module's train_on says whether there is a forget part at all.
    data, unlearns = trainer.datamodule, getattr(pl_module, "unlearns", False)
    return isinstance(data, UnlearningDataModule) and data.train_on == "pairs" and unlearns
