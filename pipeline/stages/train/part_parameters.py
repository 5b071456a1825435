"""`attention`, `norm`, `feedforward` and `mixer` of the `train` stage's model: `polytrope.models.parts`, by `name`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    Tag,
    WrapValidator,
    create_model,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from polytrope.models.parts.settings import PARTS, Part, read_part


def _model(place: str, kind: type[Part]) -> type[BaseModel]:
    """A part's settings as pydantic checks them, for errors with their place and for the schema."""
    described: dict[str, Any] = {"name": (Literal[kind.name], ...)}
    if kind.per_layer:
        blocks = Field(None, description="in a list: the blocks that have it, such as 3, 0-5 or 6-")
        described["layers"] = (str | int | None, blocks)
    for item in fields(kind):
        choices = item.metadata["choices"]
        allowed: Any = dict[str, Any] | None
        if choices:
            allowed = bool if isinstance(item.default, bool) else Literal[choices]
        described[item.name] = (allowed, Field(item.default, description=item.metadata["description"]))

    def possible(settings: Any) -> Any:
        try:
            read_part(place, settings.model_dump(exclude={"layers"}))
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{place}.")) from error
        return settings

    strict = ConfigDict(extra="forbid", strict=True)
    checks: dict[str, Any] = {"possible": model_validator(mode="after")(possible)}
    return create_model(kind.__name__, __config__=strict, __doc__=kind.__doc__, __validators__=checks, **described)


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


def _one(place: str, check: Callable[[Any, Callable[[Any], Any]], Any]) -> Any:
    union = functools.reduce(operator.or_, (_model(place, kind) for kind in PARTS[place].values()))
    return Annotated[union, Field(discriminator="name"), WrapValidator(check), _ShortForm(list(PARTS[place]))]


def _per_layer(place: str) -> Any:
    return Annotated[
        Annotated[_one(place, _check_one), Tag("one")] | Annotated[list[_one(place, _check_entry)], Tag("list")],  # type: ignore[misc]
        Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "one"),
        PlainSerializer(lambda value: value),
    ]


if TYPE_CHECKING:
    Attention = str | dict[str, Any] | list[str | dict[str, Any]]
    Norm = str | dict[str, Any]
    FeedForward = str | dict[str, Any] | list[str | dict[str, Any]]
    Mixer = str | dict[str, Any] | list[str | dict[str, Any]]
else:
    Attention = _per_layer("attention")
    Norm = Annotated[_one("norm", _check_entry), PlainSerializer(lambda value: value)]
    FeedForward = _per_layer("feedforward")
    Mixer = _per_layer("mixer")
