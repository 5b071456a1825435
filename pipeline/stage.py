"""The contract between the engine and a stage: a plain typed function, what it receives, and what it may say.

A stage is a function whose parameters are told apart by their annotations:

- `StageContext`: where to write, what to log (at most one, usually called `context`);
- `Artifact`: a required input; `Artifact | None = None`: an optional one; `dict[str, Artifact]`: any number of
  branches, by label (the fan-in of a matrix or of a list of stages);
- a pydantic `BaseModel` subclass: its fields are the stage's `with:` parameters;
- anything else: one `with:` parameter, validated by pydantic.

It writes files below `context.output` and may return a dict of summary metrics, or `Stages`: further stages that follow
it. The engine commits the directory atomically after the function returns; nothing is visible to other stages before
that.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import math
import operator
import os
import re
import socket
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, create_model

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.executor_table import executor_kind
from polytrope.pipeline.support.log_filter import Filter
from polytrope.pipeline.support.secret_values import hide_in, hider, printed_forms
from polytrope.pipeline.support.text import suggest

BUILTIN_STAGES: dict[str, str] = {
    "shard": "polytrope.pipeline.stages.shard.shard:shard",
    "shard_images": "polytrope.pipeline.stages.shard.shard_images:shard_images",
    "shard_numbers": "polytrope.pipeline.stages.shard.shard_numbers:shard_numbers",
    "import_model": "polytrope.pipeline.stages.import_model.import_model:import_model",
    "train": "polytrope.pipeline.stages.train.train:train",
    "convert": "polytrope.pipeline.stages.convert.convert:convert",
    "evaluate": "polytrope.pipeline.stages.evaluate.evaluate:evaluate",
    "measure_speed": "polytrope.pipeline.stages.evaluate.measure_speed:measure_speed",
    "analyze": "polytrope.pipeline.stages.analyze.analyze:analyze",
    "export_circuit": "polytrope.pipeline.stages.export_circuit.export_circuit:export_circuit",
    "report": "polytrope.pipeline.stages.report.report:report",
    "select": "polytrope.pipeline.stages.select:select",
    "sweep": "polytrope.pipeline.stages.sweep.sweep:sweep",
    "wait_for": "polytrope.pipeline.stages.wait_for:wait_for",
    "subworkflow": "polytrope.pipeline.launch.subworkflow:subworkflow",
}
# as workflow files could name built-in stages before these had names of their own
_FORMER_NAMES = {
    "polytrope.pipeline.stages.wait_for:wait_for": "wait_for",
    "polytrope.pipeline.stages.subworkflow:subworkflow": "subworkflow",
}

InputKind = Literal["required", "optional", "many"]
RETURNED_STAGES = "returned-stages.json"  # in the artifact of a stage that returned stages
NOTES = "notes"  # file beside the events of an attempt


@dataclass(frozen=True)
class Artifact:
    """A committed, verified, read-only directory that another stage produced.

    Args:
        path: the directory.
        digest: sha256 over its manifest (paths, sizes, hashes of all files): equal digests mean equal bytes.
        stage: name of the stage that produced it, in this workflow.
    """

    path: Path
    digest: str
    stage: str


@dataclass(frozen=True)
class Stages:
    """Further stages, decided at run time: what a stage function returns so that they follow it.

    They are committed with the artifact, as `returned-stages.json`, so a resume or a stored result brings them back
    without running the function again. `split` returning `{"part0": …}` makes the stage `split/part0`; the stages name
    each other, and those of the file, as in the file. Later stages of the file read `split/part0`, or all: `split/*`.

    Args:
        stages: name → what stands under the name in a workflow file (`uses`, `with`, `inputs`, …), or a `StageSpec`.
        summary: metrics of the stage itself.
    """

    stages: Mapping[str, Any]
    summary: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """As it is committed.

        Raises:
            UserError: something that is no plain data.
        """

        def plain(value: Any) -> Any:
            if isinstance(value, BaseModel):
                return {
                    info.alias or name: getattr(value, name)
                    for name, info in type(value).model_fields.items()
                    if name in value.model_fields_set
                }
            if callable(value):
                return name_of_function(value)
            raise TypeError(f"`{value!r}` is no plain data")

        try:
            return json.dumps(dict(self.stages), default=plain, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the returned stages cannot be kept: {error}", "use texts, numbers, lists and mappings, as in a file"
            ) from None


@dataclass(frozen=True)
class Resources:
    """What a stage asks for. `workers` × (`cpus`, `gpus`) is reserved; memory is in bytes per worker."""

    workers: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0


class EventWriter:
    """Appends a stage's events (metrics, progress, artifacts) to a file of this process in `directory`.

    One line of JSON per event, one `write` call per line, no network (`python -m benchmarks.outbox` times it). The
    driver tails the files for the progress display and projects them to MLflow; an outage there never reaches the
    stage. Picklable: a copy in another process opens a file of its own. `secrets`: variable → value, never written.
    """

    def __init__(self, directory: Path, secrets: Mapping[str, str] | None = None) -> None:
        self.directory, self._secrets = Path(directory), dict(secrets or {})
        self._descriptor: int | None = None
        self._owner: int | None = None

    def __reduce__(self) -> tuple[type[EventWriter], tuple[Path, dict[str, str]]]:
        return type(self), (self.directory, self._secrets)

    def append(self, kind: str, **payload: Any) -> None:
        if self._descriptor is None or self._owner != os.getpid():
            self.directory.mkdir(parents=True, exist_ok=True)
            name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}.jsonl"
            self._descriptor = os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self._owner = os.getpid()
        line = json.dumps({"kind": kind, "time": time.time(), **self.hidden(payload)}, separators=(",", ":"))
        os.write(self._descriptor, line.encode() + b"\n")

    def close(self) -> None:
        """Let go of the file; a later event opens another one."""
        if self._descriptor is not None and self._owner == os.getpid():
            os.close(self._descriptor)
        self._descriptor = None

    def note(self, text: str) -> None:
        """Beside the events, for the journal."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / NOTES).open("ab", buffering=0) as file:
            file.write(json.dumps(self.hidden(text)).encode() + b"\n")

    def filter(self) -> Filter:
        """For what the stage writes to files of its own: a stream of bytes without the values of secrets."""
        return Filter(printed_forms(self._secrets))

    def hidden(self, payload: Any) -> Any:
        """Plain data without the values of secrets, but for the keys of a mapping."""
        return hide_in(payload, hider(self._secrets), plain_keys=1) if self._secrets else payload


