"""The workflow file as pydantic models, loaded with errors that name file, line and field."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    field_validator,
)

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Resources, name_of_function
from polytrope.pipeline.support.executor_table import DEFAULT_EXECUTOR, EXECUTORS
from polytrope.pipeline.support.text import suggest
from polytrope.pipeline.workflow.encoding import decode, encode_plain_fields
from polytrope.pipeline.workflow.references import has_reference, substitute
from polytrope.pipeline.workflow.refusals import show, validation_error
from polytrope.pipeline.workflow.source import KeyPath, Source, locate, parse_value, read_source

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_MEMORY_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000), ("i", 1024), ("", 1000))
}


def _parse_duration(value: Any) -> Any:
    """Seconds from a number or a text such as `90`, `10m`, `1h30m`."""
    if isinstance(value, str):
        parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[smhd])", value.strip())
        if parts and "".join(number + unit for number, unit in parts) == value.replace(" ", ""):
            return sum(float(number) * _DURATION_UNITS[unit] for number, unit in parts)
        raise ValueError("expected seconds or a duration such as `90s`, `10m`, `1h30m`")
    return value


def _parse_memory(value: Any) -> Any:
    """Bytes from a number or a text such as `512MiB`, `4GiB`, `2GB`."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
        if match and match.group(2) in _MEMORY_UNITS:
            return int(float(match.group(1)) * _MEMORY_UNITS[match.group(2)])
        raise ValueError("expected bytes or a size such as `512MiB`, `4GiB`")
    return value


_NUMBER_OR_TEXT = WithJsonSchema({"type": ["number", "string"]})
Duration = typing.Annotated[float, BeforeValidator(_parse_duration), _NUMBER_OR_TEXT]
Memory = typing.Annotated[int, BeforeValidator(_parse_memory), _NUMBER_OR_TEXT]
InputReference = str | list[str] | dict[str, str]
MATRIX_CHANGES = ("include", "exclude")  # keys of a matrix that are no axes: lists of {axis: value}


def _known_executor(name: str) -> str:
    if name not in EXECUTORS:
        raise ValueError(f"expected {' or '.join(EXECUTORS)}")
    return name


Executor = typing.Annotated[
    str, AfterValidator(_known_executor), WithJsonSchema({"type": "string", "enum": list(EXECUTORS)})
]

_STRICT = ConfigDict(extra="forbid", strict=True, populate_by_name=True, validate_assignment=True)


class ResourceSpec(BaseModel):
    """`resources:` of a stage: `workers` × (`cpus`, `gpus`, `memory`)."""

    model_config = _STRICT
    workers: int = Field(default=1, ge=1, description="processes that work on this stage")
    cpus: float = Field(default=1.0, ge=0, description="CPU cores per worker")
    gpus: float = Field(default=0.0, ge=0, description="GPUs per worker")
    memory: Memory = Field(default=0, ge=0, description="memory per worker, such as 4GiB; 0: not reserved")

    def resources(self) -> Resources:
        return Resources(workers=self.workers, cpus=self.cpus, gpus=self.gpus, memory=self.memory)


class TrackingSpec(BaseModel):
    """`tracking:`: where MLflow records the runs."""

    model_config = _STRICT
    uri: str | None = Field(default=None, description="MLflow tracking URI; by default a sqlite file in the store")
    experiment: str | None = Field(default=None, description="MLflow experiment; by default the workflow's name")
    enabled: bool = Field(default=True, description="false: nothing is sent to MLflow")
    required: bool = Field(
        default=True, description="true: refuse to start while MLflow does not answer; false: send everything later"
    )
    loggers: list[Literal["tensorboard", "wandb"]] = Field(
        default=[], description="loggers besides MLflow; they write files into the store, `wandb` offline"
    )
    git_diff: bool = Field(
        default=False,
        description="true: keep the repository's uncommitted changes in the record and in MLflow; by default only "
        "their files' names and their hash",
    )


