"""Which records of a table are meant by a condition on their columns, such as ``customer_id == 17``."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from lightning_ssiuu.datamodules.readers import Record, cell_of
from lightning_ssiuu.utils.errors import Given, UserError

_ORDER: Mapping[type, Callable[[Any, Any], bool]] = {
    **{ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
}
_BACKTICKS = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|`([^`]+)`")
_TRUTH = {"true": True, "false": False}
_ALLOWED = (
    "columns, numbers and quoted texts compared by ==, !=, <, <=, >, >=, in or not in, joined by and, or, not, such as "
    "\"customer_id == 17 and state in ('open', 'closed')\""
)


class Predicate:
    """A condition on the columns of a table, in Python's words; nothing but what stands below is understood.

    Columns are named as they are, or between backticks where that is no name of Python's (`` `Customer ID` == 17 ``).
    They are compared with numbers, quoted texts, ``True``, ``False``, ``None`` (also an empty cell), tuples of them
    after ``in`` and ``not in``, and each other. A text cell beside a number is read as one, for CSV has no others. Text
    is ordered as text, so dates such as ``2024-07-26`` are, too. A missing cell is neither less nor more than anything.

    Args:
        text: The condition.
        argument: What it was given for, for error messages.

    Raises:
        UserError: Anything else, when it is made; when it is called, a missing column, or a cell that cannot be ordered
            against a number or be taken for true or false. Names record and column, never a cell's text.

    Example:
        >>> chosen = Predicate("age >= 18 and not (`Home town` in ('Ghent', 'Bruges'))")
        >>> chosen({"age": "19", "Home town": "Liège"}, 0), chosen({"age": 19, "Home town": "Ghent"}, 1)
        (True, False)
        >>> Predicate("__import__('os').system('ls')")
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: forget_where: got "__import__('os').system('ls')", allowed: columns, numbers and ...
    """

    def __init__(self, text: str, argument: str = "forget_where") -> None:
        self.text, self.argument = text, argument
        self._named: dict[str, str] = {}  # columns between backticks, by the names that stand for them
        try:
            self._condition = ast.parse(_BACKTICKS.sub(self._stand_in, text.strip()), mode="eval").body
            self._check(self._condition)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise UserError(argument, text, _ALLOWED) from None

    def __call__(self, record: Record, number: int) -> bool:
        """Whether it holds for a record, which is the table's ``number``-th."""
        return self._truth(self._condition, record, number)

    def _stand_in(self, match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        name = f"_column_{len(self._named)}_"
        self._named[name] = match[1]
        return name

    def _check(self, node: ast.AST) -> None:
        # Raises a ValueError at what is not understood.
        match node:
            case ast.BoolOp(values=nodes):
                pass
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                nodes = [operand]
            case ast.Compare(left=left, ops=ops, comparators=others):
                for op, other in zip(ops, others, strict=True):
                    listed = isinstance(op, (ast.In, ast.NotIn))
                    if isinstance(op, (ast.Is, ast.IsNot)) or listed != isinstance(
                        other, (ast.Tuple, ast.List, ast.Set)
                    ):
                        raise ValueError
                nodes = [left, *others]
            case ast.Tuple(elts=nodes) | ast.List(elts=nodes) | ast.Set(elts=nodes):
                if not all(isinstance(_constant(each), (str, int, float)) for each in nodes):
                    raise ValueError
            case ast.Name():
                return
            case _:
                _constant(node)
                return
        for each in nodes:
            self._check(each)

    def _truth(self, node: ast.AST, record: Record, number: int) -> bool:
        match node:
            case ast.BoolOp(op=ast.And(), values=nodes):
                return all(self._truth(each, record, number) for each in nodes)
            case ast.BoolOp(values=nodes):
                return any(self._truth(each, record, number) for each in nodes)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._truth(operand, record, number)
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [left, *others]
                compared = zip(ops, sides[:-1], others, strict=True)
                return all(self._compared(op, one, other, record, number) for op, one, other in compared)
        value = self._value(node, record)
        if isinstance(value, str):
            value = _TRUTH.get(value.strip().casefold())
        if not isinstance(value, (bool, int, float)):
            raise self._refusal(node, number, "true or false")
        return bool(value)

    def _compared(self, op: ast.cmpop, left: ast.AST, right: ast.AST, record: Record, number: int) -> bool:
        one = self._value(left, record)
        if isinstance(op, (ast.In, ast.NotIn)):
            found = any(_equal(one, _constant(each)) for each in right.elts)  # type: ignore[attr-defined]
            return found == isinstance(op, ast.In)
        other = self._value(right, record)
        if isinstance(op, (ast.Eq, ast.NotEq)):
            return _equal(one, other) == isinstance(op, ast.Eq)
        one, other = _alike(one, other)
        if one is None or other is None:
            return False
        try:
            return _ORDER[type(op)](one, other)
        except TypeError:
            place = left if isinstance(one, str) and isinstance(left, ast.Name) else right
            raise self._refusal(place, number, "a number, to be compared with one") from None

    def _value(self, node: ast.AST, record: Record) -> Any:
        if not isinstance(node, ast.Name):
            return _constant(node)
        value = cell_of(record, self._named.get(node.id, node.id), self.argument)
        if value is None or value != value or value == "":
            return None
        if isinstance(value, (str, bool, int, float)):
            return value
        return value.isoformat() if hasattr(value, "isoformat") else str(value)

    def _refusal(self, node: ast.AST, number: int, allowed: str) -> UserError:
        name = self._named.get(node.id, node.id) if isinstance(node, ast.Name) else self.text
        return UserError(self.argument, Given(f"record {number} of {name!r}"), allowed)


def _constant(node: ast.AST) -> Any:
    match node:
        case ast.Constant(value=str() | bool() | int() | float() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    raise ValueError


def _alike(one: Any, other: Any) -> tuple[Any, Any]:
    # A text beside a number is read as one, beside a truth value as one, where it is one.
    if isinstance(one, str) and isinstance(other, (bool, int, float)):
        one = _read_like(one, other)
    elif isinstance(other, str) and isinstance(one, (bool, int, float)):
        other = _read_like(other, one)
    return one, other


def _read_like(text: str, value: float) -> Any:
    if isinstance(value, bool):
        return _TRUTH.get(text.strip().casefold(), text)
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _equal(one: Any, other: Any) -> bool:
    one, other = _alike(one, other)
    return one == other
