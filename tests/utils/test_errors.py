"""The checks of numbers and words, and the exceptions behind an exception."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest

from lightning_ssiuu.utils.errors import (
    Given,
    UserError,
    causes,
    check_at_least,
    check_choice,
    check_number,
    naming,
)


@pytest.mark.parametrize(
    ("check", "refused", "said"),
    [
        (lambda value: check_number("b", value, positive=True), 0.0, "b: got 0.0, allowed: a finite number > 0"),
        (lambda value: check_number("b", value), math.inf, "b: got inf, allowed: a finite number ≥ 0"),
        (lambda value: check_choice("b", value, Literal["c", "d"]), "e", "b: got 'e', allowed: one of ['c', 'd']"),
        (lambda value: check_at_least("b", value, 1), 0, "b: got 0, allowed: a number ≥ 1"),
        (lambda value: check_at_least("b", value, 1), math.nan, "b: got nan, allowed: a number ≥ 1"),
    ],
)
def test_checks(check: Any, refused: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        check(refused)
    assert str(error.value) == said
    check("c" if isinstance(refused, str) else 1)


def test_causes_go_on_behind_an_exception() -> None:
    with pytest.raises(RuntimeError) as error:
        raise RuntimeError("writing failed") from OSError("no room")
    assert [str(cause) for cause in causes(error.value)] == ["writing failed", "no room"]


def test_only_a_checkpoint_takes_the_name_of_its_argument() -> None:
    for argument, named in (("checkpoint", "oracle"), ("p", "p")):
        with pytest.raises(UserError, match=rf"^{named}: got 0 examples, allowed: a model$"), naming("oracle"):
            raise UserError(argument, Given("0 examples"), "a model")
