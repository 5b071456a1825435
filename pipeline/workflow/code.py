"""The code behind a stage: every first-party file that its module reaches by import, found without running any of it.

First-party is what an import finds outside the standard library and `site-packages` (the project's own modules), the
package that defines the stage wherever it stands, and of polytrope what decides results: `ops`, `models`,
`pipeline.data`, `pipeline.support` and the rooms in `pipeline.stages`; not the engine. Imports are read from the syntax
trees: at the top or inside functions, relative ones, `import_module` of a literal name, with the `__init__` of every
package on the way. A dotted name in any text counts as well (`"my_package.worker"`, for `python -m` or a table of
names). Of a package that is reached, the C, C++ and CUDA sources and
the page templates below it count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import polytrope
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.text import suggest

_OTHER_SUFFIXES = (".c", ".cc", ".cpp", ".cxx", ".cu", ".cuh", ".h", ".hpp", ".html", ".css")
_ROOMS = tuple(
    f"polytrope.{name}" for name in ("ops", "models", "pipeline.data", "pipeline.support", "pipeline.stages")
)
_STAGE_ROOM = re.compile(r"polytrope\.pipeline\.stages\.\w+(?=\.)")
_DOTTED = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?::\w+)?", re.ASCII)
_IGNORED_FIELDS = frozenset({"ctx", "kind", "type_comment", "type_ignores"})  # of syntax trees


@dataclass(frozen=True)
class Code:
    """Files by label: `my_package/helper.py`, as they stand below a directory that Python searches.

    Args:
        files: label → sha256 of what decides: the syntax tree without comments, docstrings and layout, or the bytes.
        sources: label → sha256 of the bytes that this was read from.
    """

    files: dict[str, str]
    sources: dict[str, str]

    def __or__(self, other: Code) -> Code:
        """The files of both."""
        return Code({**self.files, **other.files}, {**self.sources, **other.sources})


@dataclass(frozen=True)
class Source:
    """What one file says.

    Args:
        digest, sha256: of the syntax tree (of the bytes, if it is not Python), and of the bytes.
        imports: (dots, module, names) of every import.
        dotted: texts that may name a module.
        exported: the literal `__all__`.
    """

    digest: str
    sha256: str
    imports: tuple[tuple[int, str, tuple[str, ...]], ...] = ()
    dotted: frozenset[str] = frozenset()
    exported: tuple[str, ...] = ()


def read_code(modules: Iterable[str]) -> Code:
    """All first-party files that these modules reach, themselves included.

    Raises:
        UserError: one of `modules` has no source, or a file that is reached cannot be read.
    """
    files = _Closure().grow(modules)
    return Code(
        {label: files[label].digest for label in sorted(files)},
        {label: files[label].sha256 for label in sorted(files)},
    )


def read_named_code(name: str) -> Code:
    """All first-party files behind `package.module:function`, which a parameter names; nothing is run.

    Raises:
        UserError: there is no such module, or it has no such function.
    """
    module, _, function = name.partition(":")
    spec = Finder().find(module)
    path = None if spec is None else _file_of(spec)
    if path is None:
        raise UserError(
            f"there is no module `{module}` with a source file",
            "put it beside the workflow file, or where polytrope is started",
        )
    code = read_code([module])
    known = _bound_names(Path(path)) if path.endswith(".py") else None
    if known is not None and function not in known:
        raise UserError(f"module `{module}` has no function `{function}` ({path})", suggest(function, known))
    return code


def _bound_names(path: Path) -> set[str] | None:
    """What the module of a file binds; None: only running it tells (`import *`, `__getattr__`)."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_bytes())]
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
                for inner in ast.walk(node):  # what is bound in there is not the module's
                    if isinstance(inner, ast.Global):
                        found.update(inner.names)
                continue
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                found.update(item.asname or item.name.partition(".")[0] for item in names)
        waiting += ast.iter_child_nodes(node)
    return None if found & {"*", "__getattr__"} else found


def find_file(label: str, finder: Finder) -> Path | None:
    """The file behind a label of `Code`, where this process would import it from; None: there is none."""
    beginning, suffix = os.path.splitext(label)
    spec = finder.find(beginning.replace("/", "."))
    path = None if spec is None else _file_of(spec)
    if path is not None and path.endswith(suffix):
        return Path(path)
    parts = label.split("/")  # a file that is no module stands below the package that it belongs to
    for depth in range(len(parts) - 1, 0, -1):
        spec = finder.find(".".join(parts[:depth]))
        if spec is not None and spec.submodule_search_locations is not None:
            places = [Path(place, *parts[depth:]) for place in _locations(spec)]
            return next((path for path in places if path.is_file()), None)
    return None


