"""What attacks share that train words or vectors of a prompt on a part of the forget set, and no weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.attacks.base import Attack, Outcome, Target
from lightning_ssiuu.attacks.prompting import check_seeds, questions_of
from lightning_ssiuu.attacks.vectors import embedded, first_free, refuse_cut_weights, reprompted, standing_for
from lightning_ssiuu.datamodules import QAExample, RelearnDataModule, UnlearningDataModule
from lightning_ssiuu.datamodules.relearn import random_fraction
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.training.gradients import sum_over_ranks
from lightning_ssiuu.training.perturbation import answered_rows, rows_of, share_of_mean
from lightning_ssiuu.utils.errors import UserError, check_at_least

#: From a part and token ids to the part with these in its prompts.
Change = Callable[[Part, Sequence[int]], Part]


@dataclass
class Insertion:
    """Token ids that stand in every prompt, and what those beyond the vocabulary are embedded as (``[n, H]``)."""

    ids: list[int]
    vectors: Tensor | None = None


@dataclass
class TrainedPrompt(Attack):
    """An attack that trains what stands in the prompts on a fraction of the forget set, and scores the rest with it.

    The weights stay as they are, and nothing is chosen by what is scored: the last step's result counts. A subclass
    says how it is trained (:meth:`learned`) and where it stands (:meth:`place`).

    Args:
        p: Fractions of the forget set that are trained on, in (0, 1).
        seeds: Seeds of the selection, the order and the start.
        steps: Steps of training, ≥ 0.
        batch_size: Examples per step, over all devices.
    """

    p: Sequence[float] = (0.3,)
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 100
    batch_size: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.p, str) or not self.p or not all(0 < p < 1 for p in self.p):
            raise UserError("attack.p", self.p, "a list of fractions in (0, 1)")
        check_seeds(self.seeds)
        check_at_least("attack.steps", self.steps, 0)
        check_at_least("attack.batch_size", self.batch_size, 1)

    @property
    @abstractmethod
    def length(self) -> int:
        """How many tokens it inserts."""

    @abstractmethod
    def learned(
        self, model: AnswerModel, cell: RelearnDataModule, batches: Iterator[Part], table: Tensor, change: Change
    ) -> Insertion:
        """Train on the attacked examples.

        Args:
            model: Its weights take no gradients.
            cell: Its ``seed`` seeds what is random.
            batches: Attacked examples on the model's device, without end; this rank's share.
            table: ``[V, H]`` embeddings of all tokens.
            change: From a part and token ids to the part with these in its prompts.
        """

    @abstractmethod
    def place(self, data: UnlearningDataModule, example: QAExample) -> int:
        """How many tokens of the example's prompt stand before what is inserted."""

    def cells(self, data: UnlearningDataModule) -> list[tuple[float, RelearnDataModule]]:
        """What is trained on and what is scored, for each fraction and seed."""
        questions_of(data, self)
        found = []
        for p in self.p:
            for seed in self.seeds:
                cell = RelearnDataModule(data, self.kind, p, batch_size=self.batch_size, seed=seed, selection=_fraction)
                try:
                    _ = cell.splits
                except UserError as error:
                    name = "attack.p" if error.argument == "p" else error.argument
                    raise UserError(name, error.value, error.allowed) from error
                found.append((p, cell))
        return found

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
        refuse_cut_weights(devices.sharded)
        for _, cell in self.cells(data):
            cell.check_share(devices.n_ranks)
        longest = max(len(one) for each in data.splits.forget for one in data.encoder.of(each, each.distractors))
        if longest + self.length > data.encoder.max_length:
            allowed = f"at least {longest + self.length}, for the longest example and what is inserted"
            raise UserError("max_length", data.encoder.max_length, allowed)

    def run(
        self, targets: Sequence[Target], data: UnlearningDataModule, score: str, devices: Devices
    ) -> Iterator[Outcome]:
        cells, places = self.cells(data), {one.example_id: self.place(data, one) for one in data.splits.forget}
        change = partial(inserted, places=places, pad=data.encoder.pad_token_id)
        for target in targets:
            model, tokenizer = target.load()
            model.requires_grad_(False)
            table = embedded(model)
            for p, cell in cells:
                batches = (move_data_to_device(part, devices.device) for part in cell.attacked_batches())
                insertion = self.learned(model, cell, batches, table, change)
                before, after = (scored(model, tokenizer, cell, score, i, change) for i in (Insertion([]), insertion))
                variant, more = f"p={p:g}, length={self.length}", {"seed": cell.seed, "n_scored": len(cell.scored)}
                yield self.outcome(target, data, score, before, after, variant, **more)
            del model, table  # before the next one is loaded


def _fraction(
    forget: Sequence[QAExample], p: float | None, rng: np.random.Generator
) -> tuple[Sequence[QAExample], Sequence[QAExample]]:
    assert p is not None
    return random_fraction(forget, p, rng)


def inserted(part: Part, ids: Sequence[int], places: dict[int, int], pad: int) -> Part:
    """A part with token ids in its prompts, after as many tokens as ``places`` has by example; on its device."""

    def change(prompt: list[int], example: int) -> list[int]:
        place = places[example]
        return [*prompt[:place], *ids, *prompt[place:]]

    device = part["input_ids"].device
    new: Part = move_data_to_device(reprompted(part, change, pad), device)
    return new


def scored(
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    cell: RelearnDataModule,
    score: str,
    insertion: Insertion,
    change: Change,
) -> float:
    """The score of what a cell scores, percent, with an insertion in every prompt."""
    batches = [{"forget": change(batch["forget"], insertion.ids)} for batch in cell.scored_batches()]
    with nullcontext() if insertion.vectors is None else standing_for(model, insertion.vectors):
        return evaluate(model, tokenizer, [batches], [score])["forget"][score]


def mean_loss(model: AnswerModel, part: Part) -> Tensor:
    """This rank's share of the mean negative log-probability per answer token over all ranks' examples, in nats."""
    rows, weight = share_of_mean(answered_rows(part))
    part = rows_of(part, rows)
    return -weight * model(part["input_ids"], part["attention_mask"], part["labels"]).mean_logps.mean()


def vector_gradient(model: AnswerModel, part: Part, vectors: Tensor) -> Tensor:
    """``[n, H]`` gradient of :func:`mean_loss`, of all ranks, by the ``vectors`` that a part's free ids stand for."""
    moving = vectors.detach().requires_grad_()
    with standing_for(model, moving):
        loss = mean_loss(model, part)
    (gradient,) = torch.autograd.grad(loss, [moving])
    sum_over_ranks([moving], [gradient])  # type: ignore[list-item]
    return gradient


def free_ids(model: AnswerModel, n: int) -> list[int]:
    """``n`` token ids that stand for vectors (:func:`~.vectors.standing_for`)."""
    return list(range(first_free(model), first_free(model) + n))