class StageSpec(BaseModel):
    """One entry of `stages:`."""

    model_config = _STRICT
    uses: str = Field(description="a built-in stage, or `package.module:function`")
    inputs: dict[str, InputReference] = Field(default={}, description="input name → the stage that makes it")
    parameters: dict[str, Any] = Field(default={}, alias="with", description="the stage's parameters")
    resources: ResourceSpec = Field(default=ResourceSpec(), description="what each worker of the stage gets")
    retries: int = Field(default=2, ge=0, description="further attempts after a lost worker, timeout or crash")
    also_retry_bugs: bool = Field(
        default=False,
        description="spend `retries` on NameError, TypeError, AttributeError, ImportError, AssertionError",
    )
    on_failure: Literal["stop", "skip"] = Field(
        default="stop",
        description="after the retries; stop: what needs it does not run, and the run fails; skip: it counts as "
        "skipped, so that a fan-in goes on without it",
    )
    timeout: Duration | None = Field(default=None, gt=0, description="limit per attempt, such as 600 or 10m")
    when: str | None = Field(default=None, description="condition; the stage is skipped where it is false")
    matrix: dict[str, list[Any]] = Field(
        default={},
        description="axis → values: one branch per combination, without `exclude:`, and with what `include:` adds",
    )
    after: list[str] = Field(default=[], description="stages that must end before this one, beside its inputs")
    environment: list[str] = Field(default=[], description="environment variables that decide the result")
    reads: list[str] = Field(
        default=[], description="data files, directories or globs whose content decides the result"
    )

    @field_validator("uses", mode="before")
    @classmethod
    def _name_of_function(cls, value: Any) -> Any:
        return name_of_function(value) if callable(value) else value

    @field_validator("when", mode="before")
    @classmethod
    def _condition(cls, value: Any) -> Any:
        return str(value).lower() if isinstance(value, bool) else value

    @field_validator("inputs", "parameters", "matrix", "environment", "reads", "after", mode="before")
    @classmethod
    def _empty(cls, value: Any, info: Any) -> Any:
        return ([] if info.field_name in ("environment", "reads", "after") else {}) if value is None else value

    @field_validator("matrix")
    @classmethod
    def _matrix(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for axis, values in value.items():
            if not _NAME.fullmatch(axis):
                raise ValueError(f"the axis name `{axis}` may hold letters, digits, `_` and `-`")
            if axis in MATRIX_CHANGES:
                for entry in values:
                    if not isinstance(entry, dict) or not entry or not all(_NAME.fullmatch(str(key)) for key in entry):
                        raise ValueError(f"`{axis}`: expected a list of `{{axis: value}}`, got {show(entry)} in it")
            elif not values:
                raise ValueError(f"the axis `{axis}` has no values")
        return value


class Workflow(BaseModel):
    """A workflow: parameters, places, and a DAG of stages.

    `source` is the file it came from (None when made in Python) and `directory` where its relative paths start.
    """

    model_config = _STRICT
    name: str = Field(description="shown in MLflow and in `polytrope runs`")
    description: str = Field(default="", description="one line on what it does")
    params: dict[str, Any] = Field(default={}, description="values for `${params.x}`; `--set params.x=…` replaces them")
    store: str = Field(default=".polytrope", description="directory or s3:// address of artifacts and runs")
    tracking: TrackingSpec = Field(default=TrackingSpec(), description="MLflow")
    executor: Executor = Field(
        default=DEFAULT_EXECUTOR,
        description="; ".join(f"{name}: {kind.summary}" for name, kind in EXECUTORS.items()),
    )
    ray_address: str | None = Field(default=None, description="an existing cluster; by default one is started here")
    concurrency: int | None = Field(default=None, ge=1, description="stages that run at the same time, at most")
    fail_fast: bool = Field(default=True, description="stop at the first failed stage; false: go on with the others")
    notify: str | None = Field(
        default=None,
        description="shell command at the end of every run, which gets $POLYTROPE_STATUS, $POLYTROPE_RUN, "
        "$POLYTROPE_WORKFLOW, $POLYTROPE_STORE and all of these in words, $POLYTROPE_MESSAGE",
    )
    stages: dict[str, StageSpec] = Field(description="the DAG", min_length=1)

    _source: Path | None = PrivateAttr(default=None)
    _directory: Path = PrivateAttr(default_factory=Path.cwd)
    _locations: dict[KeyPath, str] = PrivateAttr(default_factory=dict)
    _returned: frozenset[str] = PrivateAttr(default=frozenset())

    @field_validator("name")
    @classmethod
    def _valid_name(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("a workflow needs a name")
        return value

    @field_validator("params", mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("stages")
    @classmethod
    def _stage_names(cls, value: dict[str, StageSpec]) -> dict[str, StageSpec]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"the stage name `{name}` may hold letters, digits, `_` and `-`")
        return value

    @property
    def source(self) -> Path | None:
        return self._source

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def returned(self) -> frozenset[str]:
        """The stages whose further stages (`stage.Stages`) are part of this workflow."""
        return self._returned

    def with_stages(
        self, parent: str, stages: Mapping[str, Any], places: Mapping[tuple[str, ...], tuple[str, ...]] | None = None
    ) -> Workflow:
        """This workflow and the stages that its stage `parent` returned, as `parent/NAME`.

        Args:
            parent: its name.
            stages: name → as in a file.
            places: for messages: a place in each of them → where below `parent` the file has it; None: nowhere.

        Raises:
            UserError: whatever is wrong with them, naming stage and field.
        """
        further = {}
        grown = self.model_copy()
        for inner, outer in (places or {}).items():
            grown._locations = {**grown._locations, **self._moved(("stages", parent, *outer), parent, stages, inner)}
        for name, stage in stages.items():
            path = ("stages", f"{parent}/{name}")
            if not _NAME.fullmatch(name):
                raise UserError(f"{'.'.join(path)}: the stage name may hold letters, digits, `_` and `-`")
            if not isinstance(stage, dict):
                raise UserError(f"{'.'.join(path)}: expected `uses:`, `with:`, `inputs:`, …, got {show(stage)}")
            data = _substitute_stage(Source({}, {}), path[1], stage, self.params)
            try:
                further[path[1]] = StageSpec.model_validate(data)
            except ValidationError as error:
                raise validation_error(
                    error,
                    StageSpec,
                    data,
                    path,
                    lambda place: locate(grown._locations, place) if places is not None else "",
                ) from None
        grown = grown.model_copy(update={"stages": {**self.stages, **further}})
        grown._returned = self._returned | {parent}
        return grown

    def _moved(self, start: KeyPath, parent: str, stages: Iterable[str], inner: KeyPath) -> dict[KeyPath, str]:
        """The locations below `start`, as those of a place in each of the stages that `parent` returns."""
        found = {path[len(start) :]: place for path, place in self._locations.items() if path[: len(start)] == start}
        return {
            ("stages", f"{parent}/{name}", *inner, *rest): place for name in stages for rest, place in found.items()
        }

    def where(self, *path: str | int) -> str:
        """`workflows/x.yaml:12: stages.train.with.steps`, the start of an error message."""
        location = locate(self._locations, path)
        field = ".".join(map(str, path))
        return f"{location}: {field}" if location else field

    def to_dict(self) -> dict[str, Any]:
        """The resolved workflow as JSON-able data without loss; `${env.NAME}` is still a reference in it.

        Raises:
            UserError: a value that was given in Python and cannot be read back.
        """
        return encode_plain_fields(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, directory: Path, source: Path | None = None) -> Workflow:
        """A workflow from `to_dict` (resume) or from data made in Python."""
        located = Source(decode(dict(data)), {(): str(source)} if source else {})
        return _build(located, directory, source)


def load_workflow(path: str | Path, overrides: Iterable[str] = (), *, directory: str | Path | None = None) -> Workflow:
    """Read, merge, override, substitute and validate a workflow file.

    Args:
        path: the YAML file.
        overrides: `params.x=1e-3`, `stages.train.with.steps=10`, `executor=local`; the values are read as YAML.
        directory: where relative paths of the stages start; by default the file's own.

    Raises:
        UserError: whatever is wrong, naming file, line and field.
    """
    path = Path(path)
    directory = path.resolve().parent if directory is None else Path(directory)
    source = read_source(path)
    for override in overrides:
        _override(source, override)
    return _build(source, directory, path.resolve())


def _override(source: Source, text: str) -> None:
    name, equals, value_text = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {text}: expected `name=value`", "for example `--set params.steps=100`")
    parent: Any = source.data
    for depth, part in enumerate(parts[:-1]):
        child = parent.get(part)
        if child is None and (part == "tracking" or (parts[0] == "stages" and depth >= 2)):
            child = parent[part] = {}
        if not isinstance(child, dict):
            prefix = ".".join(parts[: depth + 1])
            raise UserError(
                f"--set {name}: `{prefix}` is not a group of values in {source.where(())}", suggest(part, parent)
            )
        parent = child
    if parts[0] == "params" and (len(parts) < 2 or parts[-1] not in parent):
        params = source.data.get("params") or {}
        raise UserError(
            f"--set {name}: the workflow has no parameter `{'.'.join(parts[1:])}`", suggest(parts[-1], params)
        )
    parent[parts[-1]] = parse_value(value_text)
    path = tuple(parts)
    for known in [item for item in source.locations if item[: len(path)] == path]:
        del source.locations[known]
    source.locations[path] = f"--set {text}"


def _build(source: Source, directory: Path, path: Path | None) -> Workflow:
    data = _substitute(source)
    try:
        workflow = Workflow.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, Workflow, data, (), source.where) from None
    workflow._source = path
    workflow._directory = directory
    workflow._locations = source.locations
    return workflow


def _substitute(source: Source) -> dict[str, Any]:
    """Resolve `${params.x}` everywhere; `${env.NAME}` and `${matrix.x}` stay."""
    params = source.data.get("params")
    if params is not None and not isinstance(params, dict):
        raise UserError(f"{source.where(('params',))}: params: expected name: value lines")
    values = _resolve_params(source, params or {})
    result: dict[str, Any] = {}
    for key, value in source.data.items():
        if key == "params":
            result[key] = values
        elif key == "stages" and isinstance(value, dict):
            result[key] = {
                name: _substitute_stage(source, name, stage, values) if isinstance(stage, dict) else stage
                for name, stage in value.items()
            }
        else:
            result[key] = _located(source, (key,), value, values, keep=("env",))
    return result


def _substitute_stage(source: Source, name: str, stage: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _located(source, ("stages", name, key), value, params, keep=("env", "matrix"), quote=key == "when")
        for key, value in stage.items()
    }


def _located(
    source: Source, path: KeyPath, value: Any, params: Mapping[str, Any], *, keep: Iterable[str], quote: bool = False
) -> Any:
    """Substitute leaf by leaf, so that an error names the line of its own field."""
    if isinstance(value, dict):
        for key in value:
            if has_reference(key.replace("$${", "")):
                raise UserError(
                    f"{source.where((*path, key))}: {'.'.join(map(str, path))}: a reference stands in the name `{key}`",
                    "only values are replaced: write the name itself, or `$${` for a plain `${`",
                )
        return {
            key: _located(source, (*path, key), item, params, keep=keep, quote=quote) for key, item in value.items()
        }
    if not has_reference(value):
        return value
    if isinstance(value, list):
        return [_located(source, (*path, i), item, params, keep=keep, quote=quote) for i, item in enumerate(value)]
    try:
        return substitute(value, {"params": params}, keep=keep, quote=quote)
    except UserError as error:
        raise UserError(f"{source.where(path)}: {'.'.join(map(str, path))}: {error.message}", error.hint) from None


def _resolve_params(source: Source, params: dict[str, Any]) -> dict[str, Any]:
    """Parameters may refer to each other, without a cycle."""
    resolved: dict[str, Any] = {}
    active: list[str] = []

    class Lookup(Mapping[str, Any]):
        def __getitem__(self, name: str) -> Any:
            return resolve(name)

        def __iter__(self) -> typing.Iterator[str]:
            return iter(params)

        def __len__(self) -> int:
            return len(params)

    def resolve(name: str) -> Any:
        if name in resolved:
            return resolved[name]
        if name not in params:
            raise KeyError(name)
        if name in active:
            chain = " → ".join([*active[active.index(name) :], name])
            raise UserError(f"these parameters refer to each other in a circle: {chain}")
        active.append(name)
        value = _located(source, ("params", name), params[name], Lookup(), keep=("env",))
        active.pop()
        resolved[name] = value
        return value

    for name in params:
        resolve(name)
    return {name: resolved[name] for name in params}
