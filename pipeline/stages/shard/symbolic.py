"""Lines of symbolic mathematics: an expression and its derivative, or the same pair the other way round.

Expressions are random trees of unary and binary operators; integrals are derivatives read backwards, as in Lample &
Charton (Deep Learning for Symbolic Mathematics, 2019).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sympy

from polytrope.pipeline.data.expressions import (
    BINARY,
    POINTS,
    SEPARATOR,
    UNARY,
    Task,
    UndefinedError,
    value_and_slope,
)
from polytrope.pipeline.stage import StageContext
from polytrope.pipeline.stages.shard.corpus import Documents, SymbolicSource
from polytrope.pipeline.stages.shard.parallel import parallel_map
from polytrope.pipeline.stages.shard.text_files import TEXT, column_of, write_table

LINES_PER_TASK = 500
_LEAF = 0.25  # how often a tree ends before its depth does
_X = 0.6  # how many of its ends are x
_INTEGERS = 5
_SMALLEST = 1e-9  # a derivative below it leaves too few digits to compare
_VARIABLE = sympy.Symbol("x", positive=True)
_OPERATORS = (*BINARY, *UNARY)
Tree = tuple[Any, ...] | str


@dataclass(frozen=True)
class LinesTask:
    """Rows `first` … `last` - 1 of a source."""

    task: Task
    seed: int
    depth: int
    first: int
    last: int


def draw_documents(context: StageContext, source: SymbolicSource, cache: Path) -> tuple[Documents, dict[str, int]]:
    """Every line is a document; those that were drawn before are left out.

    Args:
        cache: gets the Arrow file.

    Returns:
        The lines, in the order of their rows, and how many were left out.
    """
    starts = range(0, source.count, LINES_PER_TASK)
    tasks = (
        LinesTask(source.task, source.seed, source.depth, first, min(source.count, first + LINES_PER_TASK))
        for first in starts
    )
    lines: dict[str, None] = {}
    for done, drawn in enumerate(parallel_map(context, draw_lines, tasks), start=1):
        lines.update(dict.fromkeys(drawn))
        context.progress(done / len(starts), 3, f"{min(source.count, done * LINES_PER_TASK)} of {source.count} lines")
    documents = Documents((str(write_table(iter([column_of(list(lines))]), cache)),), TEXT)
    repeated = source.count - len(lines)
    return documents, {"lines that were drawn before": repeated} if repeated else {}


def draw_lines(task: LinesTask) -> list[str]:
    """The lines of these rows; a row's line depends on seed, depth and its number alone."""
    lines = []
    for row in range(task.first, task.last):
        pair = draw_pair(task.seed, row, task.depth)
        lines.append(f" {SEPARATOR} ".join(pair if task.task == "derivative" else reversed(pair)))
    return lines


def draw_pair(seed: int, row: int, depth: int) -> tuple[str, str]:
    """An expression and its derivative, in prefix notation.

    Those without a value at one of `POINTS`, or whose derivative is 0 there or nearly, are drawn again.
    """
    for expression in _expressions(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, row])), depth):
        text = " ".join(_words(expression))
        try:
            # before sympy sees it, which would write out 5 to the power of 5 to the power of 5
            slopes = [value_and_slope(text, point)[1] for point in POINTS]
        except UndefinedError:
            continue
        if min(map(abs, slopes)) < _SMALLEST:
            continue
        derivative = prefix(sympy.diff(_built(expression), _VARIABLE))
        if derivative is not None and _has_values(derivative):
            return text, derivative
    raise AssertionError("there is always another expression")


def _has_values(text: str) -> bool:
    try:
        for point in POINTS:
            value_and_slope(text, point)
    except UndefinedError:
        return False
    return True


def _expressions(random: np.random.Generator, depth: int) -> Iterator[Tree]:
    while True:
        yield _draw(random, depth, ends=False)


def _draw(random: np.random.Generator, depth: int, *, ends: bool) -> Tree:
    if depth == 0 or (ends and random.random() < _LEAF):
        return "x" if random.random() < _X else str(random.integers(1, _INTEGERS + 1))
    operator = _OPERATORS[random.integers(len(_OPERATORS))]
    operands = 2 if operator in BINARY else 1
    return (operator, *(_draw(random, depth - 1, ends=True) for _ in range(operands)))


def _words(tree: Tree) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
        return
    yield tree[0]
    for operand in tree[1:]:
        yield from _words(operand)


_BUILD = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "exp": sympy.exp,
    "log": sympy.log,
}


def _built(tree: Tree) -> Any:
    if isinstance(tree, str):
        return _VARIABLE if tree == "x" else sympy.Integer(tree)
    return _BUILD[tree[0]](*map(_built, tree[1:]))


def prefix(expression: Any) -> str | None:
    """A sympy expression in x in prefix notation, sums and products from the left; None of one with other functions."""
    if expression.is_Symbol:
        return "x"
    if expression.is_Integer:
        return str(expression)
    if expression is sympy.S.Exp1:
        return "exp 1"
    if expression.is_Add:
        terms = expression.as_ordered_terms()
        signs = ["-" if place and term.could_extract_minus_sign() else "+" for place, term in enumerate(terms)]
        return _folded(signs, [-term if sign == "-" else term for sign, term in zip(signs, terms, strict=True)])
    if expression.is_Rational or expression.is_Mul or expression.is_Pow:
        numerator, denominator = sympy.fraction(expression)
        if denominator != 1:
            return _folded(["", "/"], [numerator, denominator])
        if expression.is_Pow:
            return _folded(["", "pow"], expression.args)
        number, rest = expression.as_coeff_Mul()  # `as_ordered_factors` would take -2 for -1 times 2
        factors = [number, *rest.as_ordered_factors()] if number != 1 else rest.as_ordered_factors()
        return _folded(["*"] * len(factors), factors)
    name = expression.func.__name__
    inner = prefix(expression.args[0]) if name in UNARY and len(expression.args) == 1 else None
    return None if inner is None else f"{name} {inner}"


def _folded(operators: list[str], operands: Any) -> str | None:
    """((a ∘ b) ∘ c) …; the first operator stands before nothing."""
    found: str | None = None
    for place, (operator, operand) in enumerate(zip(operators, operands, strict=True)):
        text = prefix(operand)
        if text is None:
            return None
        found = text if place == 0 else f"{operator} {found} {text}"
    return found
