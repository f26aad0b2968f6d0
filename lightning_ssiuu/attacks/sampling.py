"""Ask several times at a temperature: an answer that is no longer the likeliest may still be likely.

Source: arXiv 2410.03523 ("A Probabilistic Perspective on Unlearning and Alignment for Large Language Models"): greedy
decoding misses what sampling brings out. Here the measure is the best of k. Nothing is trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import LogitsProcessor

from lightning_ssiuu.attacks.base import Attack, Outcome, Target
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.metrics.base import widest_float
from lightning_ssiuu.evaluation.metrics.rouge import ROUGE
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.console import progress
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.errors import UserError, check_number

#: Longest continuation in tokens, as :meth:`Predictions.continuations` has it.
_MOST_TOKENS = 200


@dataclass
class Sampling(Attack):
    """Draw k continuations of every forget question and keep the best.

    With ``rouge_l`` and its stemmed forms an example counts the highest value among its samples. With every other score
    it counts whether any sample begins with the true answer (:func:`begins_with`), since teacher-forced scores have
    nothing to sample; the outcomes' score is then called ``"answer_given"``. ``before`` is the same of the greedy
    continuation.

    An example's samples depend on seed, example id and number of the sample alone: not on its batch or on the number
    of ranks, but for rounding.

    Args:
        k: Samples per question, ≥ 1.
        temperature: Divides the logits, ≥ 0; 0 is greedy decoding.
        top_p: Sample from the smallest set of tokens whose probabilities sum to at least this, in (0, 1]; None: from
            all tokens.
        seeds: One outcome for each.

    Raises:
        UserError: If an option is outside its range.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> cpu, attack = Devices("cpu"), Sampling(k=1, temperature=0.0, seeds=[0])
        >>> (outcome,) = attack.run([Target("model", "tiny", cpu)], Facts(), "rouge_l", cpu)
        >>> outcome.variant, outcome.forget_score == outcome.before
        ('k=1, temperature=0', True)
        >>> Sampling(k=0)
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: attack.k: got 0, allowed: a whole number ≥ 1
    """

    k: int = 8
    temperature: float = 1.0
    top_p: float | None = None
    seeds: Sequence[int] = (0, 1, 2)

    def __post_init__(self) -> None:
        if not (isinstance(self.k, int) and self.k >= 1):
            raise UserError("attack.k", self.k, "a whole number ≥ 1")
        check_number("attack.temperature", self.temperature)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError("attack.top_p", self.top_p, "null, or a probability in (0, 1]")
        if not self.seeds or min(self.seeds) < 0:
            raise UserError("attack.seeds", list(self.seeds), "at least one, all ≥ 0")

    @property
    def variant(self) -> str:
        """Its name in the results."""
        nucleus = "" if self.top_p is None else f", top_p={self.top_p:g}"
        return f"k={self.k}, temperature={self.temperature:g}{nucleus}"

    def run(
        self, targets: Sequence[Target], data: UnlearningDataModule, score: str, devices: Devices
    ) -> Iterator[Outcome]:
        measured = score if score in ROUGE else "answer_given"
        for target in targets:
            before, after = self._best(target, data, score)
            for seed, value in zip(self.seeds, after, strict=True):
                yield self.outcome(target, data, measured, before, value, self.variant, seed=seed)

    def _best(self, target: Target, data: UnlearningDataModule, score: str) -> tuple[float, list[float]]:
        # The greedy value, and for each seed the value of the best of k, in percent.
        model, tokenizer = target.load()
        value: Callable[[str, str], float] = ROUGE.get(score, begins_with)
        greedy: list[float] = []
        best: list[list[float]] = [[] for _ in self.seeds]
        with untouched(model), torch.no_grad():
            for batch in progress(data.eval_dataloader("forget"), "sampling"):
                part = move_data_to_device(batch["forget"], target.devices.device)
                predictions = Predictions(model, tokenizer, part)
                answers = predictions.references
                greedy += map(value, predictions.generations, answers)
                for values, seed in zip(best, self.seeds, strict=True):
                    samples = [sampled(predictions, seed, number, self) for number in range(self.k)]
                    values += [
                        max(value(text, answer) for text in texts)
                        for *texts, answer in zip(*samples, answers, strict=True)
                    ]
        return _percent(greedy), [_percent(values) for values in best]


class Drawn(LogitsProcessor):
    """Leaves greedy decoding one token to choose: the one that a given random number falls on.

    Decoding then samples, with one random number per row and token (``uniforms``, ``[B, T]`` float64 in [0, 1)), so
    that a row's text depends on its own numbers and on nothing else of its batch.
    """

    def __init__(self, uniforms: Tensor, temperature: float, top_p: float | None = None) -> None:
        self.uniforms, self.temperature, self.top_p = uniforms, temperature, top_p
        self._start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._start is None:
            self._start = input_ids.shape[1]
        uniform = self.uniforms[:, input_ids.shape[1] - self._start].to(scores.device)
        chosen = draw(scores, uniform, self.temperature, self.top_p)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.unsqueeze(1), 0.0)


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float | None = None) -> Tensor:
    """The token that a random number falls on, in the cumulative distribution over the vocabulary in its order.

    Logits ``[B, V]`` and numbers ``[B]`` in [0, 1) in, token ids ``[B]`` out; temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    wide = logits.to(widest_float(logits.device))
    # The largest becomes 0 first: a tiny temperature then leaves it alone instead of overflowing.
    probabilities = ((wide - wide.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probabilities = probabilities.scatter(1, order, ordered.masked_fill(before >= top_p, 0.0))
    cumulative = probabilities.cumsum(-1)
    reached = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    return (cumulative <= reached).sum(-1).clamp(max=logits.shape[-1] - 1)


def begins_with(text: str, answer: str) -> bool:
    """Whether a text begins with an answer, word by word: runs of letters and digits, whatever their case."""
    words, wanted = (re.findall(r"[^\W_]+", string.casefold()) for string in (text, answer))
    if not wanted:  # an answer of signs alone
        return text.strip().startswith(answer.strip())
    return words[: len(wanted)] == wanted


def sampled(evaluated: Predictions, seed: int, number: int, options: Sampling) -> list[str]:
    """One sampled continuation of every prompt, ``number`` of the k."""
    generators = [np.random.default_rng([seed, i % 2**64, number]) for i in evaluated.part["example_id"].tolist()]
    uniforms = np.stack([generator.random(_MOST_TOKENS) for generator in generators])
    processor = Drawn(torch.from_numpy(uniforms), options.temperature, options.top_p)
    return evaluated.continuations([processor])


def _percent(values: Sequence[float]) -> float:
    of_all_ranks = [value for share in gathered(list(values)) for value in share]
    return 100 * math.fsum(of_all_ranks) / len(of_all_ranks)  # exact, whatever the order over ranks
