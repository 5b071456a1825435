"""Small stages that the engine's tests run: they write, read, fail, hang, and leave traces of every call."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote, quote_plus

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


LEFT: list[str] = []


def leave(context: StageContext, source: Artifact | None = None) -> dict[str, float]:
    """Leaves something behind in its process and environment; returns how much it found there of others."""
    found = len(LEFT) + ("LEFT_BEHIND" in os.environ)
    LEFT.append(context.stage)
    os.environ["LEFT_BEHIND"] = "1"
    (context.output / "text").write_text(f"{source and source.digest}")
    return {"process": float(os.getpid()), "found": float(found)}


def descend(context: StageContext, pid_file: str, how: str) -> None:
    """Starts processes in every way in which one may get out of sight, then ends as it is told.

    They ignore SIGTERM: one in a session of its own, one whose parent has ended, one of those without an environment,
    and a fork that runs no other program.
    """
    sleep = "trap '' TERM; echo $$; exec sleep 600"
    pids = [subprocess.Popen(["sh", "-c", sleep], stdout=subprocess.DEVNULL, start_new_session=True).pid]
    orphan = ["sh", "-c", f'setsid sh -c "{sleep.replace("$", chr(92) + "$")}" & :']
    for environment in (None, {"PATH": os.environ["PATH"]}):
        started = subprocess.Popen(orphan, stdout=subprocess.PIPE, text=True, env=environment)
        assert started.stdout is not None
        pids.append(int(started.stdout.readline()))
        started.wait()
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.write(write_end, str(os.getpid()).encode())
            time.sleep(600)
        os._exit(0)
    pids.append(int(os.read(read_end, 20)))
    Path(pid_file).write_text(" ".join(map(str, [os.getpid(), *pids])))
    (context.output / "text").write_text("done")
    if how == "error":
        raise ValueError("on purpose")
    if how == "hang":
        time.sleep(600)


def say_much(text: str) -> dict[str, float]:
    """Takes a long text and returns many metrics."""
    return {f"metric {number}": float(len(text)) for number in range(5000)}


def count_calls(context: StageContext, file: str) -> None:
    """Gives another result each time, from the same key."""
    path = Path(file)
    path.write_text(path.read_text() + "x" if path.exists() else "x")
    (context.output / "text").write_text(path.read_text())


def fill(context: StageContext, kilobytes: int) -> None:
    """Writes that much, printing as it goes."""
    with (context.output / "text").open("wb") as file:
        for number in range(kilobytes):
            file.write(b"x" * 1024)
            file.flush()
            print(f"{number} of {kilobytes}")


def fill_disk_beside(context: StageContext, ballast: str, free: int) -> None:
    """Leaves `free` kilobytes on the disk, whose rest something else has taken, and goes on writing."""
    with Path(ballast).open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    os.truncate(ballast, max(0, Path(ballast).stat().st_size - free * 1024))
    fill(context, 100)


def bug(name: str) -> None:
    """Has a plain bug."""
    raise getattr(builtins, name)("a bug")


def tell_secret(secret: str, there: str, wait: bool = False, first: str = "") -> None:
    """Says its secret in every way, from a program that it starts as well; then waits to be killed."""
    message = [
        "connecting with",
        secret,
        repr(secret),
        json.dumps({"token": secret}),
        quote(secret),
        quote_plus(secret),
    ]
    print(first, *message, sep="\n")
    half = len(secret) // 2
    os.write(1, b"in two parts: " + secret[:half].encode())
    time.sleep(0.05)  # the first part must wait for the second
    os.write(1, secret[half:].encode() + b"\n")
    program = (
        "import sys, time; print('child', sys.argv[1], flush=True); open(sys.argv[2], 'w').close(); time.sleep({})"
    )
    started = f"{there}-child"
    subprocess.Popen([sys.executable, "-c", program.format(600 * wait), secret, started])
    while not os.path.exists(started):
        time.sleep(0.01)
    print("at the end", secret, end="\n" if not wait else "", flush=True)
    os.write(2, b"" if not wait else secret[:-2].encode())  # cut short by the kill
    Path(there).write_text(str(os.getpid()))
    if wait:
        time.sleep(600)
