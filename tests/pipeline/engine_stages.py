"""Small stages that the engine's tests run: they write, read, fail, hang, and leave traces of every call."""

from __future__ import annotations

import contextlib
import decimal
import functools
import gc
import json
import logging
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, Stages, stage


def trace(directory: str, text: str) -> None:
    """One line per call, in a file that all processes share."""
    if directory:
        with open(Path(directory) / "calls", "a") as file:
            file.write(text + "\n")


def make(context: StageContext, text: str = "x", traces: str = "", seconds: float = 0.0) -> dict[str, float]:
    """Writes its text."""
    trace(traces, context.stage)
    time.sleep(seconds)
    (context.output / "text").write_text(text)
    return {"length": float(len(text))}


def join(context: StageContext, parts: dict[str, Artifact], separator: str = "+", traces: str = "") -> dict[str, float]:
    """Joins the texts of its inputs, in the order of their labels."""
    trace(traces, context.stage)
    texts = [(parts[label].path / "text").read_text() for label in sorted(parts)]
    (context.output / "text").write_text(separator.join(texts))
    return {"length": float(len(separator.join(texts))), "parts": float(len(parts))}


def copy(context: StageContext, source: Artifact, extra: Artifact | None = None, traces: str = "") -> dict[str, float]:
    """Copies its input, and the optional one."""
    trace(traces, context.stage)
    text = (source.path / "text").read_text() + ((extra.path / "text").read_text() if extra else "")
    (context.output / "text").write_text(text)
    return {"length": float(len(text))}


def split(
    context: StageContext, texts: list[str], traces: str = "", joined: bool = False, deeper: bool = False
) -> Stages:
    """Returns a stage per text, one that joins them, or one that returns the stages itself."""
    trace(traces, context.stage)
    (context.output / "text").write_text("".join(texts))
    stages: dict[str, object] = {
        f"part{i}": {"uses": make, "with": {"text": text, "traces": traces}} for i, text in enumerate(texts)
    }
    if joined:
        when = 'stages.part0["length"] > 0'
        inputs = {"parts": list(stages)}
        stages["sum"] = {"uses": join, "inputs": inputs, "with": {"traces": traces}, "when": when}
    if deeper:
        stages = {"inner": {"uses": split, "with": {"texts": texts, "traces": traces}}}
    return Stages(stages, {"parts": len(texts)})


def measure(text: str) -> dict[str, float]:
    return {"length": len(text)}


def return_anything(value: dict[str, object]) -> Stages:
    return Stages(value)


def fail_until(context: StageContext, attempts: int, traces: str = "", how: str = "error") -> None:
    """Fails in its first `attempts` tries."""
    trace(traces, f"{context.stage} {context.attempt}")
    count = context.scratch / "count"
    done = int(count.read_text()) if count.exists() else 0
    count.write_text(str(done + 1))
    print(f"this is try {done + 1}")
    if done < attempts:
        if how == "user":
            raise UserError("the corpus is empty", "give another one")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(7)
        if how == "hang":
            time.sleep(600)
        raise ValueError(f"try {done + 1} of {context.stage}")
    (context.output / "text").write_text("at last")


def note_until_journaled(context: StageContext) -> None:
    """Its first try waits until the journal holds what it noted, and fails; its second ends at once."""
    again = (context.scratch / "again").exists()
    context.note("second try" if again else "first try")
    if not again:
        (context.scratch / "again").touch()
        deadline = time.monotonic() + 20
        while "first try" not in (context.events.directory.parents[2] / "journal.jsonl").read_text():
            assert time.monotonic() < deadline, "the note did not come into the journal"
            time.sleep(0.02)
        raise ValueError("not yet")
    (context.output / "text").write_text("at last")


def spawn_and_hang(context: StageContext, pid_file: str, own_session: bool = False) -> None:
    """Starts a process that outlives its parent unless somebody ends it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=own_session)
    Path(pid_file).write_text(f"{os.getpid()} {child.pid}")
    (context.output / "text").write_text("")
    time.sleep(600)


def spawn_and_return(context: StageContext, pid_file: str) -> None:
    """Ends well but leaves a process behind."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(pid_file).write_text(str(child.pid))
    (context.output / "text").write_text("done")


def show_environment(token: str, traces: str = "") -> None:
    """Prints and raises its secret, as a careless stage would."""
    trace(traces, str(len(token)))
    print(f"connecting with {token}")
    raise UserError(f"the server refuses {token}")


