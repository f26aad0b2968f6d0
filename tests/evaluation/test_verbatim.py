"""Verbatim scores: worked by hand, against a slow search, and read off a model that goes on from a prefix."""

from __future__ import annotations

import random

import pytest
import torch
from toys.data import Toy

from lightning_ssiuu.datamodules import QAExample, Splits
from lightning_ssiuu.datamodules.chunks import Chunk, Span
from lightning_ssiuu.evaluation.chance import mismatched_level
from lightning_ssiuu.evaluation.metrics import LongestCommonRun, MemorizedShare
from lightning_ssiuu.evaluation.metrics.verbatim import RUN, longest_common_run
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.utils.errors import UserError

VERBATIM = ["rouge_l_f1", "longest_common_run", "memorized_share", "extraction_strength", "all_tokens"]


def slow_run(a: list[int], b: list[int]) -> int:
    return max((n for n in range(len(b) + 1) for i in range(len(b) - n + 1) if within(b[i : i + n], a)), default=0)


def within(run: list[int], text: list[int]) -> bool:
    return any(text[k : k + len(run)] == run for k in range(len(text) - len(run) + 1))


def test_the_longest_run_is_what_a_slow_search_finds() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.randrange(3) for _ in range(rng.randrange(9))] for _ in range(2))
        assert longest_common_run(a, b) == slow_run(a, b)
    frequent = [1] * 300 + [2]  # which difflib by itself would take for noise
    assert longest_common_run(frequent, [0, *frequent]) == 301


@pytest.mark.parametrize(
    ("generated", "reference", "share", "memorized"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 100.0, 100.0),
        ([9, 1, 2, 3], [1, 2, 3, 4], 75.0, 100.0),  # a run of three, wherever it stands
        ([1, 2, 9, 3, 4], [1, 2, 3, 4], 50.0, 0.0),
        ([5, 6], [5, 6], 100.0, 100.0),  # shorter than three, in full
        ([5], [5, 6], 50.0, 0.0),
        ([], [5, 6], 0.0, 0.0),
    ],
)
def test_by_hand(generated: list[int], reference: list[int], share: float, memorized: float) -> None:
    for metric, expected in ((LongestCommonRun(), share), (MemorizedShare(3), memorized)):
        metric.update([generated], [reference])
        assert metric.compute().dtype == torch.float64
        assert metric.compute().item() == pytest.approx(expected, rel=1e-12)


def test_batches_weigh_by_texts_and_not_by_tokens() -> None:
    metric = torch.nn.ModuleList([LongestCommonRun()]).to(torch.bfloat16)[0]
    metric.update([[1, 2], [3]], [[1, 2], [4]])
    metric.update([[7] * 9], [[7] * 10])
    assert metric.compute().item() == pytest.approx(100 * (1 + 0 + 0.9) / 3, rel=1e-12)
    metric.update([[]], [[]])
    assert metric.compute().isnan()


def test_fifty_tokens_are_memorised_by_default() -> None:
    text = list(range(80))
    for n, expected in ((RUN - 1, 0.0), (RUN, 100.0)):
        metric = MemorizedShare()
        metric.update([[-1, *text[20 : 20 + n], -2]], [text])
        assert metric.compute() == expected
    with pytest.raises(UserError, match="least: got 0"):
        MemorizedShare(0)


def chunk_of(number: int, tokens: list[int], n_prefix: int) -> Chunk:
    tokenizer = load_tokenizer("tiny")
    prefix, rest = tokenizer.decode(tokens[:n_prefix]), tokenizer.decode(tokens[n_prefix:])
    spans = (Span(number, 0, len(tokens)),)
    return Chunk(
        number, prefix, rest, group=f"{number}.txt", number=1, tokens=tuple(tokens), n_prefix=n_prefix, spans=spans
    )


def test_scores_of_a_model_that_says_a_part_of_the_text() -> None:
    """What the model itself says after a prefix is known in full; with a token changed, the run to it is."""
    model, tokenizer = AnswerModel(load_model("tiny")).eval(), load_tokenizer("tiny")
    prefix = tokenizer("the old")["input_ids"]
    ids = torch.tensor([prefix])
    said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    own = said[0, len(prefix) :].tolist()
    assert len(own) == 12
    assert tokenizer.eos_token_id not in own
    other = [*own[:9], (own[9] + 1) % 900 + 10, *own[10:]]
    chunks = [chunk_of(n, [*prefix, *rest], len(prefix)) for n, rest in enumerate((own, other))]
    retain = [QAExample(9, "Who?", "Me")]
    data = Toy(Splits(chunks, retain), tokenizer, template="{question}", max_length=64)
    data.setup("validate")
    part = next(iter(data.eval_dataloader("forget")))["forget"]
    predictions = Predictions(model, tokenizer, part)
    assert predictions.generated_tokens == [own, own]  # as long as the continuation, and no longer
    assert predictions.reference_tokens == [own, other]
    scores = evaluate(model, tokenizer, [data.eval_dataloader("forget")], VERBATIM)["forget"]
    assert scores["longest_common_run"] == pytest.approx(100 * (1 + longest_common_run(own, other) / 12) / 2)
    assert scores["memorized_share"] == scores["all_tokens"] == 50
    assert 50 < scores["rouge_l_f1"] < 100
    # Greedy decoding after the changed token need not be the text's: at most its rest is extracted.
    assert 50 <= scores["extraction_strength"] <= 100 * (1 + 2 / 12) / 2


def test_the_mismatched_level_compares_the_continuations() -> None:
    tokenizer = load_tokenizer("tiny")
    chunks = [chunk_of(n, [7, *rest], 1) for n, rest in enumerate(([11, 12, 13, 14], [21, 12, 13, 22]))]
    data = Toy(Splits(chunks, [QAExample(9, "Who?", "Me")]), tokenizer, max_length=64)
    data.setup("validate")
    loader = data.eval_dataloader("forget")
    assert mismatched_level("longest_common_run", None, tokenizer, loader) == pytest.approx(50)
    assert mismatched_level("memorized_share", None, tokenizer, loader) == 0
