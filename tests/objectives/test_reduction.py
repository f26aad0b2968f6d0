"""``reduction: token``: losses over all answer tokens alike, against those of the sequences one by one, in float64.

Several ranks are in training/test_distributed.py, one backward pass for loss and penalty in test_single_pass.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.data import byte_tokenizer
from toys.losses import UNEQUAL, gradient, log_probability, predictions, total, with_models
from toys.models import answer_model, bare_trainer, batch, distance, loader, part, weights

from lightning_ssiuu.models.answers import Answers, mean_over_answers
from lightning_ssiuu.objectives import UnlearningModule, objectives
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.objectives.klue import unforgotten_ascent
from lightning_ssiuu.objectives.npo import NPO
from lightning_ssiuu.objectives.pdu import PDU
from lightning_ssiuu.objectives.sam import SAM
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.utils.errors import UserError

LENGTHS = [length for _, length in UNEQUAL]
EQUAL = [(3, 3), (5, 3), (2, 3), (7, 3)]
#: Name, options, whether it is the forget loss, and how many tokens of an answer do not count.
LOSSES: list[tuple[str, dict[str, Any], bool, int]] = [
    *((name, {}, True, 0) for name in ("GradientDifference", "SatImp", "UNDIAL", "PDU")),
    ("CEU", {}, True, 1),
    ("NPO", {}, False, 0),
    ("NPO", {"retain": "kl"}, False, 0),
]
named = pytest.mark.parametrize(("name", "options", "forgets", "skipped"), LOSSES, ids=str)


def both(name: str, options: dict[str, Any], forgets: bool) -> Any:
    """An objective's loss of either kind by part, and the model, the same in both."""
    found, model = [], nn.Module()
    for reduction in ("token", "sequence"):
        module = objectives()[name](reduction=reduction, **options)
        model, _ = with_models(module)
        found.append((module.forget_loss if forgets else module.retain_loss, model))
    return found


def row(some: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    return {key: value[number : number + 1] for key, value in some.items()}


@named
def test_every_token_counts_alike(name: str, options: dict[str, Any], forgets: bool, skipped: int) -> None:
    (by_token, model), (alone, other) = both(name, options, forgets)
    some, counts = part(UNEQUAL, 7), [length - skipped for length in LENGTHS]
    loss, expected = by_token(some), total([n * alone(row(some, k)) for k, n in enumerate(counts)]) / sum(counts)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.item() != pytest.approx(alone(some).item(), rel=1e-3)
    wanted = gradient(expected, other)
    assert distance(gradient(loss, model), wanted) < 1e-11


@pytest.mark.parametrize(("name", "options", "forgets", "skipped"), [LOSSES[0], LOSSES[-1]], ids=str)
def test_answers_of_one_length_make_no_difference(
    name: str, options: dict[str, Any], forgets: bool, skipped: int
) -> None:
    (by_token, _), (by_sequence, _) = both(name, options, forgets)
    some = part(EQUAL, 7)
    assert by_token(some).item() == pytest.approx(by_sequence(some).item(), rel=1e-12)


def test_by_hand() -> None:
    module = GradientDifference(reduction="token")
    model, _ = with_models(module)
    some = part(UNEQUAL, 7)
    by_hand = total([log_probability(tokens) for tokens in predictions(model, some)]) / sum(LENGTHS)
    assert module.forget_loss(some).item() == pytest.approx(by_hand.item(), rel=1e-12)
    assert module.retain_loss(some).item() == pytest.approx(-by_hand.item(), rel=1e-12)


def test_tokens_that_do_not_count_are_in_neither_sum() -> None:
    some = Answers(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), torch.tensor([0, 0, 0, 2]), 3)  # row 1 is empty
    values, counted = torch.tensor([8.0, 1.0, 3.0, 5.0]), torch.tensor([False, True, True, True])
    assert mean_over_answers(values, some, counted, "token").item() == 3.0
    assert mean_over_answers(values, some, ~counted & False, "token").item() == 0.0


@pytest.mark.parametrize("name", sorted(objectives()))
def test_each_objective_takes_it_or_refuses_it(name: str) -> None:
    kind, some = objectives()[name], part(UNEQUAL, 7)
    if not kind.takes_token_means:
        with pytest.raises(
            UserError, match=f"reduction: got 'token', allowed: \"sequence\", the default: {name} weighs"
        ):
            kind(reduction="token")
        return
    losses = []
    for reduction in ("token", "sequence"):
        module: UnlearningModule = kind(reduction=reduction)
        with_models(module)
        with torch.no_grad():
            losses.append(module.retain_loss(some).item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_klue_leaves_forgotten_answers_out_of_the_sum_alone() -> None:
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    some = Answers(logits, torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1]), 2)  # the second answer is wrong
    expected = 2 * logits[0].log_softmax(-1)[0] / 3
    assert unforgotten_ascent(some, reduction="token").item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_loss_of_whole_sequences_stays_as_it_is() -> None:
    (by_token, _), (by_sequence, _) = both("NPO", {}, True)
    some = part(UNEQUAL, 7)
    assert by_token(some).item() == by_sequence(some).item()


def test_a_backbone_brings_it() -> None:
    assert SSIUU(reduction="token").backbone.reduction == "token"  # type: ignore[union-attr]
    assert SSIUU(backbone=NPO(reduction="token")).reduction == "token"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GradientDifference(reduction="tokens"), "reduction: got 'tokens', allowed: "),  # type: ignore[arg-type]
        (lambda: SAM(backbone=NPO(reduction="token")), "backbone.reduction: got 'token', allowed: \"sequence\""),
        (lambda: SSIUU(backbone=NPO(), reduction="token"), "reduction: got 'token', allowed: unset beside a backbone"),
    ],
)
def test_is_refused(make: Any, said: str) -> None:
    with pytest.raises(UserError) as refused:
        make()
    assert str(refused.value).startswith(said)


def test_micro_batches_are_averaged_whatever_their_tokens() -> None:
    module = GradientDifference(reduction="token", optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    module.adopt(answer_model(num_hidden_layers=1).train(), byte_tokenizer())
    batches, before = [batch(0, [(3, 6), (2, 1)]), batch(1, [(4, 2)])], weights(module.model)
    losses = [module.forget_loss(one["forget"]) + module.retain_loss(one["retain"]) for one in batches]
    step = gradient(total(losses) / 2, module.model)
    bare_trainer(1, accumulate_grad_batches=2).fit(module, loader(batches))
    expected = [p - 0.1 * g for p, g in zip(before, step, strict=True)]
    assert distance(weights(module.model), expected) < 1e-12


def test_the_bound_of_pdu_is_of_the_retain_set_s_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    module = PDU(reduction="token", tolerance=0.5)
    with_models(module)
    bare_trainer(0).fit(module, loader([batch(0)]))  # a Trainer to ask for the precision
    some = part(UNEQUAL, 7)
    monkeypatch.setattr(module, "training_parts", lambda name: (row(some, k) for k in range(len(LENGTHS))))
    assert module._loss_on_retain_set() == pytest.approx(module.retain_loss(some).item(), rel=1e-6)
