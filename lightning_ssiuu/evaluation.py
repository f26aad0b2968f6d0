"""Score a model on the splits of a data module: the same code for training, validation and attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules.sampling import EvalSampler
from lightning_ssiuu.evaluated import Evaluated, Part
from lightning_ssiuu.functional.metrics import (
    answer_accuracy,
    answer_probability,
    generated_choice_accuracy,
    mismatched_rouge_l,
    multiple_choice_accuracy,
)
from lightning_ssiuu.functional.truth_ratio import TruthRatioKind
from lightning_ssiuu.metrics import (
    AnswerAccuracy,
    AnswerProbability,
    ExactMemorization,
    ExtractionStrength,
    RougeLRecall,
    TruthRatio,
)
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import evaluation_mode
from lightning_ssiuu.utils.console import progress
from lightning_ssiuu.utils.distributed import gathered, rank, world_size
from lightning_ssiuu.utils.errors import UserError

T = TypeVar("T")
Split = Literal["forget", "retain", "test"]


@dataclass(frozen=True)
class Score:
    """How to get one score: a metric to accumulate in, and what to update it with.

    Args:
        metric: Makes the torchmetrics metric; its ``compute()`` is in percent.
        measure: From an evaluated part to the arguments of ``metric.update``.
        needs: Key a part must have.
        default: Whether it is taken where no scores are named and parts have what it needs.
        generates: Whether it generates text: slow, so only taken where it is named.
    """

    metric: Callable[[], Metric]
    measure: Callable[[Evaluated], tuple[Any, ...]]
    needs: str | None = None
    default: bool = True
    generates: bool = False


def _accuracy(kind: Literal["first_token", "all_tokens"]) -> Score:
    def measure(e: Evaluated) -> tuple[Tensor]:
        a = e.answers
        return (answer_accuracy(a.token_correct, a.sequence_index, a.n_sequences, kind),)

    return Score(lambda: AnswerAccuracy(kind), measure)


def _token_correct(e: Evaluated) -> tuple[Tensor, Tensor, int]:
    return e.answers.token_correct, e.answers.sequence_index, e.answers.n_sequences


def _truth_ratio(kind: TruthRatioKind) -> Score:
    def measure(e: Evaluated) -> tuple[Tensor, Tensor, int]:
        return e.option_scores, e.option_of, len(e.part["input_ids"])

    return Score(lambda: TruthRatio(kind), measure, needs="options", default=False)


SCORES: dict[str, Score] = {
    "multiple_choice": Score(
        lambda: AnswerAccuracy("multiple_choice"),
        lambda e: (multiple_choice_accuracy(e.option_scores, e.option_of),),
        needs="options",
    ),
    "choice_likelihood": Score(
        lambda: AnswerAccuracy("choice_likelihood"),
        lambda e: (multiple_choice_accuracy(e.choice_scores, e.choice_of),),
        needs="choices",
    ),
    "choice_generation": Score(
        lambda: AnswerAccuracy("choice_generation"),
        lambda e: (generated_choice_accuracy(e.choice_generations, e.choice_options),),
        needs="choices",
        generates=True,
    ),
    "first_token": _accuracy("first_token"),
    "all_tokens": _accuracy("all_tokens"),
    "probability": Score(
        AnswerProbability,
        lambda e: (answer_probability(e.answers.token_logps, e.answers.sequence_index, e.answers.n_sequences),),
    ),
    "rouge_l": Score(RougeLRecall, lambda e: (e.generations, e.references), generates=True),
    "extraction_strength": Score(ExtractionStrength, _token_correct, default=False),
    "exact_memorization": Score(ExactMemorization, _token_correct, default=False),
    "truth_ratio_forget": _truth_ratio("forget"),
    "truth_ratio_retain": _truth_ratio("retain"),
}


def register_score(name: str, score: Score) -> None:
    """Make a score of your own available under ``name`` wherever scores are named.

    Example:
        >>> from torchmetrics import MeanMetric
        >>> register_score("perplexity", Score(MeanMetric, lambda e: ((-e.answers.mean_logps).exp(),)))
        >>> check_score("perplexity")
        >>> del SCORES["perplexity"]
    """
    SCORES[name] = score


def check_score(name: str, argument: str = "scores") -> None:
    """Raise :class:`UserError` unless ``name`` is a known score."""
    if name not in SCORES:
        raise UserError(argument, name, f"one of {sorted(SCORES)}")


class Scorer:
    """Accumulates scores per split.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        scores: Names, or None for the default ones that the parts allow without generating text.
        also: Where ``scores`` is None, names of scores to add to them on the parts that allow it.

    Raises:
        UserError: If a score is unknown, or asks for what the data lack.

    Example:
        >>> from lightning_ssiuu.models.loading import load_model, load_tokenizer
        >>> scorer = Scorer(AnswerModel(load_model("tiny")), load_tokenizer("tiny"), ["first_token"])
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> labels = torch.tensor([[-100, -100, 7, 8]])
        >>> scorer.update({"forget": {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": labels}})
        >>> sorted(scorer.compute()["forget"])
        ['first_token']
    """

    def __init__(
        self,
        model: AnswerModel,
        tokenizer: PreTrainedTokenizerBase,
        scores: Sequence[str] | None,
        also: Sequence[str] = (),
    ) -> None:
        for name in [*(scores or []), *also]:
            check_score(name)
        self.model, self.tokenizer, self.scores, self.also = model, tokenizer, scores, also
        self._metrics: dict[str, dict[str, Metric]] = {}

    @torch.no_grad()
    def update(self, batch: Mapping[str, Part]) -> None:
        """Score one evaluation batch, ``{split: part}``."""
        device = next(self.model.parameters()).device
        for split, part in batch.items():
            metrics = self._metrics.setdefault(split, self._new_metrics(part, device))
            evaluated = Evaluated(self.model, self.tokenizer, _to_device(part, device))
            for name, metric in metrics.items():
                metric.update(*SCORES[name].measure(evaluated))

    def compute(self) -> dict[str, dict[str, float]]:
        """``{split: {score: percent}}``."""
        return {s: {k: float(m.compute()) for k, m in metrics.items()} for s, metrics in self._metrics.items()}

    def reset(self) -> None:
        """Start again."""
        self._metrics.clear()

    def names(self, part: Part) -> list[str]:
        """What is scored on a part: what was asked for, or the default scores it allows without generating text.

        Raises:
            UserError: If the part lacks what a score asks for.
        """
        if self.scores is None:
            default = [n for n, s in SCORES.items() if s.default and not s.generates]
            wanted = dict.fromkeys([*default, *self.also])
            return [n for n in wanted if SCORES[n].needs in (None, *part)]
        for name in self.scores:
            if (needs := SCORES[name].needs) is not None and needs not in part:
                how = " (data.choice_template, and distractors)" if needs == "choices" else ""
                raise UserError("scores", name, f"a score this data allows: every example needs {needs}{how}")
        return list(self.scores)

    def _new_metrics(self, part: Part, device: torch.device) -> dict[str, Metric]:
        return {name: SCORES[name].metric().to(device) for name in self.names(part)}


def evaluate(
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    loaders: Iterable[Iterable[Mapping[str, Part]]],
    scores: Sequence[str] | None = None,
    also: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
    """Score a model on evaluation loaders, leaving its mode and every random state as they were.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        loaders: Loaders of ``{split: part}`` batches.
        scores: As for :class:`Scorer`.
        also: As for :class:`Scorer`.

    Returns:
        ``{split: {score: percent}}``.
    """
    scorer = Scorer(model, tokenizer, scores, also)
    with untouched(model):
        for loader in loaders:
            for batch in progress(loader, "scoring"):
                scorer.update(batch)
    return scorer.compute()


@contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; mode and random states (a loader's iterator draws from them) restored after.

    Example:
        >>> layer = torch.nn.Dropout().train()
        >>> with untouched(layer):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    with evaluation_mode(model), isolate_rng():
        yield


def mismatched_level(
    score: str,
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    loader: Iterable[Mapping[str, Part]],
    seed: int = 0,
) -> float:
    """What a score is worth by chance: its value on randomly re-paired questions and answers, in percent.

    The stopping threshold of the TOFU protocol (arXiv 2509.22263, Sec. 4: mean ROUGE-L recall of mismatched pairs).
    ROUGE-L compares the answers among themselves; probability, token accuracies and memorisation ask the model for
    another example's answer. No answer keeps its own question.

    Args:
        score: A score's name; multiple choice has no such level.
        model: The model, asked as it is now.
        tokenizer: Its tokenizer.
        loader: Evaluation loader of one split.
        seed: Of the pairing.

    Raises:
        UserError: If the score has no mismatched level.
    """
    parts = [part for batch in loader for part in batch.values()]
    if score == "rouge_l":
        answers = [text for part in parts for text in Evaluated(model, tokenizer, part).references]
        return mismatched_rouge_l(_over_ranks(answers), seed)
    if score not in ("probability", "first_token", "all_tokens", "extraction_strength", "exact_memorization"):
        raise UserError("stopping.threshold", "mismatched", f"a number in percent for score {score!r}")
    repaired = [{"forget": part} for part in _mismatched(parts, tokenizer.pad_token_id, seed)]
    return evaluate(model, tokenizer, [repaired], [score])["forget"][score]


def _over_ranks(items: list[T]) -> list[T]:
    # Each rank sees its share; a threshold of its own per rank would let one stop while the others wait for it.
    # Rank r has examples r, r + world size, ...: dealt back in turn, they stand in the order of a single process.
    return [item for row in zip_longest(*gathered(items)) for item in row if item is not None]


def _mismatched(parts: Sequence[Part], pad: int, seed: int) -> Iterator[dict[str, Tensor]]:
    pairs = []
    for part in parts:
        for row, labels in zip(part["input_ids"].cpu(), part["labels"].cpu(), strict=True):
            answered = labels != -100
            pairs.append((row[: int(answered.int().argmax())], labels[answered]))
    pairs = _over_ranks(pairs)
    size = max(gathered(max(len(part["input_ids"]) for part in parts)))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    # Each gets the answer of the next one in a random round: a derangement without retries.
    donor = dict(zip(order, order[1:] + order[:1], strict=True))
    for keys in EvalSampler("forget", len(pairs), size, rank(), world_size()):
        chosen = [(pairs[i][0], pairs[donor[i]][1]) for _, i in keys]
        ids = [torch.cat(pair) for pair in chosen]
        labels = [torch.cat([torch.full_like(prompt, -100), answer]) for prompt, answer in chosen]
        mask = [torch.ones_like(row) for row in ids]
        padded = torch.nn.utils.rnn.pad_sequence
        yield {
            "input_ids": padded(ids, batch_first=True, padding_value=pad),
            "attention_mask": padded(mask, batch_first=True),
            "labels": padded(labels, batch_first=True, padding_value=-100),
        }


def _to_device(part: Part, device: torch.device) -> Part:
    return {
        name: _to_device(value, device) if isinstance(value, Mapping) else value.to(device)
        for name, value in part.items()
    }
