"""Entropy of n-grams against counts by hand, and a classifier's probability against its own logits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from toys.data import byte_tokenizer
from transformers import BertConfig, BertForSequenceClassification

from lightning_ssiuu import UserError
from lightning_ssiuu.evaluation.metrics import ClassProbability
from lightning_ssiuu.evaluation.metrics.fluency import ngram_entropy
from lightning_ssiuu.evaluation.scores import check_score


def test_entropy_by_hand() -> None:
    """Bigrams of "a b a b c" are ab, ba, ab, bc, its trigrams aba, bab, abc."""
    bigrams = 2 * 0.25 * 2 + 0.5 * 1
    assert ngram_entropy("A b, a b c!") == pytest.approx((2 / 3 * bigrams + 4 / 3 * math.log2(3)) / 2)
    different = " ".join(map(str, range(100)))
    assert ngram_entropy(different) == pytest.approx((2 / 3 * math.log2(99) + 4 / 3 * math.log2(98)) / 2)
    assert [ngram_entropy(text) for text in ("", "one", "one one one", "one two")] == [0, 0, 0, 0]


def test_a_classifier_is_asked_for_its_class(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=264, num_labels=3, **sizes)).eval()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    metric = ClassProbability(str(tmp_path), class_id=2, max_length=4)
    texts = ["a much longer text", "ab"]
    metric.update(texts)
    ids = [torch.tensor([byte_tokenizer()(text)["input_ids"][:4]]) for text in texts]
    expected = [model(input_ids=each).logits.softmax(-1)[0, 2].item() for each in ids]
    assert metric.values(texts).tolist() == pytest.approx(expected, rel=1e-5)
    assert metric.compute().item() == pytest.approx(50 * sum(expected), rel=1e-5)
    with pytest.raises(UserError, match="classifier: got 'no/such'"):
        ClassProbability("no/such").update(texts)
    with pytest.raises(UserError, match="class_id: got 3, allowed: 0 to 2"):  # before anything is scored
        check_score(f'class_probability(class_id=3, classifier="{tmp_path}")')
