"""Selective unlearning: its loss by hand and its limits, and what an unaware model or counts say of each token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.data import Toy, byte_tokenizer
from toys.losses import UNEQUAL, answers, check_by_hand, gradient, logit_gradient, mean, predictions, probabilities
from toys.models import bare_trainer, distance, norm, part, random_model

from lightning_ssiuu.datamodules.pairs import batch_of
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.objectives.displaced import DisplacedObjective
from lightning_ssiuu.objectives.elicited_unlearning import ElicitedUnlearning
from lightning_ssiuu.objectives.losses import answer_nll, gradient_ascent
from lightning_ssiuu.objectives.selective_unlearning import SelectiveUnlearning, above_unaware, held
from lightning_ssiuu.objectives.unaware import by_counting, by_model
from lightning_ssiuu.utils.errors import UserError

FORGET = part(UNEQUAL, 7)
CPU = torch.device("cpu")
LENGTHS = [answer for _, answer in UNEQUAL]


def some_levels() -> dict[int, Tensor]:
    drawn = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return dict(enumerate((-9 * drawn - 0.05).split(LENGTHS)))  # some above what a random model says, some below


# ---- the loss --------------------------------------------------------------------------------------------------------


class Whole(SelectiveUnlearning):
    """Both of its losses on the forget part in one."""

    def forget_loss(self, batch: Part) -> Tensor:
        return super().forget_loss(batch) + sum(weight * loss for weight, loss in self.kept_losses(batch).values())


@pytest.mark.parametrize(("margin", "held_weight"), [(0.0, 0.0), (1.0, 0.0), (3.0, 0.7), (9.0, 1.0)])
def test_losses_and_gradients_are_those_worked_out_by_hand(margin: float, held_weight: float) -> None:
    module, levels = Whole(margin=margin, held_weight=held_weight), some_levels()
    module._levels = levels

    def by_hand(model: nn.Module, original: nn.Module) -> Tensor:
        sequences = []
        for n, tokens in enumerate(predictions(model, FORGET)):
            terms = []
            for (z, y), level in zip(tokens, levels[n].tolist(), strict=True):
                q, log_p = math.exp(level), probabilities(z)[y].log()
                above = log_p - level + margin
                terms.append((1 - q) * above * (above > 0) - held_weight * q * log_p)
            sequences.append(mean(terms))
        return mean(sequences)

    check_by_hand(module, by_hand, FORGET, {})


class Nowhere(DisplacedObjective):
    """A forget gradient of zero."""

    def displaced_gradient(self, batch: Part) -> tuple[list[Tensor], Tensor]:
        return [torch.zeros_like(p) for p in self.model.parameters()], torch.zeros((), dtype=torch.float64)


def test_what_is_held_is_held_at_the_weights_as_they_are() -> None:
    selective = SelectiveUnlearning(retain_weight=0.0, held_weight=0.5)
    selective._levels = some_levels()
    module = Nowhere(backbone=selective)
    module.adopt(AnswerModel(random_model(vocab_size=260)), byte_tokenizer())
    logged: dict[str, Any] = {}
    module.log_training = logged.update  # type: ignore[method-assign]
    found = gradient(module.training_step({"forget": FORGET}, 0), module.model)
    levels = torch.cat(list(selective._levels.values()))
    wanted = gradient(0.5 * held(module(FORGET), levels), module.model)
    assert norm(wanted) > 1e-3
    assert distance(found, wanted) == 0
    assert logged["held_loss"].item() == held(module(FORGET), levels).item()


def test_what_nobody_would_say_is_pushed_as_by_gradient_ascent_and_what_everybody_would_is_held() -> None:
    some = answers(torch.randn(4, 9, dtype=torch.float64), [1, 2, 3, 4], [0, 0, 1, 1])
    never, always = torch.full((4,), -200.0, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    assert torch.equal(
        logit_gradient(lambda one: above_unaware(one, never, 1.0), some), logit_gradient(gradient_ascent, some)
    )
    assert (logit_gradient(lambda one: above_unaware(one, always, 1.0), some) == 0).all()
    assert held(some, always).item() == answer_nll(some).item()
    assert held(some, never).item() == pytest.approx(0.0, abs=1e-80)


def test_a_token_is_pushed_to_the_margin_and_no_further() -> None:
    level = torch.tensor([0.25], dtype=torch.float64).log()

    def moves(p: float, margin: float) -> bool:
        some = answers([[math.log(p), math.log(1 - p)]], [0])
        return bool(logit_gradient(lambda one: above_unaware(one, level, margin), some).abs().sum() > 0)

    assert [moves(p, 0.0) for p in (0.24, 0.26)] == [False, True]
    assert [moves(p, 1.0) for p in (0.24 / math.e, 0.26 / math.e)] == [False, True]


def test_rows_without_an_answer_do_not_count() -> None:
    some = text(([70, 71], [72]), ([80, 81], [82, 83]))
    some["labels"][0] = -100
    module = SelectiveUnlearning()
    module.adopt(AnswerModel(random_model(vocab_size=260)), byte_tokenizer())
    module._levels = {0: torch.tensor([-1.0]), 1: torch.tensor([-2.0, -3.0])}
    assert module.unaware_logps(some, module(some)).tolist() == [-2.0, -3.0]
    assert module.forget_loss(some).isfinite()


# ---- an unaware model ------------------------------------------------------------------------------------------------


def parts_of(forget: Part, retain: Part | None = None) -> Callable[[str], Iterator[Part]]:
    return lambda name: iter([forget] if name == "forget" else [] if retain is None else [retain])


def text(*pairs: tuple[list[int], list[int]]) -> dict[str, Tensor]:
    return batch_of(pairs, 0) | {"example_id": torch.arange(len(pairs))}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    random_model(vocab_size=260, seed=4, max_position_embeddings=40).save_pretrained(tmp_path / "unaware")
    byte_tokenizer().save_pretrained(tmp_path / "unaware")
    return str(tmp_path / "unaware")


def alone(folder: str, ids: list[int], n_answer: int) -> Tensor:
    """Log-probabilities of the last tokens by the model in a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return torch.stack([logps[k - 1, ids[k]] for k in range(len(ids) - n_answer, len(ids))])


