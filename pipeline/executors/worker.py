"""What happens inside the process that runs a stage, the same for every executor: call the function, seal its output.

The driver sends a `StageTask` and gets an `Outcome`; nothing else passes between them. Imports stay small: with the
local executor most stages start as a fork of a process that has imported this module.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import json
import os
import pickle
import random
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.executors.input_check import InputCheck
from polytrope.pipeline.executors.stage_output import flush_output, output_to
from polytrope.pipeline.executors.system_metrics import sampled
from polytrope.pipeline.stage import (
    RETURNED_STAGES,
    Artifact,
    EventWriter,
    Resources,
    StageContext,
    StageDefinition,
    load_stage,
)
from polytrope.pipeline.store.manifest import FileEntry, build_manifest, seal
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.files import is_disk_full
from polytrope.pipeline.support.secret_values import hide_in, hider
from polytrope.pipeline.workflow.code import Code, module_of
from polytrope.pipeline.workflow.graph import StageNode, declared_reads, resolve_parameters
from polytrope.pipeline.workflow.loaded import edited_files, guarded

Item = TypeVar("Item")
ErrorKind = Literal["user", "bug", "error", "timeout", "worker lost", "store", "cancelled"]
_BUGS = (NameError, TypeError, AttributeError, ImportError, AssertionError)  # the same happens again
_PACKAGE = str(Path(__file__).parents[2])  # polytrope
_LONGEST_TEXT = 20_000  # characters of a message or traceback in the journal, MLflow and the terminal


@dataclass(frozen=True)
class StageError:
    """Why an attempt failed. `kind` decides about a retry: `user` and `store` never, `bug` only if the stage asks."""

    kind: ErrorKind
    message: str
    hint: str = ""
    type: str = ""  # class of the exception
    traceback: str = ""  # of the stage's own frames
    place: str = ""  # FILE:LINE in the user's own code

    def to_dict(self) -> dict[str, str]:
        return {
            "kind": self.kind, "class": self.type, "message": self.message, "hint": self.hint,
            "traceback": self.traceback, "place": self.place,
        }  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of an attempt: an error, or summary metrics and the sealed files. `duration` in seconds.

    `stages`: those that the stage returned, by name.
    """

    error: StageError | None = None
    summary: dict[str, float] = field(default_factory=dict)
    entries: list[FileEntry] = field(default_factory=list)
    duration: float = 0.0
    stages: dict[str, Any] | None = None


@dataclass(frozen=True)
class StoredInput:
    """A committed artifact that a stage reads, wherever its files are. `stage`: that produced it."""

    key: str
    digest: str
    stage: str


StoredInputs = dict[str, StoredInput | dict[str, StoredInput] | None]


@dataclass(frozen=True)
class StageTask:
    """One attempt at one stage, picklable.

    Args:
        identifier: unique within the driver.
        components: of the key, for the manifest.
        uses: the stage function.
        code: what the key says of it.
        reads: file → sha256 of the data files in the key; `read_patterns`: those of the workflow file.
        parameters: (field values, names of the fields that were given).
        inputs: by input name.
        output, scratch, spool, log: where it writes.
        directory: the workflow file's; the working directory of the stage, so that relative paths mean the same
            in its `fingerprint` and when it runs.
        search_path: the driver's `sys.path`.
        environment: variables that the stage gets on every host.
        secrets: values for `${env.NAME}`; never shown.
        store: address of the store that the result goes to.
        parallel: its workers reserve the resources, its own process none (`StageOptions.parallel`).
    """

    identifier: int
    run_id: str
    stage: str
    key: str
    components: dict[str, Any]
    attempt: int
    uses: str
    code: Code
    reads: dict[str, str]
    read_patterns: tuple[str, ...]
    parameters: tuple[dict[str, Any], set[str]]
    inputs: StoredInputs
    output: Path
    scratch: Path
    spool: Path
    log: Path
    executor: str
    resources: Resources
    parallel: bool
    directory: Path
    store: str
    search_path: tuple[str, ...]
    environment: dict[str, str]
    secrets: dict[str, str]


