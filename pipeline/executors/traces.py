"""What a stage may leave behind in its process. One that is as it was before may take the next stage; any other ends.

Seen: modules, their globals (bindings, and what their lists, dictionaries and sets hold), environment, directories,
open files, threads, children, signal handlers, umask, limits, standard streams, memory. Not seen: changes deep inside
objects and classes of a module.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Container
from pathlib import Path
from types import ModuleType
from typing import Any

GROWTH = 64 * 2**20  # bytes of memory that a stage may leave allocated
_LIMITS = sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})


def process_state(known: Container[str]) -> dict[str, Any]:
    """This process, comparable with `==` while it lives. `known`: modules that are not looked into."""
    umask = os.umask(0o077)
    os.umask(umask)
    modules = dict(sys.modules)
    return {
        "modules": list(modules),
        "globals": {
            name: _globals(module)
            for name, module in modules.items()
            if name not in known and name.partition(".")[0] not in sys.stdlib_module_names
        },
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "search path": list(sys.path),
        "descriptors": os.listdir("/proc/self/fd"),
        "threads": len(os.listdir("/proc/self/task")),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        "signal handlers": [signal.getsignal(number) for number in signal.Signals],
        "umask": umask,
        "limits": [resource.getrlimit(number) for number in _LIMITS],
        "streams": (sys.stdin, sys.stdout, sys.stderr, sys.excepthook, sys.displayhook),
    }


def _globals(module: ModuleType) -> list[tuple[str, int, list[int]]]:
    found = []
    for name, value in vars(module).items():
        if type(value) is dict and name != "__builtins__":
            content = [id(item) for pair in value.items() for item in pair]
        else:
            content = [id(item) for item in value] if type(value) in (list, set) else []
        found.append((name, id(value), content))
    return found


def resident_memory() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
