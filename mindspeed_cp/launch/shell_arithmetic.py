"""Arithmetic of the shell, `$((...))`: whole numbers with the operators that Python and bash share.

Comparisons, the ternary operator and octal or hexadecimal numbers are not computed, assignments only told apart.
"""

import ast
import operator
import re
from collections.abc import Callable

from mindspeed_cp.launch.reading import Field

_ASSIGNMENT = re.compile(
    r"\b([A-Za-z_]\w*)(?:\[[^\]]*\])?\s*(?:(?:<<|>>|[-+*/%&|^])?=(?!=)|\+\+|--)|(?:\+\+|--)\s*([A-Za-z_]\w*)"
)


class UnknownNumberError(Exception):
    """A variable in an expression that is not set, or, with `why`, whose value is not known."""

    def __init__(self, name: str, why: str = "") -> None:
        super().__init__(why)
        self.name = name


def names_assigned(expression: str) -> list[str]:
    """The variables that an arithmetic expression changes."""
    return [name for names in _ASSIGNMENT.findall(expression) for name in names if name]


def compute(expression: str, look_up: Callable[[str], Field | None]) -> int:
    """The value of an expression that assigns nothing.

    look_up: the value of a variable by its name; None where it is not set.

    Raises UnknownNumberError; ValueError where it is no arithmetic, or of a kind that is not computed here.
    """
    try:
        # Bash divides whole numbers.
        return _number(ast.parse(expression.strip().replace("/", "//"), mode="eval").body, look_up)
    except (SyntaxError, TypeError, ZeroDivisionError) as error:
        raise ValueError(expression) from error


def _number(node: ast.expr, look_up: Callable[[str], Field | None]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        value = look_up(node.id)
        if value is None:
            raise UnknownNumberError(node.id)
        for fragment in value.unresolved:
            raise UnknownNumberError(fragment.name, fragment.why)
        return _number(ast.parse(value.text.strip(), mode="eval").body, look_up)
    # Bash takes -2 ** 2 for (-2) ** 2.
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY and not _is_power(node.operand):
        return _UNARY[type(node.op)](_number(node.operand, look_up))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_number(node.left, look_up), _number(node.right, look_up))
    raise ValueError(node)


def _is_power(node: ast.expr) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)


def _towards_zero(dividend: int, divisor: int) -> int:
    quotient = abs(dividend) // abs(divisor)
    return quotient if (dividend < 0) == (divisor < 0) else -quotient


_UNARY: dict[type[ast.unaryop], Callable[[int], int]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
}
_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: _towards_zero,
    ast.Mod: lambda dividend, divisor: dividend - divisor * _towards_zero(dividend, divisor),
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
