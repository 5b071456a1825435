"""Expressions in x as text: prefix notation, checked and computed to 50 digits together with their derivative.

The derivative is that of forward accumulation, so that an answer is compared with no second program's algebra. Prefix
notation is that of Lample & Charton (Deep Learning for Symbolic Mathematics, 2019).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import mpmath

Task = Literal["derivative", "integral"]
SEPARATOR = ";"
BINARY = ("+", "-", "*", "/", "pow")
UNARY = ("sin", "cos", "exp", "log")
POINTS = (Fraction(3, 7), Fraction(11, 13), Fraction(19, 11))
"""Where two expressions are compared; positive, as logarithms and powers ask for it."""
DIGITS = 50
LARGEST = 10**15
"""No number on the way may be larger: what cancels then still leaves half of the digits."""
_TOLERANCE = 1e-25  # relative
_INTEGER = re.compile(r"-?[0-9]+")


class UndefinedError(Exception):
    """It has no real value at the point, or one on the way is larger than `LARGEST`."""


@dataclass(frozen=True)
class _Dual:
    """A value and its derivative by x, of mpmath."""

    value: Any
    slope: Any


def is_expression(text: str) -> bool:
    """Whether the text is one whole expression: operators before their operands, x and integers, blanks between."""
    needed = 1
    for word in (words := text.split()):
        if needed == 0:
            return False
        if word in BINARY:
            needed += 1
        elif word not in UNARY:
            if word != "x" and _INTEGER.fullmatch(word) is None:
                return False
            needed -= 1
    return bool(words) and needed == 0


def value_and_slope(text: str, point: Fraction) -> tuple[Any, Any]:
    """The expression and its derivative at x = `point`, numbers of mpmath with 50 digits.

    Args:
        text: for which `is_expression` holds.

    Raises:
        UndefinedError: it has none there.
    """
    with mpmath.workdps(DIGITS):
        stack: list[_Dual] = []
        for word in reversed(text.split()):
            if word in _COMPUTE:
                function, operands = _COMPUTE[word]
                try:
                    made = function(*(stack.pop() for _ in range(operands)))
                except (ZeroDivisionError, ValueError, OverflowError) as error:
                    raise UndefinedError(str(error)) from error
            elif word == "x":
                made = _Dual(mpmath.mpf(point.numerator) / point.denominator, mpmath.mpf(1))
            else:
                made = _Dual(mpmath.mpf(_integer(word)), mpmath.mpf(0))
            for number in (made.value, made.slope):
                if not isinstance(number, mpmath.mpf) or not abs(number) <= LARGEST:
                    raise UndefinedError(f"{word} gives {mpmath.nstr(number)}")
            stack.append(made)
        return stack[0].value, stack[0].slope


def same(one: Any, other: Any) -> bool:
    """Whether two numbers of mpmath agree to 25 digits."""
    with mpmath.workdps(DIGITS):
        return bool(abs(one - other) <= _TOLERANCE * max(abs(one), abs(other)))


def is_right(task: Task, question: str, answer: str) -> bool:
    """Whether the answer is the derivative of the question, or one of its integrals, at all of `POINTS`.

    Args:
        question, answer: for which `is_expression` holds.

    Raises:
        UndefinedError: the question has no value at one of them; an answer that has none is wrong.
    """
    for point in POINTS:
        value, slope = value_and_slope(question, point)
        try:
            answered, answered_slope = value_and_slope(answer, point)
        except UndefinedError:
            return False
        if not (same(slope, answered) if task == "derivative" else same(value, answered_slope)):
            return False
    return True


def _integer(word: str) -> int:
    if len(word) > len(str(LARGEST)) + 1:  # Python itself refuses those of thousands of digits
        raise UndefinedError(f"an integer of {len(word)} digits")
    return int(word)


def _power(base: _Dual, exponent: _Dual) -> _Dual:
    value = _real_power(base.value, exponent.value)
    slope = mpmath.mpf(0)
    if exponent.value == 1:  # of 0 too, where 0 to the power of 0 would be asked for
        slope += base.slope
    elif base.slope != 0:
        slope += exponent.value * _real_power(base.value, exponent.value - 1) * base.slope
    if exponent.slope != 0:
        slope += value * _logarithm(base.value) * exponent.slope
    return _Dual(value, slope)


def _real_power(base: Any, exponent: Any) -> Any:
    """Of mpmath, if its size can be seen to be at most about `LARGEST`, and it is real."""
    if base == 0:
        if exponent <= 0:
            raise UndefinedError("0 to the power of 0 or less")
        return mpmath.mpf(0)
    if exponent * mpmath.log(abs(base)) > _LARGEST_EXPONENT:
        raise UndefinedError("a power that is too large")
    return mpmath.power(base, exponent)


def _logarithm(x: Any) -> Any:
    if x <= 0:
        raise UndefinedError("the logarithm of 0 or less")
    return mpmath.log(x)


def _exponential(x: _Dual) -> _Dual:
    if x.value > _LARGEST_EXPONENT:
        raise UndefinedError("an exponential that is too large")
    value = mpmath.exp(x.value)
    return _Dual(value, value * x.slope)


_LARGEST_EXPONENT = 40  # e^40 is above `LARGEST`
_COMPUTE: dict[str, tuple[Callable[..., _Dual], int]] = {
    "+": (lambda a, b: _Dual(a.value + b.value, a.slope + b.slope), 2),
    "-": (lambda a, b: _Dual(a.value - b.value, a.slope - b.slope), 2),
    "*": (lambda a, b: _Dual(a.value * b.value, a.slope * b.value + a.value * b.slope), 2),
    "/": (lambda a, b: _Dual(a.value / b.value, (a.slope - a.value / b.value * b.slope) / b.value), 2),
    "pow": (_power, 2),
    "sin": (lambda a: _Dual(mpmath.sin(a.value), mpmath.cos(a.value) * a.slope), 1),
    "cos": (lambda a: _Dual(mpmath.cos(a.value), -mpmath.sin(a.value) * a.slope), 1),
    "exp": (_exponential, 1),
    "log": (lambda a: _Dual(_logarithm(a.value), a.slope / a.value), 1),
}


def split_line(line: str) -> tuple[str, str] | None:
    """Question and answer of a line; None where there is no separator, or more than one."""
    parts: Sequence[str] = line.split(SEPARATOR)
    return (parts[0].strip(), parts[1].strip()) if len(parts) == 2 else None
