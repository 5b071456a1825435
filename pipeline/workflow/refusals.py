"""What pydantic refuses, in the words of the workflow file: file, line, field, what is accepted, the nearest name."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.text import count, suggest
from polytrope.pipeline.workflow.source import KeyPath

# Type of pydantic's error → what is expected instead, with the names of its context.
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "`name: value` lines",
    "model_type": "`name: value` lines",
    "model_attributes_type": "`name: value` lines",
    "none_required": "null",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "multiple_of": "a multiple of {multiple_of:g}",
    "string_pattern_mismatch": "text like `{pattern}`",
}
_OF_UNIONS = ("union_tag_invalid", "union_tag_not_found")


def validation_error(
    error: ValidationError, model: type[BaseModel], data: Any, prefix: KeyPath, where: Callable[[KeyPath], str]
) -> UserError:
    """One `UserError` from pydantic's, a line per problem: location, field, what is accepted, what was given.

    Args:
        error: of `model`.
        model: to suggest the nearest field for an unknown one.
        data: what was validated.
        prefix: path of the validated data in the workflow file, such as ("stages", "train", "with").
        where: from a path to `file:line`, or "" if unknown.
    """
    lines: list[str] = []
    hints: list[str] = []
    seen: set[KeyPath] = set()
    for problem in error.errors(include_url=False, include_context=True):
        location = asked = _location(problem, data)
        text, hint = words(problem, model, data, location)
        value = value_at(data, location)
        if isinstance(value, str) and problem["type"] not in _OF_UNIONS and problem["input"] != value:
            text = f"`{value}`: {problem['loc'][-1]}: {text}"  # the text is short for a mapping
        if problem["type"] == "extra_forbidden":
            field = location[:-1]
        elif problem["type"] in _OF_UNIONS:
            tag = str((problem.get("ctx") or {}).get("discriminator", "")).strip("'")
            field = location = (*location, tag) if isinstance(value, Mapping) else location
        else:
            named, text = named_field(text, value)
            field = location = (*location, *named)
        if location in seen or asked in seen:  # the other members of a union fail as well; the first one speaks
            continue
        seen |= {location, asked}
        dotted = ".".join(map(str, (*prefix, *field))) or "top level"
        lines.append(": ".join(part for part in (where((*prefix, *location)), dotted, text) if part))
        if hint and hint not in hints:
            hints.append(hint)
    if len(lines) > 8:
        lines = [*lines[:8], f"… and {len(lines) - 8} more"]
    return UserError("\n".join(lines), "; ".join(hints))


def refuse_booleans(given: Any, read: Any) -> None:
    """Raise pydantic's error for every true or false of the file that was read as a number, as pydantic does.

    Args:
        given: as it stands in the file.
        read: what was made of it.
    """
    found = list(_booleans(given, read, ()))
    if found:
        raise ValidationError.from_exception_data(
            type(read).__name__, [InitErrorDetails(type=kind, loc=path, input=value) for path, value, kind in found]
        )


def _booleans(given: Any, read: Any, path: KeyPath) -> Iterator[tuple[KeyPath, bool, str]]:
    if isinstance(given, bool) and isinstance(read, int | float) and not isinstance(read, bool):
        yield path, given, "int_type" if isinstance(read, int) else "float_type"
    elif isinstance(given, Mapping) and isinstance(read, BaseModel):
        for name, info in type(read).model_fields.items():
            for key in (name, info.alias):
                if key is not None and key in given:
                    yield from _booleans(given[key], getattr(read, name), (*path, key))
    elif isinstance(given, Mapping) and isinstance(read, Mapping):
        for key in given:
            if key in read:
                yield from _booleans(given[key], read[key], (*path, key))
    elif isinstance(given, list | tuple) and isinstance(read, list | tuple) and len(given) == len(read):
        for place, pair in enumerate(zip(given, read, strict=True)):
            yield from _booleans(*pair, (*path, place))


def named_field(message: str, fields: Any) -> tuple[KeyPath, str]:
    """The field that a message begins with (`model.n_head: too large`, `steps (5) must be …`), and the rest of it.

    Args:
        message: of a check that saw several fields.
        fields: their mapping; a message that begins with none of its keys names no field.
    """
    match = re.match(r"([A-Za-z_]\w*(?:\.\w+)*)(: | \()", message)
    if match is None or not isinstance(fields, Mapping) or match[1].split(".")[0] not in fields:
        return (), message
    path = tuple(match[1].split("."))
    return path, message[match.end() :] if match[2] == ": " else message


def show(value: Any) -> str:
    """A value of the file in a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def value_at(data: Any, path: KeyPath) -> Any:
    """What stands there; None if nothing does."""
    for part in path:
        if not _has(data, part):
            return None
        data = data[part]
    return data


