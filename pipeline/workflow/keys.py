"""Stage keys: what decides a stage's result, hashed; and the explanation of why two keys differ.

In the key: the code of the stage (its module and those named by `@stage(code=…)`, as syntax trees without comments,
docstrings and positions), its parameters, the digests of its inputs, its fingerprint, and the environment variables
that the workflow file names. Not in the key: resources, retries, timeouts, the executor, and the versions of Python,
torch and other packages. Versions are written into each run's environment record and shown by `polytrope diff`:
an upgrade does not throw away days of finished work unasked; `polytrope run --force STAGE` recomputes on purpose.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.workflow.graph import StageNode

_NATIVE_SUFFIXES = (".c", ".cc", ".cpp", ".cxx", ".cu", ".cuh", ".h", ".hpp")
_VERSION = 1  # raised when the meaning of a key changes


def key_components(node: StageNode, input_digests: Mapping[str, str | dict[str, str] | None]) -> dict[str, Any]:
    """What decides the result of `node`, as JSON-able data.

    Args:
        node: the stage.
        input_digests: input name → digest of the artifact (label → digest for a fan-in, None for an absent one).
    """
    modules = [node.definition.function.__module__, *node.definition.options.code]
    return {
        "version": _VERSION,
        "uses": node.definition.uses,
        "code": {module: code_hash(module) for module in dict.fromkeys(modules)},
        "parameters": node.parameters.model_dump(mode="json", by_alias=True),
        "inputs": {name: input_digests[name] for name in node.inputs},
        "fingerprint": dict(node.fingerprint),
        # hashed: a variable that decides the result may be a secret as well
        "environment": {name: _sha256(value.encode())[:16] for name, value in node.environment.items()},
    }


def stage_key(components: Mapping[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of the components."""
    return _sha256(canonical_json(components).encode())


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, shortest float notation."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@functools.cache
def code_hash(module: str) -> str:
    """sha256 over the source of a module, or over all Python, C, C++ and CUDA files of a package.

    The module is found without being imported, so a plan does not import torch.

    Raises:
        UserError: a module without source.
    """
    location = find_source(module)
    if location.is_file():
        return _file_hash(location)
    digest = hashlib.sha256()
    for path in sorted(_source_files(location), key=lambda item: item.relative_to(location).as_posix()):
        digest.update(f"{path.relative_to(location).as_posix()}\0{_file_hash(path)}\n".encode())
    return digest.hexdigest()


def _source_files(directory: Path) -> Iterator[Path]:
    for root, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith((".", "__pycache__", "build"))]
        for name in files:
            if name.endswith((".py", *_NATIVE_SUFFIXES)):
                yield Path(root) / name


@functools.cache
def find_source(module: str) -> Path:
    """The file of a module or the directory of a package, without importing it or its parents."""
    loaded = sys.modules.get(module)
    if loaded is not None and getattr(loaded, "__file__", None):
        path = Path(str(loaded.__file__))
        return path.parent if path.name == "__init__.py" else path
    search: Any = None
    parts = module.split(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        found = None
        for finder in sys.meta_path:
            found = finder.find_spec(name, search) if hasattr(finder, "find_spec") else None
            if found is not None:
                break
        if found is None:
            raise UserError(f"no source of module `{module}` (named in a stage's `code`)")
        search = found.submodule_search_locations
    if found is not None and found.origin and found.origin.endswith(".py"):
        path = Path(found.origin)
        return path.parent if path.name == "__init__.py" else path
    if search:
        return Path(next(iter(search)))
    raise UserError(f"module `{module}` has no Python source, so its code cannot be part of a stage key")


def _file_hash(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix != ".py":
        return _sha256(data)
    tree = ast.parse(data, filename=str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return _sha256(ast.dump(tree, annotate_fields=False).encode())


def explain(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two sets of key components, a line each: `parameters.degree: 3 → 5`."""
    lines: list[str] = []
    if old.get("uses") != new.get("uses"):
        lines.append(f"uses: {old.get('uses')} → {new.get('uses')}")
    for kind, name, before, after in _differences(old, new):
        if kind == "code":
            lines.append(f"code of {name} {_change(before, after, 'changed')}")
        elif kind == "inputs":
            lines.append(f"input {name} {_change(before, after, f'changed ({_short(before)} → {_short(after)})')}")
        elif kind == "environment":
            lines.append(f"environment variable {name} {_change(before, after, 'changed')}")
        elif kind == "fingerprint":
            lines.append(f"{name} {_change(before, after, f'changed ({_short(before)} → {_short(after)})')}")
        else:
            lines.append(f"{kind}.{name}: {_short(before)} → {_short(after)}")
    if old.get("version") != new.get("version"):
        lines.append("the meaning of stage keys changed with this version of polytrope")
    return lines


class _Absent:
    def __repr__(self) -> str:
        return "(none)"


_ABSENT = _Absent()


def _change(before: Any, after: Any, changed: str) -> str:
    return "is new" if before is _ABSENT else "is gone" if after is _ABSENT else changed


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    for kind in ("parameters", "inputs", "fingerprint", "code", "environment"):
        before, after = _flat(old.get(kind) or {}), _flat(new.get(kind) or {})
        for name in dict.fromkeys((*before, *after)):
            left, right = before.get(name, _ABSENT), after.get(name, _ABSENT)
            if left is _ABSENT or right is _ABSENT or left != right:
                yield kind, name, left, right


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            result.update(_flat(item, f"{prefix}{name}."))
        else:
            result[prefix + str(name)] = item
    return result


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "(none)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) == 64 and all(character in "0123456789abcdef" for character in text):
        return text[:12]
    return text if len(text) <= 60 else text[:57] + "…"
