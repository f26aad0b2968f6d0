"""What a forward pass says about answers, on numbers that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_ssiuu.models.answers import Answers, mean_over_answers, sequence_sums, target_logps
from lightning_ssiuu.utils.errors import UserError

#: Two answers of two tokens and one; all four tokens of the vocabulary are equally likely.
ANSWERS = Answers(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2)


def test_derived_values() -> None:
    torch.testing.assert_close(ANSWERS.logps.exp(), torch.tensor([1 / 16, 1 / 4]))
    torch.testing.assert_close(ANSWERS.mean_logps.exp(), torch.tensor([1 / 4, 1 / 4]))
    assert ANSWERS.lengths.tolist() == [2.0, 1.0]
    assert ANSWERS.token_correct.tolist() == [True, False, False]


def test_sums_and_means_over_answers() -> None:
    values = torch.tensor([1.0, 2.0, 5.0])
    assert sequence_sums(values, ANSWERS.sequence_index, 3).tolist() == [3.0, 5.0, 0.0]
    assert mean_over_answers(values, ANSWERS).item() == 3.25  # (1.5 + 5) / 2
    assert mean_over_answers(values, ANSWERS, torch.tensor([False, True, False])).item() == 1.0  # (2 + 0) / 2


def test_targets() -> None:
    assert torch.equal(target_logps(ANSWERS, "sequence"), ANSWERS.logps)
    assert torch.equal(target_logps(ANSWERS, "length_normalised"), ANSWERS.mean_logps)
    unknown: Any = "odds"
    with pytest.raises(UserError, match="target: got 'odds'"):
        target_logps(ANSWERS, unknown)