@dataclass
class StageContext:
    """What a running stage knows and may say.

    Args:
        stage: name in the workflow, with its matrix branch: `train` or `train[activation=gelu]`.
        run_id: the run.
        key: the stage key (sha256), stable over retries and resumes.
        attempt: 1 for the first try.
        output: the staging directory; its content becomes the artifact.
        scratch_directory: of `scratch`.
        executor: its name; a stage that is parallel inside follows it, see `starts_with_ray`.
        resources: what the workflow file granted.
        events: the writer behind the `log_*` methods; hand it to worker processes.
        store: address of the store that the result goes to; for a stage that runs another workflow.
        modules: those whose code is part of the key; None: called by hand, without a key.
    """

    stage: str
    run_id: str
    key: str
    attempt: int
    output: Path
    scratch_directory: Path
    executor: str
    resources: Resources
    events: EventWriter
    store: str = ".polytrope"
    modules: frozenset[str] | None = None

    def import_function(self, name: str) -> Callable[..., Any]:
        """The function or class `package.module:function` that a parameter names, imported.

        Raises:
            UserError: it is not there, or its code is no part of the stage's key (`@stage(imports=…)`).
        """
        module, _, function = name.partition(":")
        if self.modules is not None and module not in self.modules:
            raise UserError(
                f"stage `{self.stage}` would run `{name}`, whose code is no part of its key",
                "take the stage that names it as the input, with no other stage between",
            )
        found = getattr(importlib.import_module(module), function, None)
        if not callable(found):
            raise UserError(f"module `{module}` has no function `{function}`")
        return typing.cast(Callable[..., Any], found)

    @property
    def starts_with_ray(self) -> bool:
        """Whether what the stage does in parallel goes to Ray, not to child processes."""
        return executor_kind(self.executor).starts_with_ray

    @property
    def scratch(self) -> Path:
        """A directory that survives retries and resumes of the same key (checkpoints); removed after commit."""
        self.scratch_directory.mkdir(parents=True, exist_ok=True)
        return self.scratch_directory

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Metrics of one step (a curve), or without `step` of the stage as a whole.

        Raises:
            UserError: a value that is no number, or a step that is no integer; so do the other methods in their kind.
        """
        said = f"stage `{self.stage}`: log_metrics"
        values = numbers(said, metrics)
        self.events.append("metrics", step=None if step is None else _step(f"{said}: step", step), values=values)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Facts worth a column in MLflow beyond the stage's own parameters (parameter counts, derived sizes)."""
        said = f"stage `{self.stage}`: log_params"
        values = {_text(f"{said}: a name", name): str(value) for name, value in _mapping(said, params).items()}
        self.events.append("params", values=values)

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """The data this stage read or made: MLflow's `log_input`. `profile`: counts and sizes."""
        said = f"stage `{self.stage}`: log_dataset"
        texts = {"name": name, "digest": digest, "source": os.fspath(source) if isinstance(source, Path) else source}
        self.events.append(
            "dataset",
            **{field: _text(f"{said}: {field}", value) for field, value in texts.items()},
            profile={
                _text(f"{said}: a name in profile", key): _plain(f"{said}: profile `{key}`", value)
                for key, value in _mapping(f"{said}: profile", profile).items()
            },
        )

    def log_artifact(self, path: str, *, parent: bool = False) -> None:
        """Show a path below `output` in MLflow: on this run, or on the workflow's (`parent`)."""
        self.events.append("artifact", path=self._below_output("log_artifact", path), parent=bool(parent))

    def log_model(self, path: str, *, name: str, alias: str) -> None:
        """Register the model directory `path` (relative to `output`) in MLflow's model registry under an alias."""
        said = f"stage `{self.stage}`: log_model"
        self.events.append(
            "model",
            path=self._below_output("log_model", path),
            name=_text(f"{said}: name", name),
            alias=_text(f"{said}: alias", alias),
        )

    def progress(self, done: float, total: float, message: str = "") -> None:
        """How far the stage is (any unit) and one short line such as `loss 2.31 · 18.2k tokens/s`."""
        said = f"stage `{self.stage}`: progress"
        values = {"done": _number(f"{said}: done", done), "total": _number(f"{said}: total", total)}
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(f"{said}: {name}: {value} is not finite", "give the end as a number, or use `message`")
        self.events.append("progress", **values, message=str(message))

    def message(self, text: str) -> None:
        """One line for the log and the terminal."""
        self.events.append("message", text=str(text))

    def _below_output(self, method: str, path: str | Path) -> str:
        """A path relative to `output`, as text."""
        said = f"stage `{self.stage}`: {method}: path"
        text = _text(said, path.as_posix() if isinstance(path, Path) else path)
        if os.path.isabs(text):
            text = os.path.relpath(text, self.output)
        if os.path.normpath(text).split(os.sep)[0] == "..":
            raise UserError(f"{said}: `{path}` is not below context.output", "write the file below context.output")
        return text

    def note(self, text: str) -> None:
        """A message that the run's journal keeps, within seconds: why the stage did something out of the ordinary."""
        self.message(text)
        self.events.note(text)


