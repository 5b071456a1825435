"""What a stage may leave behind in its process. One that is as it was before may take the next stage; any other ends.

Not seen: changes inside the objects that a module holds (other than its lists, dictionaries, sets and classes), and
what C libraries keep to themselves.
"""

from __future__ import annotations

import functools
import gc
import locale
import logging
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

_GROWTH = 64 * 2**20  # bytes of memory that a stage may leave allocated
_LIMITS = sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})
_SIGNALS = sorted(signal.Signals)
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)

State = dict[str, Any]


def process_state(own: Collection[str]) -> State | None:
    """This process at a moment, but for its threads (`worker.is_light`); None where that cannot be told (no /proc).

    It holds the objects themselves: comparing lists of them asks for identity first, and none of them is freed, so that
    no later one can take its place.

    Args:
        own: modules of which only the bindings are looked at: the engine's, with what they import.
    """
    try:
        umask = os.umask(0o077)
        os.umask(umask)
        modules = dict(sys.modules)
        return {
            "modules": list(modules.values()),
            "globals": [_bindings(module) for module in modules.values()],
            "contents": [_contents(module) for name, module in modules.items() if name not in own],
            "environment": dict(os.environ),
            "directory": os.getcwd(),
            "search path": list(sys.path),
            "descriptors": os.listdir("/proc/self/fd"),
            "standard descriptors": [(status.st_dev, status.st_ino) for status in map(os.fstat, range(3))],
            "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
            "signal handlers": [signal.getsignal(number) for number in _SIGNALS],
            "blocked signals": signal.pthread_sigmask(signal.SIG_BLOCK, []),
            "timers": [signal.getitimer(number) for number in _TIMERS],
            "umask": umask,
            "limits": [resource.getrlimit(number) for number in _LIMITS],
            "priority": (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)),
            "loggers": _loggers(),
            "warnings": list(warnings.filters),
            "interpreter": (gc.isenabled(), gc.get_threshold(), sys.getrecursionlimit(), sys.getswitchinterval()),
            "hooks": (sys.gettrace(), sys.getprofile(), threading.gettrace(), threading.getprofile()),
            "defaults": (socket.getdefaulttimeout(), tempfile.tempdir, locale.setlocale(locale.LC_ALL), time.tzname),
        }
    except Exception:  # a module may hold anything, also what cannot be looked at: the process then ends with its stage
        return None


def differences(before: State | None, after: State | None, memory: int) -> list[str]:
    """What has changed; [] if nothing that can be seen. `memory`: resident bytes at `before`."""
    if before is None or after is None:
        return ["unknown"]
    found = [] if resident_memory() < memory + _GROWTH else ["memory"]
    for name, value in before.items():
        try:
            same = bool(value == after[name])
        except Exception:  # some object of a module does not like to be compared: then it is another one than before
            same = False
        if not same:
            found.append(name)
    return found


def resident_memory() -> int:
    """Bytes of this process in memory; 0 if it cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _bindings(module: ModuleType | None) -> list[Any]:
    return list(getattr(module, "__dict__", {}).values())  # `sys.modules["x"] = None` forbids an import


def _contents(module: ModuleType | None) -> list[Any]:
    """What its lists, dictionaries, sets and caches hold, also those of its classes."""
    found: list[Any] = []
    for name, value in getattr(module, "__dict__", {}).items():
        if name == "__builtins__":
            continue
        values = [value]
        if isinstance(value, type) and value.__module__ == module.__name__:  # type: ignore[union-attr]
            values = list(vars(value).values())
            found.append(values)
        for item in values:
            if type(item) in (list, set, dict):
                found.append(item.copy())
            elif isinstance(item, functools._lru_cache_wrapper):
                found.append(item.cache_info().currsize)
    return found


def _loggers() -> list[Any]:
    loggers = logging.root.manager.loggerDict.values()
    return [
        (item, item.level, item.disabled, item.propagate, list(item.handlers), list(item.filters))
        for item in (logging.root, *loggers)
        if isinstance(item, logging.Logger)
    ]