def test_without_shots_it_says_what_the_model_says(folder: str) -> None:
    forget = text(([70, 71, 72], [73]), ([80, 81], [82, 83, 84]), ([], [90, 91, 92]))
    found = by_model(folder, byte_tokenizer(), torch.float64, CPU, parts_of(forget), shots=0)
    torch.testing.assert_close(found[0], alone(folder, [70, 71, 72, 73], 1))
    torch.testing.assert_close(found[1], alone(folder, [80, 81, 82, 83, 84], 3))
    # Without shots the first token of a passage is predicted from nothing, and does not count.
    torch.testing.assert_close(found[2], alone(folder, [90, 91, 92], 2))


def test_the_shots_are_retain_items_as_many_as_fit(folder: str) -> None:
    forget, retain = text(([70, 71], [72, 73]), ([60] * 30, [61] * 4)), text(([50, 51], [52]))
    found = by_model(folder, byte_tokenizer(), torch.float64, CPU, parts_of(forget, retain), shots=4)
    torch.testing.assert_close(found[0], alone(folder, [50, 51, 52, 70, 71, 72, 73], 2))
    torch.testing.assert_close(found[1], alone(folder, [50, 51, 52, *[60] * 30, *[61] * 4], 4))
    longer = text(([50] * 3, [52] * 4))  # 7 tokens before 34 do not fit into 40
    found = by_model(folder, byte_tokenizer(), torch.float64, CPU, parts_of(forget, longer), shots=4)
    torch.testing.assert_close(found[1], alone(folder, [*[60] * 30, *[61] * 4], 4))


