"""What a field accepts beside a mapping, such as a name alone: for its JSON schema."""

from __future__ import annotations

from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class ShortForm:
    """An annotation: the field's schema is any of `schemas`, or its own.

    Args:
        schemas: JSON schemas of what a validator makes a mapping of.
    """

    def __init__(self, *schemas: dict[str, Any]) -> None:
        self.schemas = schemas

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [*self.schemas, handler(schema)]}
