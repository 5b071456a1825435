"""The JSON Schema of a workflow file, down to the parameters of every built-in stage, for completion in editors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from polytrope.pipeline.stage import BUILTIN_STAGES, StageDefinition, load_stage
from polytrope.pipeline.workflow.spec import Workflow

_REFERENCE = {"type": "string", "pattern": r"\$\{.*\}"}  # `${params.x}` stands for any value
_OWN = {"type": "string", "pattern": r"^[\w.]+:\w+$|\$\{.*\}"}


def file_schema() -> dict[str, Any]:
    """Schema of draft 2020-12."""
    stages = {name: load_stage(name) for name in BUILTIN_STAGES}
    models: list[type[BaseModel]] = [Workflow, *(definition.parameters_model for definition in stages.values())]
    names, content = models_json_schema([(model, "validation") for model in models], by_alias=True)
    definitions: dict[str, Any] = content["$defs"]
    stage = definitions["StageSpec"]
    stage["properties"]["uses"] |= {"anyOf": [{"enum": list(BUILTIN_STAGES)}, _OWN]}
    del stage["properties"]["uses"]["type"]
    stage["allOf"] = [
        _stage_rule(name, definition, names[(definition.parameters_model, "validation")], stage["properties"]["inputs"])
        for name, definition in stages.items()
    ]
    definitions["Workflow"]["properties"]["include"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "files that are merged below this one",
    }
    for definition in definitions.values():
        _drop_titles(definition)
        _accept_references(definition)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "polytrope workflow",
        **names[(Workflow, "validation")],
        "$defs": definitions,
    }


def _stage_rule(
    name: str, definition: StageDefinition, parameters: dict[str, Any], inputs: dict[str, Any]
) -> dict[str, Any]:
    """What a stage with `uses: name` may have under `with:` and `inputs:`."""
    return {
        "if": {"properties": {"uses": {"const": name}}, "required": ["uses"]},
        "then": {
            "properties": {
                "with": {"anyOf": [parameters, {"type": "null"}]},
                "inputs": {
                    "properties": dict.fromkeys(definition.inputs, inputs["additionalProperties"]),
                    "additionalProperties": False,
                },
            }
        },
    }


def _accept_references(model: dict[str, Any]) -> None:
    """Let `${params.x}` stand for the value of every field, and for every entry of a list or mapping in one."""
    for name, schema in model.get("properties", {}).items():
        if name != "stages":
            model["properties"][name] = _or_reference(schema)


def _drop_titles(schema: Any) -> None:
    """pydantic's titles are the names again."""
    if isinstance(schema, dict):
        if isinstance(schema.get("title"), str):
            del schema["title"]
        for value in schema.values():
            _drop_titles(value)
    elif isinstance(schema, list):
        for value in schema:
            _drop_titles(value)


def _or_reference(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") == "string" and not schema.keys() & {"enum", "const", "pattern"}:
        return schema
    inner = dict(schema)
    outer: dict[str, Any] = {key: inner.pop(key) for key in ("description", "default") if key in inner}
    for key in ("items", "additionalProperties"):
        if isinstance(inner.get(key), dict):
            inner[key] = _or_reference(inner[key])
    if "prefixItems" in inner:
        inner["prefixItems"] = [_or_reference(item) for item in inner["prefixItems"]]
    if set(inner) == {"anyOf"}:
        return {**outer, "anyOf": [*(_or_reference(item) for item in inner["anyOf"]), _REFERENCE]}
    return {**outer, "anyOf": [inner, _REFERENCE]} if inner else outer