def test_shots_are_drawn_by_seed_and_example(folder: str) -> None:
    forget = text(*[([70, 71], [72, 73])] * 6)
    retain = text(*[([40 + n], [50 + n]) for n in range(9)])

    def drawn(seed: int) -> Tensor:
        return torch.stack(
            list(by_model(folder, byte_tokenizer(), torch.float64, CPU, parts_of(forget, retain), 2, seed).values())
        )

    assert torch.equal(drawn(0), drawn(0))
    assert len(drawn(0).unique(dim=0)) > 1
    assert not torch.equal(drawn(0), drawn(1))


def test_other_tokens_and_missing_retain_items_are_refused(folder: str) -> None:
    forget = text(([70, 71], [72]))
    with pytest.raises(UserError, match="shots: got 4, allowed: 0 without a retain set"):
        by_model(folder, byte_tokenizer(), torch.float32, CPU, parts_of(forget))
    with pytest.raises(UserError, match=r"unaware: got '?tiny'?, allowed: a model with the same tokens"):
        by_model("tiny", byte_tokenizer(), torch.float32, CPU, parts_of(forget), shots=0)
    with pytest.raises(UserError, match=r"unaware: got .*a model of more than 40 positions: example id 0 is longer"):
        by_model(folder, byte_tokenizer(), torch.float32, CPU, parts_of(text(([70] * 40, [71]))), shots=0)
    with pytest.raises(UserError, match=r"unaware: got .*nowhere"):
        by_model("./nowhere", byte_tokenizer(), torch.float32, CPU, parts_of(forget), shots=0)


# ---- counts ----------------------------------------------------------------------------------------------------------


def test_counts_are_interpolated_as_witten_and_bell_do() -> None:
    retain = text(([9], [1, 2, 1, 3]))
    forget = text(([8], [1, 2]), ([7, 5], [4]))
    found = by_counting(parts_of(forget, retain))
    # Tokens of answers: 1 twice, 2 and 3 once; with one more for all that was never seen.
    one = (2 + 3 / 4) / (4 + 3)
    assert found[0][0].exp().item() == pytest.approx(one)  # 8 and 1 are not in any pair
    two = (1 + 2 * ((1 + 3 / 4) / (4 + 3))) / (2 + 2)  # after 1, which 2 and 3 followed
    assert found[0][1].exp().item() == pytest.approx(two)  # after 8 1: not seen
    assert found[1].exp().tolist() == pytest.approx([(0 + 3 / 4) / (4 + 3)])


def test_what_repeats_the_question_is_expected_as_often_as_it_came_true() -> None:
    retain = text(([1, 2], [1, 2]), ([3, 4], [3, 4]), ([5, 6], [5, 7]))
    forget = text(([11, 12], [11, 12, 13]))
    repeated = by_counting(parts_of(forget, retain))[0][1].exp().item()
    unseen = (0 + 6 / 7) / (6 + 6)  # of six tokens, all different
    # Two of three came true, and half of two more.
    assert repeated == pytest.approx(unseen + 3 / 5 * (1 - unseen))


def test_without_a_retain_set_there_is_nothing_to_count() -> None:
    with pytest.raises(UserError, match="unaware: got None, allowed: a checkpoint without a retain set"):
        by_counting(parts_of(text(([8], [1]))))


# ---- in training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elicited", [False, True])
def test_it_learns_what_the_unaware_model_says_before_the_first_step(elicited: bool, folder: str) -> None:
    random_model(vocab_size=260, seed=4, max_position_embeddings=400).save_pretrained(folder)
    selective = SelectiveUnlearning(unaware=folder, shots=1)
    module: Any = ElicitedUnlearning(backbone=selective) if elicited else selective
    module.adopt(AnswerModel(random_model(vocab_size=260)), byte_tokenizer())
    data = Toy()
    bare_trainer(2, limit_val_batches=0).fit(module, data)
    assert sorted(selective._levels) == sorted(one.example_id for one in data.splits.forget)
    assert all((level < 0).all() for level in selective._levels.values())
    assert module.global_step == 2
