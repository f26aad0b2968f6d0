"""Tools of objectives that move the weights, on numbers that can be worked out by hand."""

from __future__ import annotations

import torch
from torch import nn

from lightning_ssiuu.models.answers import Answers
from lightning_ssiuu.training.perturbation import (
    add_gradients,
    answered_rows,
    displaced,
    gradient_at,
    move,
    place,
    rows_of,
    share_of_mean,
)


def test_weights_are_placed_moved_and_put_back() -> None:
    layer = nn.Linear(1, 1, bias=False)
    place([layer.weight], [torch.ones(1, 1)])
    with displaced(layer) as parameters:
        move(parameters, [torch.ones(1, 1)], -0.25)
        assert layer.weight.item() == 0.75
    assert layer.weight.item() == 1.0


def test_gradients_beside_the_one_that_trains() -> None:
    layer, unused = nn.Linear(2, 1, bias=False), nn.Parameter(torch.zeros(1))
    layer.weight.grad = torch.full((1, 2), 7.0)
    gradients = gradient_at(layer(torch.ones(1, 2)).sum(), [layer.weight, unused], layer)
    assert [g.tolist() for g in gradients] == [[[1.0, 1.0]], [0.0]]
    assert layer.weight.grad.tolist() == [[7.0, 7.0]]
    add_gradients([layer.weight, unused], gradients)
    assert layer.weight.grad.tolist() == [[8.0, 8.0]]
    assert unused.grad is not None


def test_rows_of_a_part() -> None:
    labels = torch.tensor([[-100, 5], [-100, -100], [-100, 6]])
    rows = answered_rows({"labels": labels})
    assert rows.tolist() == [0, 2]
    assert torch.equal(rows_of({"labels": labels}, rows)["labels"], labels[[0, 2]])
    answers = Answers(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2)
    some = answers.only(torch.tensor([False, True]))
    assert (some.targets.tolist(), some.sequence_index.tolist(), some.n_sequences) == ([2], [0], 1)


def test_a_rank_without_rows_runs_one_that_counts_nothing() -> None:
    rows, share = share_of_mean(torch.tensor([1, 3]))
    assert (rows.tolist(), share) == ([1, 3], 1.0)
    rows, share = share_of_mean(torch.tensor([], dtype=torch.long))
    assert (rows.tolist(), share) == ([0], 0.0)
