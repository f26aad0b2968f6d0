"""Ask several times at a temperature: an answer that is no longer the likeliest may still be likely.

Source: arXiv 2410.03523 ("A Probabilistic Perspective on Unlearning and Alignment for Large Language Models"): greedy
decoding misses what sampling brings out. Here the measure is the best of k. Nothing is trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import torch
from lightning.fabric.utilities import move_data_to_device

from lightning_ssiuu.attacks.base import Attack, Outcome, Target
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.metrics.rouge import ROUGE
from lightning_ssiuu.evaluation.predictions import Predictions, grouped, texts
from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.models.drawing import Draw
from lightning_ssiuu.training.devices import Devices, Engine
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.errors import UserError, check_number


@dataclass
class Sampling(Attack):
    """Draw k continuations of every forget question and keep the best.

    With ``rouge_l`` and its stemmed forms an example counts the highest value among its samples. With every other score
    it counts whether any sample begins with the true answer (:func:`begins_with`), since teacher-forced scores have
    nothing to sample; the outcomes' score is then called ``"answer_given"``. ``before`` is the same of the greedy
    continuation.

    An example's samples depend on seed, example id and number of the sample alone: not on its batch or on the number
    of ranks, but for rounding. Under ``--engine vllm`` vLLM draws them, by the same three numbers, and they are others.

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
    engines: ClassVar[tuple[Engine, ...]] = get_args(Engine)

    def __post_init__(self) -> None:
        if not (isinstance(self.k, int) and self.k >= 1):
            raise UserError("attack.k", self.k, "a whole number ≥ 1")
        check_number("attack.temperature", self.temperature)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError("attack.top_p", self.top_p, "null, or a probability in (0, 1]")
        if not self.seeds or min(self.seeds) < 0:
            raise UserError("attack.seeds", list(self.seeds), "at least one, all ≥ 0")

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
        if devices.engine == "vllm" and self.temperature != 0 and not 0.01 <= self.temperature <= 2:
            raise UserError("attack.temperature", self.temperature, "0, or a number in [0.01, 2], with engine vllm")

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
        model, tokenizer = target.load(unchanged=True)
        value: Callable[[str, str], float] = ROUGE.get(score, begins_with)
        with untouched(model), torch.no_grad():
            loader = data.eval_dataloader("forget")
            parts = [move_data_to_device(batch["forget"], target.devices.device) for batch in loader]
            evaluated = grouped(model, tokenizer, parts)
            answers = [answer for each in evaluated for answer in each.references]
            greedy = map(value, [text for each in evaluated for text in each.generations], answers)
            best = [
                [max(value(text, answer) for text in of_seed) for of_seed in of_example]
                for of_example, answer in zip(sampled(evaluated, self), answers, strict=True)
            ]
        return _percent(list(greedy)), [_percent(values) for values in zip(*best, strict=True)]


def begins_with(text: str, answer: str) -> bool:
    """Whether a text begins with an answer, word by word: runs of letters and digits, whatever their case."""
    words, wanted = (re.findall(r"[^\W_]+", string.casefold()) for string in (text, answer))
    if not wanted:  # an answer of signs alone
        return text.strip().startswith(answer.strip())
    return words[: len(wanted)] == wanted


def sampled(evaluated: Sequence[Predictions], options: Sampling) -> list[list[list[str]]]:
    """For every example of a group, and each seed, the k sampled continuations of its prompt."""
    asked = [
        (request, example % 2**64)
        for each in evaluated
        for request, example in zip(each.requests(), each.part["example_id"].tolist(), strict=True)
    ]
    draws = [(seed, number) for seed in options.seeds for number in range(options.k)]
    requests = [
        replace(request, draw=Draw((seed, example, number), options.temperature, options.top_p))
        for request, example in asked
        for seed, number in draws
    ]
    rows = max(len(each.part["input_ids"]) for each in evaluated)
    found = iter(texts(evaluated[0].model, evaluated[0].tokenizer, requests, rows))
    return [[[next(found) for _ in range(options.k)] for _ in options.seeds] for _ in asked]


def _percent(values: Sequence[float]) -> float:
    of_all_ranks = [value for share in gathered(list(values)) for value in share]
    return 100 * math.fsum(of_all_ranks) / len(of_all_ranks)  # exact, whatever the order over ranks
