"""Linear probes on hidden states: at which layer the true answer can be told from wrong ones.

Source of the control: arXiv 1909.03368 ("Designing and Interpreting Probes with Control Tasks"). The model stays as it
is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_ssiuu.attacks.base import Attack, Outcome, Target
from lightning_ssiuu.attacks.prompting import check_seeds, questions_of
from lightning_ssiuu.datamodules import QAExample, UnlearningDataModule
from lightning_ssiuu.datamodules.invented import invented
from lightning_ssiuu.datamodules.relearn import random_fraction
from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.hidden_states import answers_with_all_hidden
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.distributed import gathered, world_size
from lightning_ssiuu.utils.errors import Given, UserError, check_at_least, check_choice, check_number

_SALTS = {"forget": 6, "retain": 7, "control": 8}  # beside those of other draws
Source = Literal["forget", "retain"]
#: An example, and the same with a wrong answer.
Pair = tuple[QAExample, QAExample]


def probe(differences: Tensor, labels: Tensor, ridge: float) -> Tensor:
    """The direction ``[H]`` on which differences ``[n, H]`` lie at their labels ``[n]``, ±1, by ridge regression.

    ``ridge`` weighs the squared length of the direction, in parts of the mean squared length of the differences.

    Example:
        >>> differences = torch.tensor([[2.0, 1.0], [2.0, -1.0]])
        >>> probe(differences, torch.ones(2), ridge=0.0)
        tensor([0.5000, 0.0000])
    """
    gram = differences @ differences.T
    weight = ridge * gram.diagonal().mean()
    regular = gram + weight * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return differences.T @ (torch.linalg.pinv(regular, hermitian=True) @ labels.to(gram.dtype))


@dataclass(frozen=True)
class Pairs:
    """Hidden states of true answers minus those of wrong ones, ``[layers, n, H]``, by the example of each pair.

    ``prefers`` ``[n]`` is whether the model itself gives the true answer the higher mean log-probability per token.
    """

    differences: Tensor
    example_ids: Tensor
    prefers: Tensor

    def at(self, places: Sequence[int]) -> Pairs:
        """Those of some places."""
        chosen = torch.tensor(places)
        return Pairs(self.differences[:, chosen], self.example_ids[chosen], self.prefers[chosen])

    def share(self, right: Tensor) -> float:
        """Mean over pairs ``[n]`` of an example, then over examples, percent."""
        _, places, counts = self.example_ids.unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(counts), dtype=torch.float64).index_add(0, places, right.double())
        return 100 * float((sums / counts).mean())


@dataclass
class LayerProbes(Attack):
    """Fit a linear probe at every layer that tells true answers from wrong ones, and score it on held-out questions.

    Read are the outputs of every block at the answer's last token. A probe is one direction: by ridge regression on the
    differences between an answer's state and that of a wrong one (:func:`probe`), each dimension in units of its root
    mean square. Scored is the share of held-out pairs in which the true answer lies higher, mean over an example's
    pairs, then over examples: 50 is chance. Wrong answers are the distractors; where an example has none, the answer to
    another question worded alike, of those that are fitted on or of those that are scored: no probe sees a scored
    answer, not as a wrong one either.

    ``before`` is the share in which the model itself finds the true answer likelier. The control is the same probe
    fitted to, and asked for, labels of which half are turned round at random: what lies above it is in the states and
    not in the probe (selectivity). The oracle's states, beside, tell what gives answers away that the model never saw.

    Args:
        train_on: Questions to fit on: a part ``p`` of the ``forget`` set, scored on the rest, or ``n_retain`` of the
            ``retain`` set, scored on the whole forget set.
        p: Fraction of the forget set, in (0, 1).
        n_retain: Retain questions at most, ≥ 2.
        ridge: Weight of the probe's squared length, > 0.
        seeds: Of the choice and of the control's labels; an outcome and a control for each.

    Raises:
        UserError: If an option is outside its range; in :meth:`check`, chunks of documents, or a forget set whose
            answers are all the same.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> cpu = Devices("cpu")
        >>> attack = LayerProbes(seeds=[0])
        >>> outcomes = list(attack.run([Target("model", "tiny", cpu)], Facts(), "first_token", cpu))
        >>> [(outcome.variant, outcome.n_scored, outcome.control, outcome.before) for outcome in outcomes[:2]]
        [('layer=0', 18, False, 100.0), ('layer=0', 18, True, 100.0)]
    """

    train_on: Source = "forget"
    p: float = 0.5
    n_retain: int = 200
    ridge: float = 0.1
    seeds: Sequence[int] = (0, 1, 2)

    def __post_init__(self) -> None:
        check_choice("attack.train_on", self.train_on, Source)
        if not 0 < self.p < 1:
            raise UserError("attack.p", self.p, "a fraction in (0, 1)")
        check_at_least("attack.n_retain", self.n_retain, 2)
        check_number("attack.ridge", self.ridge, positive=True)
        check_seeds(self.seeds)

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
        for seed in self.seeds:
            data.encoder.encode([one for pairs in self.parts(data, seed) for pair in pairs for one in pair])

    def run(
        self, targets: Sequence[Target], data: UnlearningDataModule, score: str, devices: Devices
    ) -> Iterator[Outcome]:
        several = {seed: self.parts(data, seed) for seed in self.seeds}
        asked = list(dict.fromkeys(pair for parts in several.values() for pairs in parts for pair in pairs))
        place = {pair: number for number, pair in enumerate(asked)}
        for target in targets:
            model, _ = target.load()
            found = differences(model, data, asked, devices)
            del model  # before the next one is loaded
            for seed, parts in several.items():
                train, test = (found.at([place[pair] for pair in pairs]) for pairs in parts)
                n_scored = len(test.example_ids.unique())
                drawn = np.random.default_rng([seed, _SALTS["control"]])
                coins = [_coins(drawn, len(pairs.example_ids)) for pairs in (train, test)]
                tasks = ((False, [torch.ones_like(each) for each in coins]), (True, coins))
                for layer, (own, other) in enumerate(zip(train.differences, test.differences, strict=True)):
                    scale = own.square().mean(0).sqrt().clamp(min=torch.finfo(own.dtype).tiny)
                    for control, (fit, asked_for) in tasks:
                        right = asked_for * ((other / scale) @ probe(own / scale, fit, self.ridge)) > 0
                        values = test.share(test.prefers), test.share(right), f"layer={layer}"
                        more: dict[str, Any] = {"seed": seed, "control": control, "n_scored": n_scored}
                        yield self.outcome(target, data, "probe_accuracy", *values, **more)

    def parts(self, data: UnlearningDataModule, seed: int) -> tuple[list[Pair], list[Pair]]:
        """What is fitted on and what is scored, as pairs of an example and the same with a wrong answer."""
        forget, rng = questions_of(data, self), np.random.default_rng([seed, _SALTS[self.train_on]])
        if self.train_on == "forget":
            try:
                fitted, held = random_fraction(forget, self.p, rng)
            except UserError as error:
                raise UserError("attack.p", error.value, error.allowed) from error
        else:
            retain = data.splits.retain
            fitted, held = [retain[place] for place in rng.permutation(len(retain))[: self.n_retain].tolist()], forget
        parts = list(_with_wrong(fitted)), list(_with_wrong(held))
        if not all(parts):
            given = Given("too few questions with wrong answers")
            raise UserError("data", given, "distractors, or several answers among those that are fitted on and scored")
        return parts


def _coins(rng: np.random.Generator, n: int) -> Tensor:
    # ``[n]`` of 1 and −1, half of each, in random order.
    return 1.0 - 2.0 * torch.from_numpy(rng.permutation(n) % 2).float()


def _with_wrong(examples: Sequence[QAExample]) -> Iterator[Pair]:
    bare = [replace(one, distractors=()) for one in examples]
    others: Mapping[int, str] | None = None
    for one, own in zip(bare, examples, strict=True):
        wrong = own.distractors
        if not wrong:
            if others is None:
                others = {other.example_id: other.answer for other in invented(bare)[1]}
            wrong = (others[one.example_id],) if one.example_id in others else ()
        yield from ((one, replace(one, answer=answer)) for answer in wrong)


@torch.no_grad()
def differences(model: AnswerModel, data: UnlearningDataModule, pairs: Sequence[Pair], devices: Devices) -> Pairs:
    """The states of pairs of an example and the same with a wrong answer; each rank reads its share and gets all."""
    answers = list(dict.fromkeys(one for pair in pairs for one in pair))
    place = {one: number for number, one in enumerate(answers)}
    states, logps = [], []
    with untouched(model):
        for batch in data.eval_dataloader("forget", answers):
            part = move_data_to_device(batch["forget"], devices.device)
            found, hidden = answers_with_all_hidden(model, part)
            last = torch.cat(
                [found.sequence_index[1:] != found.sequence_index[:-1], found.sequence_index.new_ones(1).bool()]
            )
            states.append(torch.stack([state[last] for state in hidden]).float().cpu())
            logps.append(found.mean_logps.float().cpu())
    shares = gathered((torch.cat(states, 1), torch.cat(logps)))
    whole = torch.empty(shares[0][0].shape[0], len(answers), shares[0][0].shape[2])
    own = torch.empty(len(answers))
    for rank, (of_rank, scores) in enumerate(shares):  # rank r is served examples r, r + n, …
        whole[:, rank :: world_size()], own[rank :: world_size()] = of_rank, scores
    true, wrong = ([place[pair[side]] for pair in pairs] for side in (0, 1))
    ids = torch.tensor([one.example_id for one, _ in pairs])
    return Pairs(whole[:, true] - whole[:, wrong], ids, own[true] > own[wrong])