def make_task(
    node: StageNode,
    *,
    identifier: int,
    run_id: str,
    key: str,
    components: dict[str, Any],
    attempt: int,
    inputs: StoredInputs,
    output: Path,
    scratch: Path,
    run_directory: Path,
    name: str,
    executor: str,
    directory: Path,
    store: str,
) -> StageTask:
    """The task of an attempt at `node`. `name`: the stage's name as a file name."""
    values = {field_name: getattr(node.parameters, field_name) for field_name in type(node.parameters).model_fields}
    values.update(node.parameters.__pydantic_extra__ or {})
    return StageTask(
        identifier=identifier,
        run_id=run_id,
        stage=node.name,
        key=key,
        components=components,
        attempt=attempt,
        uses=node.definition.uses,
        code=node.whole_code,
        reads=node.reads,
        read_patterns=node.read_patterns,
        parameters=(values, set(node.parameters.model_fields_set)),
        inputs=inputs,
        output=output,
        scratch=scratch,
        spool=run_directory / "spool" / name / str(attempt),
        log=run_directory / "logs" / name / f"{attempt}.log",
        executor=executor,
        resources=node.resources,
        parallel=node.definition.options.parallel,
        directory=directory,
        store=store,
        search_path=(os.getcwd(), *(path for path in sys.path if path)),
        environment=dict(node.environment),
        secrets={variable: os.environ[variable] for variable in node.secrets if variable in os.environ},
    )


_definitions: dict[str, StageDefinition] = {}


def preload(task: StageTask) -> None:
    """Load the stage of a task once for all processes that are forked from this one."""
    _extend_search_path(task.search_path)
    with guarded(task.code):
        definition = load_stage(task.uses)
        _parameters(definition, task)  # fills the caches on the way
    _definitions[task.uses] = definition


def _extend_search_path(paths: Iterable[str]) -> None:
    """Put those of the driver's paths that this process does not have before its own."""
    known = set(sys.path)
    sys.path[:0] = [path for path in paths if path not in known]


def is_light() -> bool:
    """Whether what this process imported may be imported before a fork: no threads, no large libraries."""
    heavy = {"torch", "ray", "mlflow", "datasets", "numpy"} & sys.modules.keys()
    if heavy or not os.path.isdir("/proc/self/task"):
        return False
    for _ in range(20):  # a thread that was joined is there for a moment yet
        if len(os.listdir("/proc/self/task")) == 1:
            return True
        time.sleep(0.001)
    return False


def run_task(task: StageTask) -> Outcome:
    """Run the stage in this process. Every exception becomes an `Outcome`; prints go to where this process prints."""
    started = time.monotonic()
    task.output.mkdir(parents=True, exist_ok=True)
    events = EventWriter(task.spool, task.secrets)
    random.seed()  # this process may have run other stages, and with a seed
    try:
        store = Store(task.store)
        with _surroundings(task), store.scratch_mirrored(task.key), guarded(task.code):
            definition = _definitions.get(task.uses) or load_stage(task.uses)
            context = StageContext(
                stage=task.stage,
                run_id=task.run_id,
                key=task.key,
                attempt=task.attempt,
                output=task.output,
                scratch_directory=task.scratch,
                executor=task.executor,
                resources=task.resources,
                events=events,
                store=task.store,
                modules=frozenset(map(module_of, task.code.files)),
            )
            parameters = _parameters(definition, task)
            os.chdir(task.directory)
            here = Path.cwd()
            _check_reads(task, definition, here)
            inputs = _inputs_here(store, task)
            checks = [
                InputCheck(store, stored.key, label, artifact)
                for (label, stored), (_, artifact) in zip(_labelled(task.inputs), _labelled(inputs), strict=True)
            ]
            try:
                with sampled(context):
                    summary = contextvars.copy_context().run(definition.call, context, parameters, inputs)
            except BaseException:
                for check in checks:  # what it did to them is no news beside its error, but must be known
                    with contextlib.suppress(UserError):
                        check.repeat()
                raise
            _check_reads(task, definition, here)
            for check in checks:
                check.repeat()
            _check_fingerprint(task, definition, here)
            if task.parallel and (edited := edited_files(task.code)):  # its workers may have started before, or after
                raise UserError(
                    f"the code `{edited[0]}` was edited while the stage ran, and its workers may have run the new one",
                    "put it back and `polytrope resume`, which goes on from what the stage kept, or run it with the "
                    "new code: `polytrope resume --allow-code-change`",
                )
            stages = _returned_stages(task)
            with contextlib.suppress(OSError):  # most stages leave it empty, or have none
                task.scratch.rmdir()
            entries = seal(task.output)
            duration = time.monotonic() - started
            manifest = build_manifest(
                task.key, entries, components=task.components, summary=summary, stage=task.stage, run_id=task.run_id,
                duration=duration,
            )  # fmt: skip
            store.deliver(task.output, entries, manifest)
            return Outcome(None, summary, entries, duration, stages)
    except BaseException as error:  # KeyboardInterrupt and SystemExit too: the driver decides what follows
        described = describe_error(error, task.secrets)
        _say(described.traceback or described.message)
        return Outcome(error=described, duration=time.monotonic() - started)
    finally:
        events.close()