def fill_disk(context: StageContext) -> None:
    (context.output / "text").write_bytes(b"x")
    raise OSError(28, "No space left on device")


def working_directory(context: StageContext, file: str) -> dict[str, float]:
    """Reads a file by a path relative to the workflow file."""
    text = Path(file).read_text()
    (context.output / "text").write_text(text)
    return {"length": float(len(text))}


@stage(parallel=True)
def parallel(context: StageContext) -> dict[str, float]:
    (context.output / "text").write_text("parallel")
    return {"workers": float(context.resources.workers)}


def will_not_end(context: StageContext) -> None:
    """Goes on when it is interrupted; so does the process that it starts."""
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    (context.scratch / "pids").write_text(f"{os.getpid()} {child.pid}")
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(1000)


COUNT = 0
LIST: list[int] = []
TABLE = {"count": 0}


TEXT = "0"


class Held:
    """A class with state."""

    count = 0


class Box:
    """An object with state, which nobody looks into."""

    memory = b""


BOX = Box()


@functools.cache
def cached(number: int) -> int:
    return number


def leave(context: StageContext, what: str, source: Artifact | None = None) -> dict[str, float]:
    """Leaves something behind in its process; returns what it found there of others."""
    global COUNT, TEXT
    found = COUNT + len(LIST) + TABLE["count"] + Held.count + len(BOX.memory) + ("LEFT_BEHIND" in os.environ)
    found += len(TEXT) - 1 + cached.cache_info().currsize
    drawn, digits = random.random(), decimal.getcontext().prec
    context.message("here")  # opens the file of its events
    if what == "binding":
        COUNT = 1
    elif what == "binding, again and again":
        for number in range(6):
            TEXT = f"{TEXT}{number}"
    elif what == "class":
        Held.count = 1
    elif what == "cache":
        cached(1)
    elif what == "patch":
        json.dumps = functools.partial(json.dumps)
    elif what == "forbidden import":
        sys.modules["surely_absent"] = None  # type: ignore[assignment]
    elif what == "timer":
        signal.setitimer(signal.ITIMER_REAL, 3.0)
    elif what == "blocked signal":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    elif what == "directory of temporary files":
        tempfile.tempdir = str(context.scratch)
    elif what == "warnings":
        warnings.simplefilter("error")
    elif what == "log handler":
        logging.getLogger("left behind").addHandler(logging.StreamHandler())
    elif what == "socket":
        socket.setdefaulttimeout(1.0)
    elif what == "priority":
        os.nice(1)
    elif what == "collector":
        gc.disable()
    elif what == "standard input":
        descriptor = os.open(__file__, os.O_RDONLY)
        os.dup2(descriptor, 0)
        os.close(descriptor)
    elif what == "seed":
        random.seed(0)
    elif what == "decimal":
        decimal.getcontext().prec = 3
    elif what == "list":
        LIST.append(1)
    elif what == "dictionary":
        TABLE["count"] = 1
    elif what == "memory":
        BOX.memory = b"x" * (100 * 2**20)
    elif what == "environment":
        os.environ["LEFT_BEHIND"] = "1"
    elif what == "module":
        import colorsys  # noqa: F401
    elif what == "file":
        os.dup(0)
    elif what == "thread":
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    elif what == "child":
        subprocess.Popen(["sleep", "600"])
    elif what == "orphan":
        orphan = subprocess.run(
            "sleep 600 >/dev/null 2>&1 & echo $!", shell=True, capture_output=True, text=True, check=True
        )
        (context.output / "orphan").write_text(orphan.stdout)
    elif what == "handler":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif what == "umask":
        os.umask(0)
    elif what == "limit":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    elif what == "stream":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    elif what == "error" and context.attempt == 1:
        raise ValueError("the first try")
    (context.output / "text").write_text(f"{what} {source and source.digest}")
    return {"process": float(os.getpid()), "found": float(found), "drawn": drawn, "digits": float(digits)}


def say_much(text: str) -> dict[str, float]:
    """Takes a long text and returns many metrics."""
    return {f"metric {number}": float(len(text)) for number in range(5000)}


def count_calls(context: StageContext, file: str) -> None:
    """Gives another result each time, from the same key."""
    path = Path(file)
    path.write_text(path.read_text() + "x" if path.exists() else "x")
    (context.output / "text").write_text(path.read_text())
