"""`attention`, `norm`, `feedforward` and `mixer` of the `train` stage's model: `polytrope.models.parts`, by `name`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, create_model, model_validator

from polytrope.models.parts.settings import PARTS, Part, read_part
from polytrope.pipeline.stages.train.entries import one_entry, per_layer
from polytrope.pipeline.support.short_form import ShortForm


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


def _entry(place: str) -> tuple[Any, Callable[[Any], Any], ShortForm]:
    """Its settings, what makes a mapping of a name, and the names."""
    union = functools.reduce(operator.or_, (_model(place, kind) for kind in PARTS[place].values()))

    def spelled_out(value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    return Annotated[union, Field(discriminator="name")], spelled_out, ShortForm({"enum": list(PARTS[place])})


if TYPE_CHECKING:
    Attention = str | dict[str, Any] | list[str | dict[str, Any]]
    Norm = str | dict[str, Any]
    FeedForward = str | dict[str, Any] | list[str | dict[str, Any]]
    Mixer = str | dict[str, Any] | list[str | dict[str, Any]]
else:
    Attention = per_layer(*_entry("attention"))
    Norm = Annotated[one_entry(*_entry("norm")), PlainSerializer(lambda value: value)]
    FeedForward = per_layer(*_entry("feedforward"))
    Mixer = per_layer(*_entry("mixer"))