def _has(data: Any, part: str | int) -> bool:
    if isinstance(data, list | tuple):
        return isinstance(part, int) and part < len(data)
    return isinstance(data, Mapping) and part in data


def words(problem: ErrorDetails, model: type[BaseModel], data: Any, location: KeyPath) -> tuple[str, str]:
    """What is wrong with the field at `location` of `data`, and the nearest name or ""."""
    kind, context, given = problem["type"], problem.get("ctx") or {}, problem["input"]
    if kind == "extra_forbidden":
        return f"unknown key `{location[-1]}`", suggest(str(location[-1]), _fields_at(model, data, location[:-1]))
    if kind == "missing":
        return "this field is required", ""
    if kind == "value_error":
        text = problem["msg"].removeprefix("Value error, ")
        return (text, "") if isinstance(given, dict | list | BaseModel) else (f"{text} (got {show(given)})", "")
    if kind in ("union_tag_invalid", "literal_error"):
        known = re.findall(r"'((?:[^'\\]|\\.)*)'|(-?\d+)", str(context.get("expected_tags", context.get("expected"))))
        names = [text or number for text, number in known]
        value = context["tag"] if kind == "union_tag_invalid" else given
        near = suggest(str(value), names) if isinstance(value, str) else ""
        return f"expected {_one_of(names)}, got {show(value)}", near if near.startswith("did you mean") else ""
    if kind == "union_tag_not_found":
        return "this field is required: it says which one is meant", ""
    if kind in ("too_short", "too_long"):
        bound = "at least" if kind == "too_short" else "at most"
        limit = context["min_length" if kind == "too_short" else "max_length"]
        return f"expected {bound} {count(limit, 'value')}, got {context['actual_length']}", ""
    expected = _EXPECTED.get(kind)
    if expected is not None:
        return f"expected {expected.format_map(context)}, got {show(given)}", ""
    text = re.sub(r"^(Input|Value|String|List|Dictionary) should (be|have|match)\b", r"expected", problem["msg"])
    return f"{text}, got {show(given)}", ""


def _one_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _location(problem: ErrorDetails, data: Any) -> KeyPath:
    """The problem's path in the file: what pydantic adds for unions, tags and keys stands nowhere in the data."""
    kept: list[str | int] = []
    for part in problem["loc"]:
        if part == "[key]":
            kept.pop()
        elif _has(data, part):
            kept.append(part)
            data = data[part]
    return (*kept, problem["loc"][-1]) if problem["type"] == "missing" else tuple(kept)


def _fields_at(model: type[BaseModel], data: Any, location: KeyPath) -> list[str]:
    """The fields that the model has there."""
    annotation: Any = model
    for part in location:
        annotation, data = _step(annotation, data, part), value_at(data, (part,))
    found = _model_of(annotation, data)
    return [] if found is None else [info.alias or name for name, info in found.model_fields.items()]


def _step(annotation: Any, data: Any, part: str | int) -> Any:
    model = _model_of(annotation, data)
    if model is not None:
        fields = {info.alias or name: info.annotation for name, info in model.model_fields.items()}
        return fields.get(str(part))
    for item in _alternatives(annotation):
        arguments = typing.get_args(item)
        if typing.get_origin(item) is dict and isinstance(part, str):
            return arguments[1]
        if typing.get_origin(item) in (list, tuple) and isinstance(part, int):
            return arguments[0]
    return None


def _model_of(annotation: Any, data: Any) -> type[BaseModel] | None:
    """The model among the alternatives that the data means: the one whose literal fields it has, or the only one."""
    models = [item for item in _alternatives(annotation) if isinstance(item, type) and issubclass(item, BaseModel)]
    if len(models) > 1 and isinstance(data, Mapping):
        for model in models:
            literals = {
                name: typing.get_args(info.annotation)
                for name, info in model.model_fields.items()
                if typing.get_origin(info.annotation) is typing.Literal and info.is_required()
            }
            if literals and all(data.get(name) in values for name, values in literals.items()):
                return model
        models = [model for model in models if not any(field.is_required() for field in model.model_fields.values())]
    return models[0] if models else None


def _alternatives(annotation: Any) -> list[Any]:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, type(int | str)):
        return [leaf for item in arguments for leaf in _alternatives(item)]
    if typing.get_origin(annotation) is typing.Annotated:
        return _alternatives(arguments[0])
    return [annotation]
