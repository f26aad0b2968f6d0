"""ROUGE-L: by hand, in scripts of many kinds, and stemmed as the published benchmarks have it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from torchmetrics.functional.text import rouge_score

from lightning_ssiuu.datamodules.pairs import batch_of
from lightning_ssiuu.evaluation.chance import mismatched_level
from lightning_ssiuu.evaluation.metrics import RougeL
from lightning_ssiuu.evaluation.metrics.rouge import (
    ROUGE,
    rouge_l_f1,
    rouge_l_f1_stemmed,
    rouge_l_recall,
    rouge_l_recall_stemmed,
    words,
)
from lightning_ssiuu.evaluation.scores import check_score
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.utils.errors import UserError


@pytest.mark.parametrize(
    ("prediction", "reference", "recall"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("sat cat the", "the cat sat", 1 / 3),
        ("a b c d e f", "b x d f", 3 / 4),
        ("the cat sat on the mat and slept", "the cat sat", 1.0),  # recall does not mind extra words
        ("", "the cat", 0.0),
        ("the cat", "", 0.0),
        ("...", "the cat", 0.0),
        ("running", "run", 0.0),  # no stemming
    ],
)
def test_rouge_l_recall_by_hand(prediction: str, reference: str, recall: float) -> None:
    assert rouge_l_recall(prediction, reference) == pytest.approx(recall, abs=1e-6)


def mismatched(answers: list[str], seed: int = 0, score: str = "rouge_l", others: Sequence[str] = ()) -> float:
    """The mismatched level of these answers, which asks no model."""
    tokenizer = load_tokenizer("tiny")

    def batches(texts: Sequence[str]) -> list[dict[str, Any]]:
        pairs = [([0], tokenizer(text)["input_ids"]) for text in texts]
        return [{"any": batch_of(pairs, tokenizer.pad_token_id)}] if pairs else []

    return mismatched_level(score, None, tokenizer, batches(answers), seed, batches(others))


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat on the mat", "the cat sat", 2 * (3 / 6) / (3 / 6 + 1)),
        ("a b c d e f", "b x d f", 2 * (3 / 6) * (3 / 4) / (3 / 6 + 3 / 4)),
        ("the dog", "the cat sat", 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),
        ("東京", "東京都", 2 * (2 / 3) / (1 + 2 / 3)),
        ("", "the cat", 0.0),
    ],
)
def test_rouge_l_f1_by_hand(prediction: str, reference: str, f1: float) -> None:
    assert rouge_l_f1(prediction, reference) == pytest.approx(f1, abs=1e-6)


def test_mismatched_pairs_never_meet_their_own_answer() -> None:
    words = ["alpha", "beta", "gamma", "delta"]
    assert all(mismatched(words, seed) == 0 for seed in range(20))  # an answer with itself would score 100
    answers = ["a", "a", "b", "b"]
    assert mismatched(answers, 1) == mismatched(answers, 1)
    assert len({mismatched(answers, seed) for seed in range(20)}) > 1
    for alike in (["SECRET"], ["same"] * 3):
        with pytest.raises(UserError, match="no two answers that differ"):
            mismatched(alike)


def test_one_answer_is_held_against_those_of_others() -> None:
    # Half of the two words, none of them, all: each of those that differ counts once.
    assert mismatched(["alpha beta"], others=["alpha gamma", "delta", "alpha beta"]) == pytest.approx(25)
    assert mismatched(["alpha beta"] * 3, others=["alpha gamma", "delta"]) == pytest.approx(25)
    assert mismatched(["alpha", "beta"], others=["alpha beta"]) == 0  # two of its own: others are not asked
    with pytest.raises(UserError, match="no two answers that differ"):
        mismatched(["SECRET"], others=["SECRET", "SECRET"])


@pytest.mark.parametrize(
    ("prediction", "reference", "recall"),
    [
        ("Она родилась в Москве", "в Москве", 1.0),
        ("Das war MÜLLER", "müller straße", 1 / 2),
        ("cafe\u0301", "café", 1.0),  # composed and decomposed
        ("हिन्दी भाषा", "हिन्दी", 1.0),  # vowel signs are parts of words
        ("هي من الكويت", "من الكويت", 1.0),
        ("می‌خواهم", "می‌خواهم", 1.0),
        ("東京都", "東京", 1.0),  # no spaces: by character
        ("京都", "東京", 1 / 2),
        ("ﾄｳｷｮｳ", "トウキョウ", 1.0),
        ("กรุงเทพ", "กรุง", 1.0),
        ("서울 대학교", "서울", 1.0),
        ("東京 Tower", "tokyo tower", 1 / 2),
        ("।", "।", 0.0),
    ],
)
def test_any_script(prediction: str, reference: str, recall: float) -> None:
    assert rouge_l_recall(prediction, reference) == pytest.approx(recall, abs=1e-6)


def test_english_is_what_torchmetrics_gives() -> None:
    rng = random.Random(0)
    pieces = ["Paris", "is", "the", "capital,", "of", "France.", "it's", "a_b", "1984", "--", "U.S.", "\n", "x"]
    for _ in range(300):
        said, true = (" ".join(rng.choices(pieces, k=rng.randint(0, 9))) for _ in range(2))
        theirs = rouge_score(said, true, use_stemmer=False, rouge_keys="rougeL")
        assert rouge_l_recall(said, true) == pytest.approx(theirs["rougeL_recall"].item(), abs=1e-6)
        assert rouge_l_f1(said, true) == pytest.approx(theirs["rougeL_fmeasure"].item(), abs=1e-6)


def test_marks_and_joiners_stay_in_their_word() -> None:
    assert words("नमस्ते, दुनिया!") == ["नमस्ते", "दुनिया"]
    assert words("ไทย x") == ["ไ", "ท", "ย", "x"]
    assert words("日本2024年") == ["日", "本", "2024", "年"]


#: What the package rouge_score 0.1.2 gives for RougeScorer(["rougeL"], use_stemmer=True).score(reference, prediction).
STEMMED = [
    ("The authors were running happily through the cities", "An author ran through a happy city", 0.4285714286, 0.4),
    (
        "Dying flies lying, skies; ties and enjoyed 1984 novels",
        "he died: a fly lies in the sky, tied, enjoying 1984's novel",
        0.5384615385,
        0.6363636364,
    ),
    (
        "Basil Mahfouz Al-Kuwaiti was born in Kuwait City.",
        "The author's full name is Basil Mahfouz Al-Kuwaiti, born in Kuwait.",
        0.5384615385,
        0.6363636364,
    ),
    ("", "nothing", 0.0, 0.0),
    ("generalizations operating relational", "generalization operates relations conditional", 0.75, 0.8571428571),
    ("a b c", "c b a", 0.3333333333, 0.3333333333),
]


@pytest.mark.parametrize(("prediction", "reference", "recall", "f1"), STEMMED)
def test_stemmed_forms_are_the_reference_implementations(
    prediction: str, reference: str, recall: float, f1: float
) -> None:
    assert rouge_l_recall_stemmed(prediction, reference) == pytest.approx(recall, abs=1e-6)
    assert rouge_l_f1_stemmed(prediction, reference) == pytest.approx(f1, abs=1e-6)


def test_each_name_is_a_score() -> None:
    for name, expected in zip(ROUGE, (0.0, 0.0, 50.0, 200 / 3), strict=True):
        check_score(name)
        metric = RougeL(name)
        metric.update(["running"], ["runs fast"])
        assert metric.compute().item() == pytest.approx(expected)


def test_an_unknown_form() -> None:
    with pytest.raises(UserError, match="score: got 'rouge_2'"):
        RougeL("rouge_2")
