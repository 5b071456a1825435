"""`attention`, `norm` and `feedforward` of the `train` stage's model: `polytrope.models.parts`, by `name`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, GetJsonSchemaHandler, PlainSerializer, Tag, WrapValidator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from polytrope.models.parts.settings import PARTS


def _check_entry(value: Any, check: Callable[[Any], Any]) -> Any:
    check({"name": value} if isinstance(value, str) else value)
    return value  # as it was given


def _check_one(value: Any, check: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict) and "layers" in value:
        raise ValueError("`layers` stands in a list that covers every block: `[{layers: 0-5, name: …}, …]`")
    return _check_entry(value, check)


class _ShortForm:
    """For the JSON schema: a name alone is accepted too."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"enum": self.names}, handler(schema)]}


def _one(field: str, check: Callable[[Any, Callable[[Any], Any]], Any]) -> Any:
    kinds = PARTS[field]
    union = functools.reduce(operator.or_, kinds.values())
    return Annotated[union, Field(discriminator="name"), WrapValidator(check), _ShortForm(list(kinds))]  # type: ignore[valid-type]


def _per_layer(field: str) -> Any:
    return Annotated[
        Annotated[_one(field, _check_one), Tag("one")] | Annotated[list[_one(field, _check_entry)], Tag("list")],  # type: ignore[misc]
        Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "one"),
        PlainSerializer(lambda value: value),
    ]


if TYPE_CHECKING:
    Attention = str | dict[str, Any] | list[str | dict[str, Any]]
    Norm = str | dict[str, Any]
    FeedForward = str | dict[str, Any] | list[str | dict[str, Any]]
else:
    Attention = _per_layer("attention")
    Norm = Annotated[_one("norm", _check_entry), PlainSerializer(lambda value: value)]
    FeedForward = _per_layer("feedforward")