def run_logged(task: StageTask) -> Outcome:
    """`run_task`, with all that this process prints in the task's log. What goes wrong around it is its outcome too."""
    try:
        with output_to(task.log, task.secrets):
            return run_task(task)
    except BaseException as error:
        return Outcome(error=describe_error(error, task.secrets))


def _say(text: str) -> None:
    """Print to stderr, whatever the stage made of it."""
    flush_output()
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace") + b"\n")


def _check_reads(task: StageTask, definition: StageDefinition, directory: Path) -> None:
    """The data files in the key must be what they were when it was made. `directory`: the workflow file's."""
    if not task.reads:
        return
    found = declared_reads(definition, task.read_patterns, directory)
    changed = [name for name in sorted(found.keys() | task.reads.keys()) if found.get(name) != task.reads.get(name)]
    if changed:
        raise UserError(
            f"the file `{changed[0]}` (`reads:`) is not what it was when the run started: the result would not be "
            "of the data in its key",
            "it was edited meanwhile: put it back and `polytrope resume`, or go on with the new data: "
            "`polytrope resume --allow-code-change`",
        )


def _check_fingerprint(task: StageTask, definition: StageDefinition, directory: Path) -> None:
    """What the stage reads beyond its parameters must still be what is in the key. `directory`: the workflow file's."""
    if definition.options.fingerprint is None:
        return
    values, given = task.parameters  # with `${env.NAME}` as written: so they were when the key was made
    parameters = definition.parameters_model.model_construct(given, **values)
    found = dict(definition.options.fingerprint(parameters, directory))
    expected = task.components.get("fingerprint") or {}
    if changed := [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]:
        raise UserError(
            f"what `{changed[0]}` of the stage says was read has changed while it ran: the result may be of either",
            "leave the files alone until the stage has ended: `polytrope resume --allow-code-change` goes on with them",
        )


def _returned_stages(task: StageTask) -> dict[str, Any] | None:
    """What the stage returned, with `${env.NAME}` where it wrote a secret."""
    path = task.output / RETURNED_STAGES
    if not path.exists():
        return None
    stages = read_returned_stages(path)
    hidden: dict[str, Any] = hide_in(stages, hider(task.secrets), plain_keys=3)  # stages, fields, parameters
    if hidden != stages:
        path.write_text(json.dumps(hidden, indent=1), encoding="utf-8")
    return hidden


def read_returned_stages(path: Path) -> dict[str, Any]:
    """Name → stage, from the file in an artifact.

    Raises:
        UserError: a stage wrote something else there.
    """
    try:
        stages = json.loads(path.read_bytes())
    except ValueError:
        stages = None
    if not isinstance(stages, dict):
        raise UserError(
            f"{RETURNED_STAGES} is no JSON object", "return `Stages({name: {uses: …}})` instead of writing it"
        )
    return stages


