"""`when:` expressions: comparisons of parameters and of the summary metrics of earlier stages, nothing else.

    when: ${params.finetune}
    when: stages.baseline["val/loss"] < 3.5 and params.degree > 2

Names: `params.NAME`, `matrix.NAME`, `stages.STAGE.METRIC` (or `stages["train[degree=3]"]["val/loss"]`).
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.text import suggest

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, group: item in group,
    ast.NotIn: lambda item, group: item not in group,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None, "infinity": math.inf, "nan": math.nan}
_SCOPES = ("params", "matrix", "stages")
_HINT = (
    "for example `params.degree > 2 and stages.train.loss < 3`; the operators are and or not == != < <= > >= in + - * /"
)


def parse_condition(text: str) -> ast.expr:
    """The syntax tree of a condition, refused if it holds anything but the accepted operators.

    Raises:
        UserError: not an expression, or one that calls, assigns, …
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise UserError(f"`{text}` is not a condition", _HINT) from None
    allowed = (
        ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.BinOp, ast.Compare, ast.Name, ast.Load, ast.Constant,
        ast.Attribute, ast.Subscript, ast.List, ast.Tuple, *_OPERATORS,
    )  # fmt: skip
    for node in ast.walk(tree):
        if not isinstance(node, allowed):
            raise UserError(f"`{text}`: {type(node).__name__} is not accepted in a condition", _HINT)
        if isinstance(node, ast.Name) and node.id.lower() not in _CONSTANTS and node.id not in _SCOPES:
            raise UserError(f"`{text}`: unknown name `{node.id}`", suggest(node.id, _SCOPES))
    return tree


def condition_stages(text: str) -> list[str]:
    """Names of the stages whose metrics a condition reads."""
    names: list[str] = []
    for node in ast.walk(parse_condition(text)):
        if isinstance(node, ast.Attribute | ast.Subscript) and getattr(node.value, "id", "") == "stages":
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node.slice, "value", None)
            if isinstance(name, str) and name not in names:
                names.append(name)
    return names


def evaluate_condition(
    text: str,
    *,
    params: Mapping[str, Any],
    matrix: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, float]],
) -> bool:
    """Whether the condition holds.

    Args:
        text: the expression, after substitution of `${…}`.
        params: the workflow's parameters.
        matrix: values of this branch.
        stages: stage name → its summary metrics, for all that have ended.

    Raises:
        UserError: unknown parameter, stage or metric, or values that cannot be compared.
    """
    scopes = {"params": params, "matrix": matrix, "stages": stages}

    def visit(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value):
                return value
            case ast.Name(name):
                return _CONSTANTS[name.lower()] if name.lower() in _CONSTANTS else scopes[name]
            case ast.Attribute(inner, name):
                return look_up(visit(inner), name)
            case ast.Subscript(inner, index):
                return look_up(visit(inner), visit(index))
            case ast.List(items) | ast.Tuple(items):
                return [visit(item) for item in items]
            case ast.BoolOp(ast.And(), values):
                return all(visit(value) for value in values)
            case ast.BoolOp(_, values):
                return any(visit(value) for value in values)
            case ast.UnaryOp(symbol, operand):
                return _OPERATORS[type(symbol)](visit(operand))
            case ast.BinOp(left, symbol, right):
                return _OPERATORS[type(symbol)](visit(left), visit(right))
            case ast.Compare(left, symbols, rights):
                current = visit(left)
                for comparison, right in zip(symbols, rights, strict=True):
                    following = visit(right)
                    if not _OPERATORS[type(comparison)](current, following):
                        return False
                    current = following
                return True
        raise UserError(f"`{text}`: {type(node).__name__} is not accepted in a condition", _HINT)

    def look_up(group: Any, name: Any) -> Any:
        if group is stages and name not in stages:
            raise UserError(
                f"when: `{text}`: `{name}` was skipped, so it has no metrics",
                "give this stage the condition of that one, before `and`",
            )
        if not isinstance(group, Mapping) or name not in group:
            raise UserError(
                f"when: `{text}`: there is no `{name}`", suggest(str(name), group) if isinstance(group, Mapping) else ""
            )
        return group[name]

    try:
        return bool(visit(parse_condition(text)))
    except (TypeError, ArithmeticError) as error:
        raise UserError(f"when: `{text}`: {error}", _HINT) from None
