"""YAML files as plain data that remembers, for every key, the file and line it came from.

Differences from `yaml.safe_load`, all on purpose: duplicate keys are refused; scalars follow YAML 1.2 (`1e-3` is a
number, `no` and `10:30` are text); `include:` merges other files below the including one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import yaml

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.text import is_unicode, suggest

KeyPath = tuple[str | int, ...]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader with the scalar rules of YAML 1.2's core schema."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


_LONGEST = 4000  # digits of an integer: Python refuses to read longer ones
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_PATTERNS = {
    "null": re.compile(r"^(?:~|null|Null|NULL|)$"),
    "bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"^[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+)$"),
    "float": re.compile(rf"^(?:{_FLOAT})$"),
}
_FIRST = {"null": ["~", "n", "N", ""], "bool": "tTfF", "int": "-+0123456789", "float": "-+0123456789."}
for _tag, _pattern in _PATTERNS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_FIRST[_tag]))


@dataclass
class Source:
    """Plain data of one or several merged files.

    Args:
        data: dicts, lists and scalars.
        locations: path of keys → `file:line` of that key (or `--set …` for an override).
        files: all files that were read, the main one first.
    """

    data: dict[str, Any]
    locations: dict[KeyPath, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def where(self, path: KeyPath) -> str:
        """`file:line` of the closest known key at or above `path`."""
        return locate(self.locations, path)


def locate(locations: dict[KeyPath, str], path: KeyPath) -> str:
    """The location of the deepest prefix of `path` that has one."""
    for end in range(len(path), -1, -1):
        if path[:end] in locations:
            return locations[path[:end]]
    return ""


def read_source(path: Path) -> Source:
    """Read a workflow file and all it includes.

    Raises:
        UserError: missing file, YAML syntax, duplicate key, include cycle; names file and line.
    """
    return _read(path, ())


def _read(path: Path, including: tuple[Path, ...]) -> Source:
    resolved = path.resolve()
    if not is_unicode(str(resolved)):
        raise UserError(
            f"the path of the workflow file {str(resolved)!r} is not UTF-8",
            "rename the directory or file: a run records its workflow in UTF-8",
        )
    if resolved in including:
        chain = " → ".join(str(_display(item)) for item in (*including[including.index(resolved) :], resolved))
        raise UserError(f"{_display(path)}: include cycle: {chain}", "remove one of these `include:` lines")
    source = parse_source(read_text(path), str(_display(path)))
    source.files.append(resolved)
    includes = source.data.pop("include", None)
    if includes is None:
        return source
    names = [includes] if isinstance(includes, str) else includes
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{source.where(('include',))}: include: expected a file name or a list of file names")
    base = Source({})
    for name in names:
        included = path.parent / name
        if not included.is_file():
            raise UserError(
                f"{source.where(('include',))}: include: no file `{_display(included)}`",
                "paths are relative to the file that includes",
            )
        _merge(base, _read(included, (*including, resolved)))
    files = source.files
    _merge(base, source)
    base.files = [*files, *(item for item in base.files if item not in files)]
    return base


def read_text(path: Path) -> str:
    """The text of a workflow file, or a `UserError` that says why not."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        there = [item.name for item in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"no workflow file `{path}`", suggest(path.name, there) or "give the path of one") from None
    except IsADirectoryError:
        raise UserError(f"`{path}` is a directory, not a workflow file", f"see `ls {path}`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read `{path}`: {error}") from None


