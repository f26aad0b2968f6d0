"""Score a model on the splits of a data module: the same code for training, validation and attacks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules.sampling import EvalSampler
from lightning_ssiuu.evaluation.metrics.base import Percentage
from lightning_ssiuu.evaluation.predictions import Predictions, generating
from lightning_ssiuu.evaluation.scores import SCORES, find_score
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.models.checks import diverging
from lightning_ssiuu.models.loading import evaluation_mode
from lightning_ssiuu.utils.console import progress
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.errors import Given, NotFinite, UserError

#: Of sums in float64 that are added in another order.
_ROUNDING = 1e-9


class Scorer:
    """Accumulates scores per split: those named, or the default ones that the parts allow without generating text.

    Where ``scores`` is None, ``also`` names scores to add to the default ones on the parts that allow it.
    Texts are generated for a whole split at once, by :meth:`compute`.
    """

    def __init__(
        self,
        model: AnswerModel,
        tokenizer: PreTrainedTokenizerBase,
        scores: Sequence[str] | None,
        also: Sequence[str] = (),
    ) -> None:
        for name in [*(scores or []), *also]:
            find_score(name)
        self.model, self.tokenizer, self.scores, self.also = model, tokenizer, scores, also
        self._metrics: dict[str, dict[str, Metric]] = {}
        self._waiting: dict[str, list[Part]] = {}  # to be generated for

    @torch.no_grad()
    def update(self, batch: Mapping[str, Part]) -> None:
        device = next(self.model.parameters()).device
        for split, part in batch.items():
            metrics = self._metrics.setdefault(split, self._new_metrics(part, device))
            predictions = Predictions(self.model, self.tokenizer, move_data_to_device(part, device))
            for name, metric in metrics.items():
                if not SCORES[name].generates:
                    metric.update(*SCORES[name].measure(predictions))
            if any(SCORES[name].generates for name in metrics):
                self._waiting.setdefault(split, []).append(predictions.part)

    def compute(self, step: int = 0) -> dict[str, dict[str, float]]:
        """``{split: {score: percent}}``; a score that is no number is an error, and never one below a threshold.

        ``step`` as :func:`evaluate` has it.
        """
        with diverging(step):
            for split in list(self._waiting):
                self._generate(split)
        scores = {s: {k: float(m.compute()) for k, m in metrics.items()} for s, metrics in self._metrics.items()}
        for split, each in scores.items():
            for name, value in each.items():
                if not value > -math.inf:
                    raise NotFinite("checkpoint", Given(f"a model whose {split} {name} is {value}"), "one with a score")
        return scores

    def reset(self) -> None:
        self._metrics.clear()
        self._waiting.clear()

    def names(self, part: Part) -> list[str]:
        """What is scored on a part; a named score that needs what the part lacks is a :class:`UserError`."""
        if self.scores is None:
            default = [n for n, s in SCORES.items() if s.default and not s.generates]
            wanted = dict.fromkeys([*default, *self.also])
            return [n for n in wanted if SCORES[n].needs in (None, *part)]
        for name in self.scores:
            if (needs := SCORES[name].needs) is not None and needs not in part:
                how = " (data.choice_template, and distractors)" if needs == "choices" else ""
                raise UserError("scores", name, f"a score this data allows: every example needs {needs}{how}")
        return list(self.scores)

    @torch.no_grad()
    def _generate(self, split: str) -> None:
        metrics = {name: metric for name, metric in self._metrics[split].items() if SCORES[name].generates}
        for predictions in generating(self.model, self.tokenizer, self._waiting.pop(split)):
            for name, metric in metrics.items():
                metric.update(*SCORES[name].measure(predictions))

    def _new_metrics(self, part: Part, device: torch.device) -> dict[str, Metric]:
        return {name: SCORES[name].metric().to(device) for name in self.names(part)}


def evaluate(
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    loaders: Iterable[Iterable[Mapping[str, Part]]],
    scores: Sequence[str] | None = None,
    also: Sequence[str] = (),
    step: int = 0,
) -> dict[str, dict[str, float]]:
    """``{split: {score: percent}}`` on loaders of ``{split: part}`` batches; see :class:`Scorer`.

    The model's mode and every random state are left as they were. ``step`` is that of the run that trains the model.

    Raises:
        NotFinite: If the model gives no numbers: its ``checkpoint`` is broken, or the run diverged by ``step``.
    """
    scorer = Scorer(model, tokenizer, scores, also)
    with untouched(model), diverging(step):
        for loader in loaders:
            for batch in progress(loader, "scoring"):
                scorer.update(batch)
        return scorer.compute()


def score_above(
    level: float,
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    loader: Iterable[Mapping[str, Part]],
    split: str,
    score: str,
    step: int = 0,
) -> float | None:
    """A set's score in percent, or None as soon as it is certain to be above a level.

    That is certain when it would be above even if all examples not yet seen, on any rank, had 0: of a set that is known
    well, a share of the size of the level is looked at. It is told of loaders of a data module, and of scores that are
    the mean of a value per example (:class:`~lightning_ssiuu.evaluation.metrics.base.Percentage`); others need the
    whole set.
    """
    scorer, seen = Scorer(model, tokenizer, [score]), 0
    known = isinstance(getattr(loader, "batch_sampler", None), EvalSampler)  # every rank has equally many batches
    size = len(getattr(loader, "dataset", ())) if known else 0
    with untouched(model), diverging(step):
        for batch in progress(loader, "scoring"):
            scorer.update(batch)
            metric, seen = scorer._metrics[split][score], seen + len(batch[split]["input_ids"])
            if size and isinstance(metric, Percentage) and type(metric).compute is Percentage.compute:
                ranks = gathered((float(metric.total), int(metric.count), seen))
                total, count, examples = map(sum, zip(*ranks, strict=True))
                if count <= examples and 100 * total / size > level * (1 + _ROUNDING):
                    return None
        return scorer.compute()[split][score]


@contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; mode and random states (a loader's iterator draws from them) restored after."""
    with evaluation_mode(model), isolate_rng():
        yield
