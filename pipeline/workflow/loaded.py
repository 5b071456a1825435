"""Whether a process runs the code that a stage's key names: what it has imported, and what it is about to import.

A process cannot ask a module what its file held when it was imported. So the bytes are noted when the module is first
seen here, or just before it is imported (`guarded`), and again after `importlib.reload`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.workflow.code import Code, Finder, find_file, is_first_party, module_of, parse_source

# what this process has imported, like `sys.modules`: name → (the module's spec, which an import makes anew; its bytes)
_noted: dict[str, tuple[ModuleSpec, bytes | None]] = {}


def note_modules() -> None:
    """Note the files of all first-party modules that are new in this process."""
    for name, module in list(sys.modules.items()):
        _note(name, module)


def _note(name: str, module: ModuleType | None) -> bytes | None:
    """The bytes that a module was imported from, as far as they are known; None: it is not first-party, or no file."""
    spec = getattr(module, "__spec__", None)
    if not isinstance(spec, ModuleSpec):
        return None
    noted = _noted.get(name)
    if noted is None or noted[0] is not spec:
        noted = _noted[name] = (spec, _bytes(spec) if is_first_party(name, spec) else None)
    return noted[1]


def _bytes(spec: ModuleSpec) -> bytes | None:
    try:
        return Path(str(spec.origin)).read_bytes() if spec.origin and os.path.isfile(spec.origin) else None
    except OSError:
        return None


def stale_module(name: str) -> str | None:
    """The file of an imported module that has been edited since this process imported it; None: it is as it was."""
    module = sys.modules.get(name)
    before = _note(name, module)
    spec = getattr(module, "__spec__", None)
    if before is None or spec is None or (now := _bytes(spec)) in (None, before):
        return None
    assert now is not None
    path = str(spec.origin)
    return None if _decides(now, path) == _decides(before, path) else path


def _decides(data: bytes, label: str) -> str:
    return parse_source(data, label).digest


@contextlib.contextmanager
def guarded(code: Code) -> Iterator[None]:
    """Inside, this process has imported nothing but what `code` says, and imports nothing else of these files.

    Raises:
        UserError: a file is not what it was when the key was made, or this process imported an older one before.
    """
    modules, finder = {module_of(label): label for label in code.files}, Finder()
    for label in code.files:
        module = sys.modules.get(module_of(label))
        data = None if module is None else _note(module_of(label), module)
        if data is None:
            path = find_file(label, finder)
            if path is None:
                raise UserError(
                    f"the stage's code `{label}` is not found where the stage runs",
                    "is the same version of the project installed, or shared, on every node?",
                )
            data = path.read_bytes()
        _compare(code, label, data)
    guard = _Guard(code, modules)
    sys.meta_path.insert(0, guard)
    try:
        yield
    finally:
        sys.meta_path.remove(guard)
        note_modules()
    if guard.refused is not None:  # whatever the stage made of it
        raise guard.refused


def edited_files(code: Code) -> list[str]:
    """Labels of the files that are not what `code` says now, whatever this process has imported."""
    finder = Finder()
    return [label for label in code.files if not _is_as_said(code, label, finder)]


def _is_as_said(code: Code, label: str, finder: Finder) -> bool:
    path = find_file(label, finder)
    try:
        _compare(code, label, path.read_bytes() if path is not None else b"")
    except (UserError, OSError):
        return False
    return True


def _compare(code: Code, label: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() == code.sources[label]:
        return
    with contextlib.suppress(UserError):  # in the middle of an edit: no valid Python
        if _decides(data, label) == code.files[label]:
            return
    raise UserError(
        f"the code `{label}` is not what it was when the run started: the result would not be of the code in its key",
        "it was edited meanwhile: put it back and `polytrope resume`, or go on with the new code: "
        "`polytrope resume --allow-code-change`; in a session that imported the older one: restart the session",
    )


class _Guard(MetaPathFinder):
    """Compares a module with the key before it is imported."""

    only_guards = True  # who looks a module up without importing it need not ask

    def __init__(self, code: Code, modules: dict[str, str]) -> None:
        self.refused: UserError | None = None
        self._code, self._modules = code, modules
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        label = self._modules.get(fullname)
        if label is None or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            spec = _find(fullname, path, target)
            data = None if spec is None else _bytes(spec)
            if spec is None or data is None:
                return None
            _compare(self._code, label, data)
            _noted[fullname] = (spec, data)
            return spec
        except UserError as refused:
            self.refused = refused
            raise
        finally:
            self._asking.now = False


def _find(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """As an import finds it."""
    for finder in sys.meta_path:
        found = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
        if found is not None:
            return found
    return None