def numbers(said: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as plain floats.

    Args:
        said: by whom, for the message.
        values: name → number of any kind: Python's, NumPy's, a tensor with one element.

    Raises:
        UserError: names the metric and its value.
    """
    return {
        _metric_name(said, name): _number(f"{said}: `{name}`", value) for name, value in _mapping(said, values).items()
    }


def _mapping(said: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{said}: {_show(value)} is not a mapping", "give name: value pairs")
    return value


def _number(said: str, value: Any) -> float:
    try:
        element = value.item() if hasattr(value, "item") else value  # an array's or a tensor's, whatever its shape
        if not isinstance(element, str | bytes | bytearray):
            return float(element)
    except Exception:  # a tensor may raise anything
        pass
    raise UserError(f"{said}: {_show(value)} is not a number", "give an int, a float, or something with one element")


def _integer(said: str, value: Any) -> int:
    try:
        return operator.index(value)
    except Exception:  # as above
        raise UserError(f"{said}: {_show(value)} is not an integer", "give the number of the step") from None


def _step(said: str, value: Any) -> int:
    step = _integer(said, value)
    if not -(2**63) <= step < 2**63:
        raise UserError(f"{said}: {_show(step)} takes more than 64 bits", "give the number of the step")
    return step


def _metric_name(said: str, value: Any) -> str:
    name = _text(f"{said}: the name of a metric", value)
    if not name.strip():
        raise UserError(f"{said}: the name of a metric is empty: {name!r}", "give it a name")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise UserError(f"{said}: the name of a metric: {name!r} holds half of a surrogate pair", "leave it out")
    return name


def _text(said: str, value: Any) -> str:
    if isinstance(value, str):
        return str(value)
    raise UserError(f"{said}: {_show(value)} is not a text", "give a str")


def _plain(said: str, value: Any) -> Any:
    """Something that JSON can hold."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {_text(f"{said}: a name", key): _plain(said, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(said, item) for item in value]
    if hasattr(value, "__index__"):
        return _integer(said, value)
    return _number(said, value)


def _show(value: Any) -> str:
    """A value in a message, with its type."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"(its repr raises {type(error).__name__})"
    text = text if len(text) <= 80 else f"{text[:77]}…"
    return text if value is None else f"{text} ({type(value).__name__})"


def stage_context(
    directory: str | Path,
    *,
    stage: str = "stage",
    executor: str = "local",
    resources: Resources = Resources(),
) -> StageContext:
    """A context to call a stage function by hand, without an engine: in its test, or to measure it.

    Args:
        directory: gets `output`, `scratch` and `events`; the same directory again continues from its `scratch`.
        stage: the name that the stage sees.
        executor: `ray` needs a connection to a cluster.
        resources: what is granted.
    """
    directory = Path(directory)
    (directory / "output").mkdir(parents=True, exist_ok=True)
    return StageContext(
        stage=stage,
        run_id="run",
        key="key",
        attempt=1,
        output=directory / "output",
        scratch_directory=directory / "scratch",
        executor=executor,
        resources=resources,
        events=EventWriter(directory / "events"),
        store=str(directory / "store"),
    )


CheckFunction = Callable[[Any, Mapping[str, Any]], None]
PromiseFunction = Callable[[Any, Mapping[str, Any], Resources, Path], Any]
FingerprintFunction = Callable[[Any, Path], Mapping[str, str]]
ImportsFunction = Callable[[Any, Mapping[str, Any]], Mapping[str, str]]
ReturnsFunction = Callable[[Any], tuple[Mapping[tuple[str, ...], tuple[str, ...]], Mapping[str, Any]]]


class _Unpromised:
    def __repr__(self) -> str:
        return "UNPROMISED"


UNPROMISED: Final = _Unpromised()  # stands for a result of which nothing is known before it is there


@dataclass(frozen=True)
class StageOptions:
    """What the `stage` decorator attaches. See `stage`."""

    reads: tuple[str, ...] = ()
    parallel: bool = False
    measured: bool = False
    cpu_only: bool = False
    check: CheckFunction | None = None
    promise: PromiseFunction | None = None
    fingerprint: FingerprintFunction | None = None
    imports: ImportsFunction | None = None
    returns: ReturnsFunction | None = None


def stage(
    *,
    reads: Iterable[str] = (),
    parallel: bool = False,
    measured: bool = False,
    cpu_only: bool = False,
    check: CheckFunction | None = None,
    promise: PromiseFunction | None = None,
    fingerprint: FingerprintFunction | None = None,
    imports: ImportsFunction | None = None,
    returns: ReturnsFunction | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Optional decorator of a stage function.

    Args:
        reads: data files, directories or globs whose content is part of the stage key, relative to the directory of
            the function's module. (Its code, and that of all project modules that it imports, is so in any case.)
        parallel: the stage starts tasks or workers of its own for its `resources`; its own task reserves no CPU.
        measured: its result holds times, which no repetition can give again; `reproduce` does not compare it.
        cpu_only: it makes no use of a GPU: `resources.gpus` above 0 is refused before anything starts.
        check: `check(parameters, upstream)` raises `UserError` before anything starts. `upstream` maps each input name
            to the validated parameters of the producing stage (a dict of them by label for a fan-in, None if absent).
            A message that begins with `parameter: `, `inputs.NAME: ` or `resources.NAME: ` is shown with its line.
        promise: `promise(parameters, upstream, resources, directory)` returns what is certain of the result before
            anything starts (one of `pipeline.data.promised`, or anything that later stages understand; None: nothing),
            and raises `UserError` where an input cannot fit. `upstream` maps each input to what its stage promised,
            `UNPROMISED` where that says nothing, None if there is no such input;
            `directory`: the workflow file's, for relative paths.
        fingerprint: `fingerprint(parameters, directory)` returns what beyond the parameters decides the result (digests
            of the files they name), as strings; part of the key. `directory`: the workflow file's, for relative paths.
            Raises `UserError` if a file is missing or empty.
        imports: `imports(parameters, upstream)` returns the functions of the project that the stage will import
            (`StageContext.import_function`) because its parameters name them, or its inputs need them: by field
            (`factory`, `inputs.model`), as `package.module:function`. Their code, and that of all project modules they
            import, is part of the key. `upstream` maps each input to what its stage promised.
        returns: `returns(parameters)`, where it is known before the stage runs which `Stages` it may return: these
            stages, checked with all others before anything starts; and before them, for messages, where below this
            stage the file has what stands in each: `{(): ("with", "stage"), ("with", "steps"): ("with", "budget")}`.
    """
    if isinstance(reads, str):
        raise TypeError(f"reads={reads!r}: give a list of paths")
    options = StageOptions(tuple(reads), parallel, measured, cpu_only, check, promise, fingerprint, imports, returns)

    def attach(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__polytrope_stage__ = options  # type: ignore[attr-defined]
        return function

    return attach


@dataclass(frozen=True)
class StageDefinition:
    """A stage function as the planner and the worker see it. `uses` is what the workflow file said."""

    uses: str
    function: Callable[..., Any]
    inputs: dict[str, InputKind]
    parameters_model: type[BaseModel]
    parameters_argument: str | None  # the argument that takes the whole model, or None: one argument per field
    context_argument: str | None
    options: StageOptions = field(default_factory=StageOptions)

    @property
    def modules(self) -> list[str]:
        """Where the stage is defined: the module that `uses` names, the function's, and that of its parameters."""
        named = BUILTIN_STAGES.get(self.uses, self.uses).partition(":")[0]
        model = [self.parameters_model.__module__] if self.parameters_argument else []
        return list(dict.fromkeys([named, self.function.__module__, *model]))

    @property
    def description(self) -> str:
        return inspect.getdoc(self.function) or ""

    def call(
        self, context: StageContext, parameters: BaseModel, inputs: Mapping[str, Artifact | dict[str, Artifact] | None]
    ) -> dict[str, float]:
        """Run the function; returns its summary metrics (empty if it returned None).

        `Stages` that it returned are written below `context.output`.
        """
        arguments: dict[str, Any] = dict(inputs)
        if self.context_argument:
            arguments[self.context_argument] = context
        if self.parameters_argument:
            arguments[self.parameters_argument] = parameters
        else:
            arguments.update({name: getattr(parameters, name) for name in type(parameters).model_fields})
        result = self.function(**arguments)
        if result is None:
            return {}
        if isinstance(result, Stages):
            (context.output / RETURNED_STAGES).write_text(result.to_json(), encoding="utf-8")
            result = result.summary
        if not isinstance(result, Mapping):
            raise UserError(
                f"stage `{context.stage}` returned {_show(result)}",
                "return None, a dict of metric name → number, or `Stages`; write files below context.output",
            )
        return numbers(f"stage `{context.stage}` returned", result)


def name_of_function(function: Any) -> str:
    """`package.module:function`, as `uses:` names it.

    Raises:
        ValueError: something that another process cannot import by a name.
    """
    if not inspect.isfunction(function):
        raise ValueError(f"{_show(function)} is not a function; write one with `def` that calls it")
    if "." in function.__qualname__ or "<" in function.__qualname__:
        raise ValueError(f"`{function.__qualname__}` does not stand at the top of its module: nobody can import it")
    return f"{function.__module__}:{function.__qualname__}"


_LOADING: ContextVar[str | None] = ContextVar("module that is being imported for a stage", default=None)


def module_being_loaded() -> str | None:
    """The module that `load_stage` imports at this moment, and whose code it therefore runs; None: no module."""
    return _LOADING.get()


def load_stage(uses: str) -> StageDefinition:
    """Import the function behind `uses:` and read its signature.

    Raises:
        UserError: unknown name, module that cannot be imported, signature that is not typed.
    """
    uses = _FORMER_NAMES.get(uses, uses)
    target = BUILTIN_STAGES.get(uses, uses)
    if not re.fullmatch(r"[\w.]+:\w+", target):
        raise UserError(
            f"unknown stage `{uses}`",
            f"{suggest(uses, BUILTIN_STAGES)}; your own: `package.module:function`",
        )
    module_name, function_name = target.split(":")
    if module_name == "__main__":
        raise UserError(
            f"stage `{uses}` is defined in a script or a notebook, which the stage's own process cannot import",
            "move the function into a module file beside it, and import it from there",
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    outer = _LOADING.set(module_name)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a module prints is no part of a command's answer
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"cannot import `{module_name}` for stage `{uses}`: {error}",
            "the module must be importable from the directory polytrope is started in, or installed",
        ) from error
    finally:
        _LOADING.reset(outer)
    function = getattr(module, function_name, None)
    if function is None:
        raise UserError(f"module `{module_name}` has no function `{function_name}` (stage `{uses}`)")
    if not inspect.isfunction(function):
        raise UserError(
            f"`{uses}` is not a function: {_show(function)}", "write a function with `def`, and let it call this"
        )
    return describe_stage(uses, function)


def describe_stage(uses: str, function: Callable[..., Any]) -> StageDefinition:
    """Read inputs, parameters and context from the annotations of `function`."""
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise UserError(f"stage `{uses}`: an annotation cannot be resolved: {error}") from error
    inputs: dict[str, InputKind] = {}
    fields: dict[str, Any] = {}
    model: tuple[str, type[BaseModel]] | None = None
    context_argument = None
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name not in hints:
            raise UserError(f"stage `{uses}`: argument `{name}` needs a type annotation", "no *args or **kwargs either")
        annotation = hints[name]
        if annotation is StageContext:
            context_argument = name
        elif (kind := _input_kind(annotation)) is not None:
            inputs[name] = kind
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel) and model is None:
            model = (name, annotation)
        else:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (annotation, default)
    if model and fields:
        raise UserError(
            f"stage `{uses}`: use either a parameter model or single parameters, not both: {', '.join(fields)}"
        )
    parameters_model = (
        model[1]
        if model
        else create_model(f"{function.__name__}_parameters", __config__=ConfigDict(extra="forbid"), **fields)
    )
    return StageDefinition(
        uses=uses,
        function=function,
        inputs=inputs,
        parameters_model=parameters_model,
        parameters_argument=model[0] if model else None,
        context_argument=context_argument,
        options=getattr(function, "__polytrope_stage__", StageOptions()),
    )


def _input_kind(annotation: Any) -> InputKind | None:
    if annotation is Artifact:
        return "required"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType) and set(arguments) == {Artifact, type(None)}:
        return "optional"
    if origin is dict and arguments == (str, Artifact):
        return "many"
    return None
