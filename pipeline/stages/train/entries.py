"""Fields of the model's parameters that take one entry for all blocks, or a list of entries with `layers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Discriminator, PlainSerializer, Tag, WrapValidator

from polytrope.pipeline.support.short_form import ShortForm


def one_entry(settings: Any, spelled_out: Callable[[Any], Any], short_form: ShortForm) -> Any:
    """The type of a field with one entry, which stays as it was given: defaults are the module's own.

    Args:
        settings: the pydantic model of an entry, or a union of some.
        spelled_out: makes a mapping of a short form.
        short_form: for the schema.
    """

    def check(value: Any, read: Callable[[Any], Any]) -> Any:
        read(spelled_out(value))
        return value

    return Annotated[settings, WrapValidator(check), short_form]


def per_layer(settings: Any, spelled_out: Callable[[Any], Any], short_form: ShortForm) -> Any:
    """The type of a field with one entry, or a list of them for ranges of blocks; arguments as of `one_entry`."""
    entry = one_entry(settings, spelled_out, short_form)

    def check_alone(value: Any, read: Callable[[Any], Any]) -> Any:
        if isinstance(value, dict) and "layers" in value:
            raise ValueError("`layers` stands in a list that covers every block: `[{layers: 0-5, name: …}, …]`")
        return read(value)

    return Annotated[
        Annotated[entry, WrapValidator(check_alone), Tag("one")] | Annotated[list[entry], Tag("list")],  # type: ignore[valid-type]
        Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "one"),
        PlainSerializer(lambda value: value),
    ]
