"""Reference pages written from the code: stages from their parameter models, commands from the parser, the Python API
from signatures and docstrings.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from polytrope.pipeline.commands.cli import build_parser
from polytrope.pipeline.commands.workflow_files import parameter_rows
from polytrope.pipeline.stage import BUILTIN_STAGES, load_stage

FURTHER_STAGES = {name: f"polytrope.pipeline.stages.{name}:{name}" for name in ("subworkflow", "wait_for")}
INPUT_KINDS = {"required": "one stage", "optional": "one stage, may be left out", "many": "any number, by label"}
API = {
    "Running workflows": ("polytrope.pipeline.launch.interface", "polytrope.pipeline.workflow.spec"),
    "Writing stages": ("polytrope.pipeline.stage",),
    "Activation modules": ("polytrope.ops",),
    "Activation functions": ("polytrope.ops.functional",),
    "Fitting": ("polytrope.ops.interpolate", "polytrope.ops.fitting.certificate"),
    "Polynomials only": ("polytrope.ops.polynomial_only", "polytrope.ops.circuit"),
    "Models": ("polytrope.models", "polytrope.models.gpt2", "polytrope.models.convnext", "polytrope.models.checkpoint"),
    "Conversion": (
        "polytrope.models.convert",
        "polytrope.models.surgery",
        "polytrope.models.calibration",
        "polytrope.models.conversion",
    ),
}
SECTION = re.compile(r"^(Args|Raises|Returns|Yields|Attributes):\s*$")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are Markdown already."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def plain(text: str) -> str:
    """Markdown that shows `text` as it is, code in backquotes apart."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return re.sub(r"([\\*_\[\]#$])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


# ----------------------------------------------------------------------------------------------------------- stages


def stages_page() -> str:
    """Inputs and parameters of every stage."""
    lines = [
        "# Stages",
        "",
        "Every parameter goes under the stage's `with:`. `polytrope stages NAME` prints the same in a terminal.",
        "This page is generated from the stages' parameter models.",
        "",
    ]
    for name, uses in (BUILTIN_STAGES | FURTHER_STAGES).items():
        lines += _stage(name, name if name in BUILTIN_STAGES else uses)
    return "\n".join(lines)


def _stage(name: str, uses: str) -> list[str]:
    definition = load_stage(uses)
    lines = [f"## {name}", "", f"`uses: {uses}`", "", docstring(definition.description), ""]
    if definition.inputs:
        rows = [[code(item), INPUT_KINDS[kind]] for item, kind in definition.inputs.items()]
        lines += [table(["input", "takes"], rows), ""]
    rows = [
        [code(path), code(kind), code(default), plain(description)]
        for path, kind, default, description in parameter_rows(definition.parameters_model)
    ]
    return [*lines, table(["parameter", "type", "default", "meaning"], rows), ""]


# --------------------------------------------------------------------------------------------------------- commands


def commands_page() -> str:
    """Every option of every command."""
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    lines = [
        "# Command options",
        "",
        "What each command is for: [Commands](../commands.md). `--debug` shows the traceback of an unexpected error,",
        "`--help` the text below; both work everywhere. This page is generated from the parser.",
        "",
    ]
    for name, command in commands.choices.items():
        command.complete()
        lines += _command(name, command)
    return "\n".join(lines)


def _command(name: str, parser: argparse.ArgumentParser) -> list[str]:
    usage = (
        " ".join(parser.format_usage().removeprefix("usage: ").split()).replace(" [-h]", "").replace(" [--debug]", "")
    )
    rows = []
    for action in parser._actions:
        if action.dest in ("help", "debug"):
            continue
        value = action.metavar or (" | ".join(map(str, action.choices)) if action.choices else "")
        if not action.option_strings:
            names = str(value or action.dest)
        else:
            takes = f" {value or action.dest.upper()}" if action.nargs != 0 else ""
            names = ", ".join(action.option_strings) + takes
        rows.append([code(names), plain((action.help or "") % {"default": action.default, "prog": parser.prog})])
    example = (parser.epilog or "").partition("exit codes:")[0].partition("example:")[2]
    return [
        f"## {name}",
        "",
        plain(parser.description or ""),
        "",
        f"```text\n{usage}\n```",
        "",
        table(["argument", "meaning"], rows),
        "",
        *(["```text", textwrap.dedent(example).strip("\n"), "```", ""] if example.strip() else []),
    ]


# ------------------------------------------------------------------------------------------------------- Python API


def python_page() -> str:
    """Signatures and docstrings of what users import."""
    lines = [
        "# Python API",
        "",
        "Generated from signatures and docstrings. What is not listed here may change without notice.",
        "",
    ]
    for title, modules in API.items():
        lines += [f"## {title}", ""]
        for name in modules:
            lines += _module(name)
    return "\n".join(lines)


def _module(name: str) -> list[str]:
    module = importlib.import_module(name)
    lines = [f"### `{name}` {{ #{name} }}", "", docstring(inspect.getdoc(module) or ""), ""]
    for item in public_names(module):
        lines += _member(name, item, getattr(module, item))
    return lines


def public_names(module: ModuleType) -> list[str]:
    """`__all__`, or the functions and classes that the module itself defines."""
    named = getattr(module, "__all__", None)
    own = named or [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    values = {name: getattr(module, name) for name in own if not name.startswith("_")}
    return [name for name, value in values.items() if inspect.isclass(value) or inspect.isfunction(value)]


def _member(module: str, name: str, value: Any) -> list[str]:
    anchor = f"{module}.{name}"
    kind = "class" if inspect.isclass(value) else "def"
    lines = [f"#### `{name}` {{ #{anchor} }}", "", f"```python\n{kind} {signature(name, value)}\n```", ""]
    lines += [docstring(inspect.getdoc(value) or ""), ""]
    if inspect.isclass(value):
        for method, function in vars(value).items():
            public = not method.startswith("_") and inspect.isfunction(function)
            if public and function.__doc__:
                lines += [f"**`{method}`**", "", f"```python\ndef {signature(method, function)}\n```", ""]
                lines += [docstring(inspect.getdoc(function) or ""), ""]
    return lines


class _Raw(str):
    """An annotation as the source writes it."""

    def __repr__(self) -> str:
        return str(self)


def signature(name: str, value: Any) -> str:
    """`name(argument: type = default, …) -> type`, one argument per line where it is long."""
    try:
        own = inspect.signature(value)
    except ValueError:  # an exception without an __init__ of its own has the built-in one
        return f"{name}(message)"
    parameters = [
        item.replace(annotation=_annotation(item.annotation)) for item in own.parameters.values() if item.name != "self"
    ]
    result = inspect.Signature.empty if inspect.isclass(value) else _annotation(own.return_annotation)
    line = name + str(own.replace(parameters=parameters, return_annotation=result))
    if len(line) <= 100:
        return line
    end = line[line.rindex(") -> ") + 1 :] if ") -> " in line else ""
    star = next((i for i, item in enumerate(parameters) if item.kind is item.KEYWORD_ONLY), None)
    arguments = [str(item) for item in parameters]
    if star is not None and not any(item.kind is item.VAR_POSITIONAL for item in parameters):
        arguments.insert(star, "*")
    return f"{name}(\n    " + ",\n    ".join(arguments) + ",\n)" + end


def _annotation(annotation: Any) -> Any:
    return _Raw(annotation) if isinstance(annotation, str) else annotation


def docstring(text: str) -> str:
    """Markdown of a docstring: sections with their entries as lists, indented examples as code."""
    lines: list[str] = []
    section = False
    for line in text.split("\n"):
        if SECTION.match(line):
            section = True
            lines += ["", f"**{line.strip().rstrip(':')}**", ""]
        elif section and line.strip():
            indent = len(line) - len(line.lstrip())
            entry = re.match(r"([\w*`., ]+?): (.*)", line.strip())
            if indent == 4 and entry:
                lines.append(f"- `{entry[1].strip('`')}`: {plain(entry[2])}")
            elif indent == 4 and line.strip().endswith(":"):
                lines.append(f"- `{line.strip().rstrip(':')}`:")
            else:
                lines.append(f"  {plain(line.strip())}")
        else:
            section = section and not line.strip()
            lines.append(line if line.startswith("    ") else plain(line))
    return "\n".join(lines)
