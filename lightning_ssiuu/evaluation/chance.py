"""What a score is worth without any knowledge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from statistics import mean
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.datamodules.encoding import answered, batch_of, derangement
from lightning_ssiuu.datamodules.sampling import EvalSampler
from lightning_ssiuu.evaluation.metrics.rouge import ROUGE, mismatched_rouge_l
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.evaluation.scores import SCORES
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.utils.distributed import gathered, rank, world_size
from lightning_ssiuu.utils.errors import UserError

T = TypeVar("T")


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
    another example's answer, as do scores of one's own that need nothing besides. No answer keeps its own question.
    Scores of a choice among options have no such level, which is a :class:`UserError`.
    """
    parts = [part for batch in loader for part in batch.values()]
    if score in ROUGE:
        answers = [text for part in parts for text in Predictions(model, tokenizer, part).references]
        return mismatched_rouge_l(_over_ranks(answers), seed, score)
    if SCORES[score].needs is not None or SCORES[score].generates:
        raise UserError("stopping.threshold", "mismatched", f"a number in percent for score {score!r}")
    repaired = [{"forget": part} for part in _mismatched(parts, tokenizer.pad_token_id, seed)]
    return evaluate(model, tokenizer, [repaired], [score])["forget"][score]


def _over_ranks(items: list[T]) -> list[T]:
    # Each rank sees its share; a threshold of its own per rank would let one stop while the others wait for it.
    # Rank r has examples r, r + world size, ...: dealt back in turn, they stand in the order of a single process.
    return [item for row in zip_longest(*gathered(items)) for item in row if item is not None]


def _mismatched(parts: Sequence[Part], pad: int, seed: int) -> Iterator[Part]:
    pairs = _over_ranks([pair for part in parts for pair in answered(part)])
    size = max(gathered(max(len(part["input_ids"]) for part in parts)))
    other = derangement(len(pairs), seed)
    for keys in EvalSampler("forget", len(pairs), size, rank(), world_size()):
        yield batch_of([(pairs[i][0], pairs[other[i]][1]) for _, i in keys], pad)


_CHOICES = ("multiple_choice", "choice_likelihood", "choice_generation")


def chance_level(
    score: str, model: AnswerModel, tokenizer: PreTrainedTokenizerBase, data: UnlearningDataModule
) -> float:
    """What a forget score is worth without any knowledge of the data, in percent, asking the original model.

    One over the number of options for choices among options; 0 for scores of which nothing is known.
    """
    if score in _CHOICES:
        return 100 * mean(1 / (1 + len(example.distractors)) for example in data.splits.forget)
    try:
        return mismatched_level(score, model, tokenizer, data.eval_dataloader("forget"))
    except UserError:
        return 0.0
