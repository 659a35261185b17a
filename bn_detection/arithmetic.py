"""Lists of numbers written as arithmetic, computed without running code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from typing import Any

_OPERATORS: Mapping[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_LARGEST = 1e6
_LARGEST_POWER = 64
_MOST_ITEMS, _MOST_NAMES = 1000, 2


def compute(text: str) -> Any:
    """The value of numbers, ``+ - * / **``, lists, tuples, and ``[... for x in ...]`` of them.

    Args:
        text: such as ``[[x, x * 2**(1.0/3)] for x in [32, 64]]``.

    Raises:
        ValueError: there is anything else in it, or a number above a million.
    """
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, {})
    except (SyntaxError, ArithmeticError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r:.80} is no list of numbers: {error}") from error


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number):
            return _checked(number)
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.List(elts=items):
            return [_value(item, names) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item, names) for item in items)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _checked(_OPERATORS[type(op)](_number(operand, names)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            one, other = _number(left, names), _number(right, names)
            if isinstance(op, ast.Pow) and abs(other) > _LARGEST_POWER:
                raise ValueError(f"{ast.unparse(node)!r:.80} has a number above {_LARGEST_POWER}.")
            return _checked(_OPERATORS[type(op)](one, other))
        case ast.ListComp(
            elt=item,
            generators=[ast.comprehension(target=ast.Name(id=name), iter=values, ifs=[])],
        ):
            found = _value(values, names)
            is_list = isinstance(found, list | tuple) and len(found) <= _MOST_ITEMS
            if not is_list or len(names) >= _MOST_NAMES:
                raise ValueError(f"{ast.unparse(values)!r:.80} is no list of numbers.")
            return [_value(item, {**names, name: value}) for value in found]
    raise ValueError(f"{ast.unparse(node)!r:.80} is no list of numbers.")


def _number(node: ast.expr, names: Mapping[str, Any]) -> Any:
    value = _value(node, names)
    if not isinstance(value, int | float):
        raise ValueError(f"{ast.unparse(node)!r:.80} is no number.")
    return value


def _checked(value: Any) -> Any:
    """Within what a config has, so that nothing takes long."""
    if isinstance(value, complex) or not abs(value) <= _LARGEST:
        raise ValueError(f"{value!r:.20} is above a million.")
    return value
