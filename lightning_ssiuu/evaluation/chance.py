"""What a score is worth without any knowledge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from statistics import mean
from typing import Any, Literal, TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules.pairs import alike, answered, batch_of, derangement
from lightning_ssiuu.datamodules.sampling import EvalSampler
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.evaluation.scores import SCORES
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.utils.distributed import gathered, rank, world_size
from lightning_ssiuu.utils.errors import NotFinite, UserError

T = TypeVar("T")
#: Levels that are measured on the model before unlearning: see :func:`level_of`.
Level = Literal["mismatched", "chance", "test"]


def level_of(
    kind: Level,
    score: str,
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    loader: Iterable[Mapping[str, Part]],
    seed: int = 0,
    others: Iterable[Mapping[str, Part]] = (),
    test: Iterable[Mapping[str, Part]] = (),
) -> float:
    """What a score of the forget set is to fall to, in percent, asking the model as it is before unlearning.

    Args:
        kind: ``"mismatched"``: the score on questions and answers re-paired at random (arXiv 2509.22263, Sec. 4);
            ``"chance"``: what it is worth without any knowledge (:func:`chance_of`), with answers to questions worded
            alike; ``"test"``: the score of the test set, for one of the same form that the model never learned.
        score: Which.
        model: The model.
        tokenizer: Its tokenizer.
        loader: Batches of the forget set.
        seed: Of re-pairing at random.
        others: Batches of the retain set, for a forget set whose answers are all the same.
        test: Batches of the test set.

    Raises:
        UserError: If there is no such level: no two answers differ, a score of a choice among options and
            ``"mismatched"``, no test set.
    """
    if kind == "mismatched":
        return mismatched_level(score, model, tokenizer, loader, seed, others)
    if kind == "chance":
        if (level := chance_of(score, model, tokenizer, loader, seed, others)) is None:
            raise UserError("stopping.threshold", kind, f"a number in percent: none is known for score {score!r} here")
        return level
    if not (batches := list(test)):
        raise UserError("stopping.threshold", kind, "a number in percent: the data have no test set")
    return evaluate(model, tokenizer, [batches], [score])["test"][score]


def mismatched_level(
    score: str,
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    loader: Iterable[Mapping[str, Part]],
    seed: int = 0,
    others: Iterable[Mapping[str, Part]] = (),
    worded_alike: bool = False,
) -> float:
    """A score on re-paired questions and answers, in percent: at random, or ``worded_alike`` (:func:`~.pairs.alike`).

    The stopping threshold of the TOFU protocol (arXiv 2509.22263, Sec. 4: mean ROUGE-L recall of mismatched pairs).
    Scores of generated text (ROUGE-L, the longest common run) compare the answers among themselves; probability, token
    accuracies and memorisation ask the model for another example's answer, as do scores of one's own that need nothing
    besides. No answer keeps its own question. Of a set whose answers are all the same (a single row) each question is
    asked for the answers of ``others``, the retain set, in turn, :data:`YARDSTICK` pairs or as many as there are.
    Without one that differs there is no such level, nor for scores of a choice among options: a :class:`UserError`.
    """
    if SCORES[score].needs is not None:
        raise UserError("stopping.threshold", "mismatched", f"a number in percent for score {score!r}")
    parts = [part for batch in loader for part in batch.values()]
    pairs = _pairs(parts)
    if len(known := {tuple(answer) for _, answer in pairs}) > 1:
        answers = [tuple(answer) for _, answer in pairs]
        questions = tokenizer.batch_decode([question for question, _ in pairs]) if worded_alike else []
        given, rounds = parts, [alike(questions, answers) if worded_alike else derangement(len(pairs), seed)]
    else:
        given = [part for batch in first_batches(others) for part in batch.values()]
        differ = [place for place, (_, answer) in enumerate(_pairs(given)) if tuple(answer) not in known]
        if not differ:
            allowed = "a number in percent: the sets have no two answers that differ, to be mismatched"
            raise UserError("stopping.threshold", "mismatched", allowed)
        rounds = [
            [differ[(first + row) % len(differ)] for row in range(len(pairs))]
            for first in range(min(len(differ), -(-YARDSTICK // len(pairs))))
        ]
    if SCORES[score].generates:
        own, theirs = ([Predictions(model, tokenizer, part) for part in of] for of in (parts, given))
        return _said_of_others(score, own, theirs, rounds)
    repaired = [{"forget": part} for part in _mismatched(parts, pairs, _pairs(given), rounds, tokenizer.pad_token_id)]
    return evaluate(model, tokenizer, [repaired], [score])["forget"][score]


def _pairs(parts: Sequence[Part]) -> list[tuple[list[int], list[int]]]:
    return _over_ranks([pair for part in parts for pair in answered(part)])


def _said_of_others(
    score: str, own: Sequence[Predictions], theirs: Sequence[Predictions], rounds: Sequence[Sequence[int]]
) -> float:
    # The score of a model that gives other examples' true answers.
    tokens = _over_ranks([ids for each in theirs for ids in each.reference_tokens])
    metric = SCORES[score].metric()
    for other in rounds:
        places = iter(range(rank(), len(other), world_size()))
        for each in own:
            metric = metric.to(each.part["labels"].device)
            given = [other[place] for place in islice(places, len(each.part["labels"]))]
            each.tell([tokens[i] for i in given])
            metric.update(*SCORES[score].measure(each))
    return float(metric.compute())


def _over_ranks(items: list[T]) -> list[T]:
    # Each rank sees its share; a threshold of its own per rank would let one stop while the others wait for it.
    # Rank r has examples r, r + world size, ...: dealt back in turn, they stand in the order of a single process.
    return [item for row in zip_longest(*gathered(items)) for item in row if item is not None]


def _mismatched(
    parts: Sequence[Part],
    pairs: Sequence[tuple[list[int], list[int]]],
    given: Sequence[tuple[list[int], list[int]]],
    rounds: Sequence[Sequence[int]],
    pad: int,
) -> Iterator[Part]:
    mixed = [(question, given[i][1]) for other in rounds for (question, _), i in zip(pairs, other, strict=True)]
    size = max(gathered(max(len(part["input_ids"]) for part in parts)))
    for keys in EvalSampler("forget", len(mixed), size, rank(), world_size()):
        yield batch_of([mixed[i] for _, i in keys], pad)


#: Examples on which a level by chance is taken where it only is a yardstick.
YARDSTICK = 64
_CHOICES = {"multiple_choice": "options", "choice_likelihood": "choices", "choice_generation": "choices"}


def chance_of(
    score: str,
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    loader: Iterable[Mapping[str, Part]],
    seed: int = 0,
    others: Iterable[Mapping[str, Part]] = (),
) -> float | None:
    """What a score of a set is worth without any knowledge of it, in percent, asking the original model.

    The mean of one over the number of options for choices among options, else :func:`mismatched_level` with each
    question's answer that of another one worded alike: a wrong answer of the right kind. None where that says nothing:
    for scores of which no level is known, and where all answers, of ``others`` too, are the same.
    """
    batches: list[Mapping[str, Any]] = list(loader)
    parts = [part for batch in batches for part in batch.values()]
    if (options := _CHOICES.get(score)) is not None:
        if not parts or options not in parts[0]:
            return None
        counts = [count for part in parts for count in _counts(part[options]["option_of"])]
        return 100 * mean(1 / count for count in _over_ranks(counts))
    try:
        return mismatched_level(score, model, tokenizer, batches, seed, others, worded_alike=True)
    except NotFinite:
        raise
    except UserError:
        return None


def _counts(option_of: Tensor) -> list[int]:
    return option_of.unique_consecutive(return_counts=True)[1].tolist()


def first_batches(loader: Iterable[Mapping[str, Part]], n_examples: int = YARDSTICK) -> list[Mapping[str, Part]]:
    """Batches from the beginning of a loader that have so many examples over all ranks, if there are so many."""
    batches: list[Mapping[str, Part]] = []
    missing = -(-n_examples // world_size())  # each rank the same number of batches: a rank's may differ by one row
    for batch in loader:
        batches.append(batch)
        missing -= max(len(part["input_ids"]) for part in batch.values())
        if missing <= 0:
            break
    return batches
