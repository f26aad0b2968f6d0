"""The condition that chooses rows of a table: what it says, and that nothing else is understood."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from lightning_ssiuu.datamodules.predicate import Predicate
from lightning_ssiuu.utils.errors import UserError

ROW: dict[str, Any] = {
    **{"n": 17, "x": 1.5, "text": "open", "number": "17", "padded": "017", "flag": True, "said": "False", "none": None},
    **{"empty": "", "nan": float("nan"), "day": datetime.date(2024, 7, 26), "a b": "c`d", "other": 17},
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n == 17", True), ("n == '17'", True), ("n != 17", False), ("17 == n", True), ("n == other", True),
        ("number == 17", True), ("number == '17'", True), ("padded == 17", True), ("padded == '17'", False),
        ("padded == '017'", True), ("text == 17", False), ("text != 17", True), ("number < 18.5", True),
        ("10 < n <= 17", True), ("10 < n < 17", False), ("n >= 17 and x > 1", True), ("n > 17 or text == 'open'", True),
        ("not n == 17", False), ("not (n > 17 or x > 2)", True), ("n in (1, 17)", True), ("number in [1, 17]", True),
        ("text in {'open', 'shut'}", True), ("text not in ('shut',)", True), ("n in ()", False), ("n == -17", False),
        ("flag", True), ("flag == True", True), ("said", False), ("not said", True), ("said == False", True),
        ("none == None", True), ("empty == None", True), ("nan == None", True), ("text != None", True),
        ("none > 3", False), ("none <= 3", False), ("empty < 3", False), ("none == 3", False), ("none != 3", True),
        ("day == '2024-07-26'", True), ("day < '2024-08'", True), ("text < 'p'", True),
        ("`a b` == 'c`d'", True), ("`n` == 17", True), ("text == '`n`'", False), ("True", True), (" n == 17 ", True),
    ],
)  # fmt: skip
def test_conditions(text: str, expected: bool) -> None:
    assert Predicate(text)(ROW, 0) is expected


@pytest.mark.parametrize(
    "text",
    [
        "", "n =", "n = 17", "n == 17; 1", "(n == 17", "len(text) == 4", "text.upper() == 'OPEN'", "text[0] == 'o'",
        "n + 1 == 18", "n is 17", "lambda: n", "n if n else n", "[n for n in (1,)]", "f'{n}' == '17'", "(n := 17)",
        "n in text", "n in 17", "n == (17,)", "(n, 1) == 17", "n in (x, 17)", "n in ((1,), 17)", "n in (None,)", "~n",
        "`n == 17", "b'x' == text", "1j == n", "__import__('os').system('true')", "not " * 3000 + "n", "(" * 500 + "n",
        "n == 17\nn == 18", "x and", "-text == 'a'", "n == ...", "*n", "n\0== 17", "+n",
    ],
)  # fmt: skip
def test_nothing_else_is_understood(text: str) -> None:
    with pytest.raises(UserError, match=r"^forget_where: got .*, allowed: columns, numbers and quoted texts") as error:
        Predicate(text)(ROW, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gone == 17", "got 'gone', allowed: "),
        ("`a c` == 17", "got 'a c', allowed: "),
        ("text > 17", "got record 3 of 'text', allowed: a number"),
        ("17 > text", "got record 3 of 'text', allowed: a number"),
        ("n < 'a'", "got record 3 of \"n < 'a'\", allowed: a number"),
        ("text", "got record 3 of 'text', allowed: true or false"),
        ("not none", "got record 3 of 'none', allowed: true or false"),
        ("n == 17 and `a b`", "got record 3 of 'a b', allowed: true or false"),
        ("'text'", "got record 3 of \"'text'\", allowed: true or false"),
    ],
)
def test_rows_of_which_it_cannot_be_told(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        Predicate(text)(ROW, 3)
    assert "open" not in str(error.value)
