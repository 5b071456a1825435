"""`polytrope graph`, `stages` and `validate`: what a workflow file and its stages say, without running anything."""

from __future__ import annotations

import argparse
import inspect
import shlex
from pathlib import Path
from typing import Any

from polytrope.pipeline.commands.common import find_run, open_store, print_json, print_table, say, workflow_of
from polytrope.pipeline.engine.returned import with_stored
from polytrope.pipeline.errors import EXIT_SUCCESS, UserError
from polytrope.pipeline.runs.record import run_state
from polytrope.pipeline.stage import BUILTIN_STAGES, StageDefinition, load_stage
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.text import count
from polytrope.pipeline.workflow.draw import layout, mermaid, save
from polytrope.pipeline.workflow.graph import build_graph


def graph(options: argparse.Namespace) -> int:
    """Mermaid to stdout, or a drawing to a file."""
    workflow = workflow_of(options)
    nodes = build_graph(workflow)
    states: dict[str, str] = {}
    if options.run:
        store = open_store(options, workflow)
        stages = run_state(find_run(store, options.run)).stages
        states = {name: stage.state for name, stage in stages.items()}
        done = {name: stage.key for name, stage in stages.items() if stage.digest}
        _, nodes = with_stored(workflow, nodes, store, done)
    if options.output:
        save(layout(nodes, states), Path(options.output))
        print(f"wrote {options.output}: {count(len(nodes), 'stage')}")
    else:
        print(mermaid(nodes, states), end="")
    return EXIT_SUCCESS


def validate(options: argparse.Namespace) -> int:
    """The checks that `run` makes before it touches anything."""
    workflow = workflow_of(options)
    nodes = build_graph(workflow)
    try:
        Store(workflow.store)
    except UserError as error:
        raise UserError(f"{workflow.where('store')}: {error.message.removeprefix('store: ')}", error.hint) from None
    shown = ", ".join(list(nodes)[:12]) + " …" * (len(nodes) > 12)
    say(f"{options.workflow}: {workflow.name}, {count(len(nodes), 'stage')}: {shown}")
    print(f"run it: {shlex.join(('polytrope', 'run', options.workflow))}")
    return EXIT_SUCCESS


def schema(_options: argparse.Namespace) -> int:
    """The JSON Schema of workflow files."""
    from polytrope.pipeline.workflow.file_schema import file_schema

    print_json(file_schema())
    return EXIT_SUCCESS


def stages(options: argparse.Namespace) -> int:
    """All built-in stages, or inputs and parameters of one."""
    if options.stage is None:
        found = {name: load_stage(name) for name in BUILTIN_STAGES}
        summaries = {name: definition.description.split("\n")[0] for name, definition in found.items()}
        if options.json:
            print_json({name: {"inputs": found[name].inputs, "summary": summaries[name]} for name in found})
            return EXIT_SUCCESS
        rows = [[name, ", ".join(found[name].inputs) or "-", summaries[name]] for name in found]
        print_table(["stage", "inputs", "what it does"], rows)
        say("\n`polytrope stages NAME` lists the parameters; your own stage: `uses: package.module:function`")
        return EXIT_SUCCESS
    definition = load_stage(options.stage)
    if options.json:
        print_json({"inputs": definition.inputs, "parameters": definition.parameters_model.model_json_schema()})
        return EXIT_SUCCESS
    _print_stage(definition)
    return EXIT_SUCCESS


def _print_stage(definition: StageDefinition) -> None:
    say(f"{definition.uses}: {definition.description}\n")
    kinds = {
        "required": "one stage",
        "optional": "one stage, may be left out",
        "many": "any number of stages, by label",
    }
    if definition.inputs:
        print("inputs:")
        for name, kind in definition.inputs.items():
            print(f"  {name}: {kinds[kind]}")
        print()
    rows = parameter_rows(definition.parameters_model)
    if not rows:
        print("no parameters")
        return
    print("parameters (under `with:`):")
    for name, type_name, default, description in rows:
        said = "required" if default == "required" else f"default {default}"
        say(f"  {name}  ({type_name}; {said})")
        if description:
            say(f"      {description}")


def parameter_rows(model: Any, prefix: str = "") -> list[list[str]]:
    """name, type, default, description of every field.

    The fields of a nested model follow as `outer.inner`, those of alternatives as `outer[kind].inner`.
    """
    from pydantic_core import PydanticUndefined

    rows: list[list[str]] = []
    for name, field in model.model_fields.items():
        path = prefix + (field.alias or name)
        if field.default is not PydanticUndefined:
            default = _plain(field.default)
        elif field.default_factory is not None:
            default = _plain(field.get_default(call_default_factory=True))
        else:
            default = "required"
        description = field.description or ""
        bounds = ", ".join(_bound(item) for item in field.metadata if _bound(item))
        if bounds:
            description = f"{description} ({bounds})".strip()
        nested = _nested_models(field.annotation)
        if not nested:
            rows.append([path, _type_name(field.annotation), default, description])
            continue
        rows.append([path, "group", _shortened(default), description])
        for item in nested:
            label = "" if len(nested) == 1 else f"[{_kind_of(item)}]"
            inner = parameter_rows(item, f"{path}{label}.")
            rows += [row for row in inner if not (label and row[0].endswith("].kind"))]
    return rows


def _nested_models(annotation: Any) -> list[Any]:
    """The pydantic models in `Model`, `Model | None` or `ModelA | ModelB`."""
    import typing

    from pydantic import BaseModel

    if typing.get_origin(annotation) in (list, dict, tuple):
        return []
    if typing.get_origin(annotation) is typing.Annotated:
        return _nested_models(typing.get_args(annotation)[0])
    return [
        item
        for item in (annotation, *typing.get_args(annotation))
        if inspect.isclass(item) and issubclass(item, BaseModel)
    ]


def _kind_of(model: Any) -> str:
    """What `kind:` selects this alternative."""
    import typing

    field = model.model_fields.get("kind")
    return str(typing.get_args(field.annotation)[0]) if field is not None else model.__name__


def _shortened(text: str) -> str:
    return "none" if text == "null" else text if len(text) <= 32 else text[:31] + "…"


def _plain(value: Any) -> str:
    import json

    from pydantic_core import to_jsonable_python

    return value if isinstance(value, str) and value else json.dumps(to_jsonable_python(value), ensure_ascii=False)


def _bound(item: Any) -> str:
    for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        if getattr(item, name, None) is not None:
            return f"{sign} {getattr(item, name)}"
    return ""


def _type_name(annotation: Any) -> str:
    import typing

    from pydantic import BaseModel

    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is not None and arguments:
        names = [_type_name(item) for item in arguments if item is not Ellipsis]
        if origin in (list, dict, tuple, set):
            return f"{origin.__name__}[{', '.join(names)}]"
        return " | ".join(dict.fromkeys("null" if name == "NoneType" else name for name in names))
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "mapping"
    return getattr(annotation, "__name__", str(annotation))
