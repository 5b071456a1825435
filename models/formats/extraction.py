"""Functions of this package as the text of a file of their own: their source with all that it needs, and no more."""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

_PACKAGE = "polytrope."
_FAMILY = "Family"  # what the keys of tables by family begin with


class Place(NamedTuple):
    """A definition at the top of a module."""

    module: str
    name: str


class Extract(NamedTuple):
    """Imports and definitions for a file of their own, and the names that the functions have there."""

    imports: list[str]
    source: str
    names: dict[Place, str]


class _Module(NamedTuple):
    definitions: dict[str, ast.stmt]
    imports: dict[str, Place]  # what a name stands for; of a whole module: Place(module, "")


@functools.cache
def _read(module: str) -> _Module:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"{module}: there is no source to extract from")
    definitions: dict[str, ast.stmt] = {}
    imports: dict[str, Place] = {}
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            definitions[node.targets[0].id] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            definitions[node.target.id] = node
        elif isinstance(node, ast.Import):
            imports |= {alias.asname or alias.name: Place(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = whole.startswith(_PACKAGE) and whole in sys.modules
                imports[alias.asname or alias.name] = (
                    Place(whole, "") if is_module else Place(f"{node.module}", alias.name)
                )
    return _Module(definitions, imports)


def _local_names(node: ast.AST) -> set[str]:
    """Names that anything inside a function binds."""
    arguments = {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
    stored = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return arguments | stored


class _Uses(ast.NodeTransformer):
    """Finds what a definition needs, and gives it the names of the new file. Annotations go."""

    def __init__(self, place: Place, names: Mapping[Place, str] | None, families: frozenset[str] | None) -> None:
        self.module = _read(place.module)
        self.place = place
        self.names = names
        self.families = families
        self.local: set[str] = set()
        self.fields: list[ast.stmt] = []  # of a class
        self.found: list[Place] = []

    def resolve(self, name: str) -> Place | None:
        if name in self.local:
            return None
        if name in self.module.definitions:
            return Place(self.place.module, name)
        return self.module.imports.get(name)

    def named(self, place: Place, node: ast.expr) -> ast.expr:
        self.found.append(place)
        return node if self.names is None else ast.copy_location(ast.Name(self.names[place], ast.Load()), node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        place = self.resolve(node.id)
        return node if place is None else self.named(place, node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name):
            place = self.resolve(node.value.id)
            if place is not None and place.name == "" and place.module.startswith(_PACKAGE):
                return self.named(Place(place.module, node.attr), node)
        node.value = self.visit(node.value)
        return node

    def visit_Dict(self, node: ast.Dict) -> ast.expr:
        if self.families is not None and any(_family(key) for key in node.keys):
            kept = [index for index, key in enumerate(node.keys) if _family(key) in self.families]
            node = ast.Dict([node.keys[index] for index in kept], [node.values[index] for index in kept])
        self.generic_visit(node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | None:
        if node in self.fields:
            node.value = None if node.value is None else self.visit(node.value)
            return node
        if node.value is None:
            return None
        return ast.fix_missing_locations(ast.copy_location(ast.Assign([node.target], self.visit(node.value)), node))


def _family(key: ast.expr | None) -> str | None:
    """HERMITE of `Family.HERMITE`."""
    of_family = isinstance(key, ast.Attribute) and isinstance(key.value, ast.Name) and key.value.id == _FAMILY
    return key.attr if of_family and isinstance(key, ast.Attribute) else None


def _transformed(
    place: Place, names: Mapping[Place, str] | None, families: frozenset[str] | None
) -> tuple[ast.stmt, list[Place]]:
    uses = _Uses(place, names, families)
    if place.name not in uses.module.definitions:
        raise ValueError(f"{place.module} does not define {place.name}")
    # Fresh nodes each time, for they are changed in place.
    node = ast.parse(ast.unparse(uses.module.definitions[place.name])).body[0]
    if isinstance(node, ast.FunctionDef):
        uses.local = _local_names(node)
    elif isinstance(node, ast.ClassDef):
        uses.local = set().union(*(_local_names(part) for part in node.body if isinstance(part, ast.FunctionDef)))
        for part in node.body:  # fields of named tuples need their annotations, whatever they are
            if isinstance(part, ast.AnnAssign):
                part.annotation = ast.Name("object", ast.Load())
                uses.fields.append(part)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        uses.local = {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        uses.local |= {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
    changed: ast.stmt = uses.visit(node)
    return changed, uses.found


def extract(roots: Iterable[Place], replaced: Mapping[Place, Place]) -> Extract:
    """Python source that defines the functions `roots`.

    Tables by family keep the families that the roots name themselves, on the way to a replaced function.

    Args:
        roots: functions of modules of this package that are imported.
        replaced: functions that others stand for.
    """
    roots = list(roots)
    families: set[str] = set()
    mentioned: set[Place] = set()
    order: list[Place] = []
    seen: set[Place] = set()

    def collect(place: Place, narrowed: frozenset[str]) -> None:
        place = replaced.get(place, place)
        if place in seen:
            return
        seen.add(place)
        if not place.module.startswith(_PACKAGE):
            order.append(place)
            return
        _, found = _transformed(place, None, narrowed)
        for part in found:
            collect(part, narrowed)
        order.append(place)

    def mention(place: Place) -> None:
        if place in mentioned or place in replaced or not place.module.startswith(_PACKAGE):
            return
        mentioned.add(place)
        node, found = _transformed(place, None, None)
        if not isinstance(node, ast.FunctionDef):
            return
        families.update(filter(None, (_family(part) for part in ast.walk(node) if isinstance(part, ast.Attribute))))
        for part in found:
            mention(part)

    for root in roots:
        mention(root)
    for root in roots:
        collect(root, frozenset(families))
    names = _names(order)
    mapped = names | {old: names[new] for old, new in replaced.items() if new in names}
    imports = [_import(place, names[place]) for place in order if not place.module.startswith(_PACKAGE)]
    parts = []
    for place in order:
        if place.module.startswith(_PACKAGE):
            node, _ = _transformed(place, mapped, frozenset(families))
            parts.append(ast.unparse(_called(node, names[place])))
    body = "\n\n\n".join(parts)
    return Extract(sorted(imports), body, {root: names[root] for root in roots})


def _names(places: Iterable[Place]) -> dict[Place, str]:
    """A name for each: its own, after that of its module where several modules have it."""
    places = list(places)
    bare = [place.name for place in places]
    names = {}
    for place in places:
        if not place.module.startswith(_PACKAGE):
            names[place] = place.name or place.module
        elif bare.count(place.name) > 1:
            names[place] = f"{place.module.rpartition('.')[2]}_{place.name.lstrip('_')}"
        else:
            names[place] = place.name
    return names


def _import(place: Place, name: str) -> str:
    return f"from {place.module} import {name}" if place.name else f"import {place.module}"


def _called(node: ast.stmt, name: str) -> ast.stmt:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        node.name = name
    elif isinstance(node, ast.Assign):
        node.targets = [ast.Name(name, ast.Store())]
    return node