def _inputs_here(store: Store, task: StageTask) -> dict[str, Artifact | dict[str, Artifact] | None]:
    """The inputs, with their files on this machine."""

    def here(stored: StoredInput) -> Artifact:
        return Artifact(store.materialize(stored.key), stored.digest, stored.stage)

    found: dict[str, Artifact | dict[str, Artifact] | None] = {}
    for name, value in task.inputs.items():
        if isinstance(value, dict):
            found[name] = {label: here(item) for label, item in value.items()}
        else:
            found[name] = None if value is None else here(value)
    return found


def _labelled(inputs: Mapping[str, Item | dict[str, Item] | None]) -> Iterator[tuple[str, Item]]:
    """Every artifact with the name of its input, those of a fan-in with their label."""
    for name, value in inputs.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{label}", artifact) for label, artifact in value.items())
        elif value is not None:
            yield name, value


def _parameters(definition: StageDefinition, task: StageTask) -> BaseModel:
    values, given = task.parameters
    parameters = definition.parameters_model.model_construct(given, **values)
    return resolve_parameters(parameters, {**os.environ, **task.secrets})


@contextlib.contextmanager
def _surroundings(task: StageTask) -> Iterator[None]:
    """Working directory, module search path and environment of the driver; put back after the stage."""
    directory, search_path = os.getcwd(), list(sys.path)
    before = {name: os.environ.get(name) for name in task.environment}
    driver_directory = task.search_path[0]
    try:
        if os.path.isdir(driver_directory):  # on another host it may be absent; there the package is installed
            os.chdir(driver_directory)
        _extend_search_path(task.search_path)
        os.environ.update(task.environment)
        yield
    finally:
        os.chdir(directory)
        sys.path[:] = search_path
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def describe_error(error: BaseException, secrets: Mapping[str, str]) -> StageError:
    """An exception of a stage as the journal keeps it, without the values of secrets and of a length to be read."""
    hidden = hider(secrets)

    def hide(text: str) -> str:
        return _shortened(hidden(text))

    name = type(error).__name__
    if isinstance(error, UserError):
        return StageError("user", hide(error.message), hide(error.hint), name)
    message = _text_of(error).strip() or name
    frames, place = hide(_frames(error)), hide(_own_place(error))
    if is_disk_full(error) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return StageError("store", hide(message), "free some space, then resume the run", name, frames, place)
    text = hide(f"{name}: {message}" if message != name else name)
    if isinstance(error, _BUGS):
        hint = "mend the function; it was not tried again, since that would end the same way"
        return StageError("bug", text, hint, name, frames, place)
    return StageError("error", text, "", name, frames, place)


def _shortened(text: str) -> str:
    """A text of any length (an exception may show a whole tensor) by its beginning and its end."""
    left_out = len(text) - _LONGEST_TEXT
    if left_out <= 0:
        return text
    half = _LONGEST_TEXT // 2
    return f"{text[:half]}\n… {left_out:,} characters are left out here …\n{text[-half:]}"


def _own_place(error: BaseException) -> str:
    """FILE:LINE of the last frame that is neither Python's, nor an installed package's, nor of polytrope; else ""."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    others = tuple(path + os.sep for path in (*paths, _PACKAGE))
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = frame.f_code.co_filename
        if not path.startswith("<") and not os.path.abspath(path).startswith(others):
            place = f"{path}:{line}"
    return place


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as inner:
        return f"(its text cannot be shown: {type(inner).__name__})"


def _frames(error: BaseException) -> str:
    """The traceback from the stage function on; the engine's own frames above it are no news."""
    frame: TracebackType | None = error.__traceback__
    engine = {function.__code__.co_filename for function in (run_task, StageDefinition.call, resolve_parameters)}
    while frame is not None and frame.tb_next is not None and frame.tb_frame.f_code.co_filename in engine:
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame)).rstrip()


def dump(value: Any) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def load_task(data: bytes) -> StageTask:
    """Unpickle a task; its parameters may be of classes that only the driver's search path finds."""
    search_path, body = pickle.loads(data)
    _extend_search_path(search_path)
    task = pickle.loads(body)
    assert isinstance(task, StageTask)
    return task


def dump_task(task: StageTask) -> bytes:
    return dump((task.search_path, dump(task)))