def module_of(label: str) -> str:
    """The name of the module behind a label; of a file that is no Python source, one that no module has."""
    return label.removesuffix(".py").removesuffix("/__init__").replace("/", ".") if label.endswith(".py") else label


def is_first_party(name: str, spec: ModuleSpec) -> bool:
    """Whether a module's code belongs to the keys of the stages that reach it."""
    if name == "polytrope" or name.startswith("polytrope."):
        return any(name == room or name.startswith(f"{room}.") for room in _ROOMS)
    origin = _file_of(spec)
    if origin is not None:
        return not _is_installed(origin)
    return any(not _is_installed(place) for place in _locations(spec))


class Finder:
    """Where an import would find modules; each is looked for once, and neither it nor its parents are imported."""

    def __init__(self) -> None:
        self._found: dict[str, ModuleSpec | None] = {}

    def find(self, name: str) -> ModuleSpec | None:
        if name not in self._found:
            self._found[name] = self._look(name)
        return self._found[name]

    def _look(self, name: str) -> ModuleSpec | None:
        search: list[str] | None = None
        if parent := name.rpartition(".")[0]:
            above = self.find(parent)
            if above is None or above.submodule_search_locations is None:
                return None
            search = _locations(above)
        for finder in sys.meta_path:
            if not hasattr(finder, "find_spec") or getattr(finder, "only_guards", False):
                continue
            try:
                found = finder.find_spec(name, search)
            except KeyError:  # a namespace package below one that is not imported: its own path asks for that one
                found = ModuleSpec(name, None, is_package=True)
                places = [os.path.join(place, name.rpartition(".")[2]) for place in search or ()]
                found.submodule_search_locations = [place for place in places if os.path.isdir(place)]
            if found is not None:
                return found
        return None


def _locations(spec: ModuleSpec) -> list[str]:
    return list(spec.submodule_search_locations or ())


def _file_of(spec: ModuleSpec) -> str | None:
    """The file that a module is loaded from: its source, its library, or the archive that holds it."""
    for path in (spec.origin, getattr(spec.loader, "archive", None)):
        if path is not None and os.path.isfile(path):
            return str(path)
    return None


@functools.cache
def _installed_places() -> tuple[str, ...]:
    """Directories of the standard library and of installed packages."""
    paths = sysconfig.get_paths()
    places = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    places = [*places, site.getusersitepackages()]
    return tuple({f"{place}{os.sep}" for path in places for place in (path, os.path.realpath(path))})


def _is_installed(path: str) -> bool:
    parts = path.split(os.sep)
    return "site-packages" in parts or "dist-packages" in parts or f"{path}{os.sep}".startswith(_installed_places())


class _Closure:
    """Files that some modules reach, by label."""

    def __init__(self) -> None:
        self._files: dict[str, Source] = {}
        self._finder = Finder()
        self._seen: set[str] = set()
        self._homes: set[str] = set()  # packages that define the stages: first-party also where they are installed

    def grow(self, modules: Iterable[str]) -> dict[str, Source]:
        roots: set[str] = set()
        for module in modules:
            spec = self._finder.find(module)
            path = None if spec is None else _file_of(spec)
            if path is None:
                raise UserError(
                    f"module `{module}` has no source file, so its code cannot be part of a stage key",
                    "put the stage's function into a module file that the stage's own process can import",
                )
            roots.add(module)
            self._homes.update({module.partition(".")[0]} - {"polytrope"})
            if room := _STAGE_ROOM.match(module):
                inside = (item.relative_to(Path(path).parent) for item in Path(path).parent.rglob("*.py"))
                roots.update(f"{room[0]}/{item.as_posix()}"[:-3].replace("/", ".") for item in inside)
        waiting = sorted(roots)
        while waiting:
            name = waiting.pop()
            if name not in self._seen:
                self._seen.add(name)
                waiting.extend(self._take(name, counts=name in roots))
        return self._files

    def _take(self, name: str, *, counts: bool) -> Iterator[str]:
        """Take in a module if it is first-party, or `counts` in any case; what it names follows."""
        spec = self._finder.find(name)
        at_home = name.partition(".")[0] in self._homes
        if spec is None or not (counts or at_home or is_first_party(name, spec)):
            return
        parent = name.rpartition(".")[0]
        if parent:
            yield parent
        path = _file_of(spec)
        if path is None:  # a namespace package
            return
        source = read_source(Path(path))
        beginning, is_package = name.replace(".", "/"), spec.submodule_search_locations is not None
        self._files[f"{beginning}/__init__.py" if is_package else beginning + os.path.splitext(path)[1]] = source
        for native in _native_files(Path(path).parent) if is_package else ():
            self._files[f"{beginning}/{native.relative_to(Path(path).parent).as_posix()}"] = read_source(native)
        yield from self._named(source, name if is_package else parent)

    def _named(self, source: Source, package: str) -> Iterator[str]:
        """Modules that a file of `package` may import; some of them do not exist."""
        for dots, module, names in source.imports:
            above = package.split(".")[: -(dots - 1) or None] if dots and package else []
            base = ".".join([*above, module] if module else above)
            if not base:
                continue
            if base == "polytrope":  # which defines nothing itself: the modules behind what is named, or behind all
                places = polytrope.PLACES
                yield from (places.get(name, f"{base}.{name}") for name in (names if set(names) - {"*"} else places))
                continue
            yield base
            for name in self._exported(base) if names == ("*",) else names:
                yield f"{base}.{name}"
        for text in source.dotted:
            top = text.partition(".")[0]
            spec = self._finder.find(top)
            if spec is not None and (top == "polytrope" or is_first_party(top, spec)):
                yield text

    def _exported(self, module: str) -> tuple[str, ...]:
        """What `from module import *` may import beyond the module itself."""
        spec = self._finder.find(module)
        path = None if spec is None or not is_first_party(module, spec) else _file_of(spec)
        return () if path is None else read_source(Path(path)).exported