def _display(path: Path) -> Path:
    """Relative to the current directory where that is shorter."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


def _merge(base: Source, above: Source) -> None:
    """Merge `above` over `base` in place: mappings key by key, anything else replaces."""

    def merge(old: dict[str, Any], new: dict[str, Any], path: KeyPath) -> None:
        for key, value in new.items():
            if isinstance(value, dict) and isinstance(old.get(key), dict):
                merge(old[key], value, (*path, key))
            else:
                old[key] = value

    merge(base.data, above.data, ())
    base.locations.update(above.locations)
    base.files.extend(above.files)


def parse_source(text: str, name: str) -> Source:
    """Parse YAML text whose top level is a mapping; `name` is the file name in messages."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise UserError(f"{name}: the file is empty", "a workflow needs at least `name:` and `stages:`")
        locations: dict[KeyPath, str] = {(): f"{name}:{node.start_mark.line + 1}"}
        data = _construct(node, (), name, locations, [])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        tab = mark is not None and re.match(r"[ ]*\t", [*text.split("\n"), ""][mark.line])
        raise UserError(
            f"{name}{line}: not valid YAML: {error.problem or error.context}",
            "a tab stands in the indentation of this line: write spaces"
            if tab
            else "check the indentation and the quotes around this line",
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise UserError(f"{name}:1: a workflow file is a mapping with `name:` and `stages:`, got {_kind(data)}")
    return Source(data, locations)


def parse_value(text: str) -> Any:
    """One value of a command line: `1e-3` → 0.001, `[a, b]` → list, `{a: b}` → mapping, `true` → True, `'5'` → text.

    Only lists, mappings and quoted texts are read as YAML; anything else is one scalar, to its last character: nothing
    is a comment, `a: b` is text, and so is nothing at all.

    Raises:
        UserError: a list or mapping that is not closed, or has something behind it; not UTF-8.
    """
    if not is_unicode(text):
        raise UserError(f"--set: the value {text!r} is not UTF-8")
    stripped = text.strip()
    loader = _Loader(stripped)
    try:
        if not stripped.startswith(("[", "{", "'", '"')):
            tag = loader.resolve(yaml.ScalarNode, stripped, (True, False)) if stripped else "tag:yaml.org,2002:str"
            value = text if tag == "tag:yaml.org,2002:str" else stripped
            start = yaml.Mark("--set", 0, 0, 0, None, 0)
            return _scalar(yaml.ScalarNode(tag, value, start, start), (), "--set")
        node = loader.get_single_node()
        if node is None or node.end_mark.index != len(stripped):
            raise yaml.YAMLError
        return _construct(node, (), "--set", {}, [])
    except yaml.YAMLError:
        if stripped.startswith(("'", '"')):
            return text  # a text that has quotes in it
        raise UserError(
            f"--set: `{text}` is not a whole list or mapping", "for example `[1, 2]` or `{name: hermite, degree: 3}`"
        ) from None
    finally:
        loader.dispose()


_SCALARS = yaml.constructor.SafeConstructor()


def _construct(
    node: yaml.Node, path: KeyPath, name: str, locations: dict[KeyPath, str], active: list[yaml.Node]
) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path, name)
    if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise _tag_refused(node, path, name)
    if any(node is item for item in active):
        raise UserError(f"{name}:{node.start_mark.line + 1}: the anchor contains itself")
    active.append(node)
    if isinstance(node, yaml.SequenceNode):
        items: list[Any] = []
        for index, item in enumerate(node.value):
            item_path = (*path, index)
            if not isinstance(item, yaml.ScalarNode):
                locations[item_path] = f"{name}:{item.start_mark.line + 1}"
            items.append(_construct(item, item_path, name, locations, active))
        active.pop()
        return items
    result: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key_node, value_node in cast(yaml.MappingNode, node).value:
        line = key_node.start_mark.line + 1
        key = _construct(key_node, path, name, {}, active) if isinstance(key_node, yaml.ScalarNode) else None
        if key is None or not isinstance(key, Hashable):
            raise UserError(f"{name}:{line}: {_dotted(path)}: a key must be text")
        if key == "<<":
            for value in _merge_values(value_node, path, name, locations, active):
                merged = {**value, **merged}
            continue
        key = str(key_node.value)
        if key in result:
            raise UserError(
                f"{name}:{line}: {_dotted((*path, key))}: this key is given twice (first at {locations[(*path, key)]})",
                "remove or rename one of them",
            )
        locations[(*path, key)] = f"{name}:{line}"
        result[key] = _construct(value_node, (*path, key), name, locations, active)
    active.pop()
    return {**merged, **result}


def _merge_values(
    node: yaml.Node, path: KeyPath, name: str, locations: dict[KeyPath, str], active: list[yaml.Node]
) -> list[dict[str, Any]]:
    value = _construct(node, path, name, {}, active)
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, dict) for item in values):
        raise UserError(f"{name}:{node.start_mark.line + 1}: {_dotted(path)}: `<<` needs a mapping")
    for item in values:
        for key in item:
            locations.setdefault((*path, key), f"{name}:{node.start_mark.line + 1}")
    return values


def _scalar(node: yaml.ScalarNode, path: KeyPath, name: str) -> Any:
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    value: str = node.value
    pattern = _PATTERNS.get(tag)
    if pattern is not None and not pattern.match(value):  # `!!int abc`: only a tag that was written can be wrong
        raise UserError(
            f"{name}:{node.start_mark.line + 1}: {_dotted(path)}: {value!r} is not what its tag `!!{tag}` says",
            "leave the tag out, or write a value of this kind",
        )
    match tag:
        case "str":
            return value
        case "null":
            return None
        case "bool":
            return value.lower() == "true"
        case "int":
            if len(value) > _LONGEST:
                raise UserError(
                    f"{name}:{node.start_mark.line + 1}: {_dotted(path)}: a number of {len(value)} digits is too long",
                    "quote it for text",
                )
            return int(value.replace("_", ""), 0 if value.lstrip("+-")[:2] in ("0x", "0o") else 10)
        case "float":
            number = _SCALARS.construct_yaml_float(node)
            if math.isinf(number) and "inf" not in value.lower():
                raise UserError(
                    f"{name}:{node.start_mark.line + 1}: {_dotted(path)}: {value} is larger than any float",
                    "write `.inf` for infinity, or quote it for text",
                )
            if number == 0 and re.search("[1-9]", value.lower().partition("e")[0]):
                raise UserError(
                    f"{name}:{node.start_mark.line + 1}: {_dotted(path)}: {value} is smaller than any float",
                    "write 0, or quote it for text",
                )
            return number
        case _:
            raise _tag_refused(node, path, name)


def _tag_refused(node: yaml.Node, path: KeyPath, name: str) -> UserError:
    return UserError(
        f"{name}:{node.start_mark.line + 1}: {_dotted(path)}: the YAML tag `{node.tag}` is not accepted",
        "write plain text, numbers, lists and mappings",
    )


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path) or "top level"


def _kind(value: Any) -> str:
    return {"list": "a list", "str": "text", "NoneType": "nothing"}.get(type(value).__name__, type(value).__name__)