def _native_files(directory: Path) -> Iterator[Path]:
    """C, C++ and CUDA files of a package; a package inside it has its own."""
    for root, directories, files in os.walk(directory):
        directories[:] = [
            name
            for name in directories
            if not name.startswith((".", "__pycache__", "build"))
            and not os.path.exists(os.path.join(root, name, "__init__.py"))
        ]
        for name in files:
            if name.endswith(_OTHER_SUFFIXES):
                yield Path(root) / name


def read_source(path: Path) -> Source:
    """What a file says; it is read again when its time, size or inode differ.

    Raises:
        UserError: it cannot be read, or is not valid Python.
    """
    try:
        status = path.stat()
        return _read_source(str(path), (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}", "its code is part of a stage") from None


@functools.lru_cache(maxsize=4096)
def _read_source(path: str, _mark: tuple[int, ...]) -> Source:
    return parse_source(Path(path).read_bytes(), path)


def parse_source(data: bytes, path: str) -> Source:
    """What the bytes of a file say.

    Raises:
        UserError: not valid Python.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    if not path.endswith(".py"):
        return Source(sha256, sha256)
    try:
        tree = ast.parse(data, filename=path)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not valid Python: {error}", "its code is part of a stage") from None
    reader = _Reader()
    reader.read(tree)
    return Source(
        hashlib.sha256("".join(reader.text).encode(errors="surrogatepass")).hexdigest(),
        sha256,
        tuple(reader.imports),
        frozenset(reader.dotted),
        tuple(reader.exported),
    )


class _Reader:
    """One pass through a syntax tree: its text (one for all versions of Python), and the modules it names."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.imports: list[tuple[int, str, tuple[str, ...]]] = []
        self.dotted: set[str] = set()
        self.exported: list[str] = []
        self._never_run = 0  # depth below `if TYPE_CHECKING:`

    def read(self, value: Any) -> None:
        if isinstance(value, ast.AST):
            self._look(value)
            self.text.append(f"{type(value).__name__}(")
            for name in value._fields:
                item = getattr(value, name, None)
                if item is None or item == [] or name in _IGNORED_FIELDS:
                    continue
                self.text.append(name)
                never_run = name == "body" and _is_for_types(value)
                self._never_run += never_run
                self.read(item[1:] if name == "body" and _has_docstring(value) else item)
                self._never_run -= never_run
            self.text.append(")")
        elif isinstance(value, list):
            self.text.append("[")
            for item in value:
                self.read(item)
            self.text.append("]")
        else:
            self.text.append(repr(value))

    def _look(self, node: ast.AST) -> None:
        match node:
            case ast.Import() | ast.ImportFrom() if self._never_run:
                pass
            case ast.Import():
                self.imports.extend((0, name.name, ()) for name in node.names)
            case ast.ImportFrom():
                self.imports.append((node.level, node.module or "", tuple(name.name for name in node.names)))
            case ast.Call(
                func=ast.Name("import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                bare = name.lstrip(".")
                self.imports.append((len(name) - len(bare), bare, ()))
            case ast.Constant(value=str(text)) if found := _DOTTED.fullmatch(text):
                self.dotted.add(found[1])
            case ast.Assign(targets=[ast.Name("__all__")], value=ast.List(elts) | ast.Tuple(elts)):
                self.exported = [
                    item.value for item in elts if isinstance(item, ast.Constant) and type(item.value) is str
                ]


def _has_docstring(node: ast.AST) -> bool:
    match node:
        case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            match node.body:
                case [ast.Expr(ast.Constant(value=str())), *_]:
                    return True
    return False


def _is_for_types(node: ast.AST) -> bool:
    match node:
        case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
            return True
    return False
