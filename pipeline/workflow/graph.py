"""From the workflow file to the nodes that run: dependencies, validated parameters, order."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from dataclasses import fields as dataclass_fields
from heapq import heapify, heappop, heappush
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel, SecretStr, ValidationError

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import UNPROMISED, Resources, StageDefinition, load_stage
from polytrope.pipeline.support.text import suggest
from polytrope.pipeline.workflow.code import Code, read_code, read_named_code
from polytrope.pipeline.workflow.conditions import condition_stages, evaluate_condition
from polytrope.pipeline.workflow.encoding import encode_fields
from polytrope.pipeline.workflow.loaded import stale_module
from polytrope.pipeline.workflow.matrix import Branch, Meanings, branches, node_name, same_value
from polytrope.pipeline.workflow.reads import read_digests
from polytrope.pipeline.workflow.references import environment_names, has_reference, resolve_environment, substitute
from polytrope.pipeline.workflow.refusals import named_field, refuse_booleans, show, validation_error, value_at
from polytrope.pipeline.workflow.source import KeyPath
from polytrope.pipeline.workflow.spec import StageSpec, Workflow

NodeInput = str | dict[str, str] | None
_DEEPEST = 30  # stages of one kind, each returned by the one before


@dataclass(frozen=True)
class StageNode:
    """One stage, or one branch of a stage with a matrix.

    Args:
        name: `train`, or `train[activation=gelu]`.
        spec_name: name in `stages:`.
        branch: axis → label of this branch.
        definition: the stage function and its signature.
        parameters: validated; may hold `${env.NAME}` references, see `resolve_parameters`.
        inputs: input name → node name, label → node name for a fan-in, None for an optional input that is absent.
        resources: what each worker gets.
        retries: further attempts after the first.
        also_retry_bugs: a plain bug of the function counts as a reason for one.
        skip_on_failure: if it fails after them, it counts as skipped.
        timeout: seconds per attempt, or None.
        when: condition, see `polytrope.pipeline.workflow.conditions`.
        when_reads: stage in the condition → the node whose metrics it means.
        environment: variables that belong to the key, with their values.
        code: of the stage, as it was when the graph was built.
        named_code: of the functions that its parameters name, or its inputs are made by.
        reads: file → sha256 of the data files that the stage or the workflow file names.
        read_patterns: how the workflow file names them.
        fingerprint: what the stage says beyond its parameters decides the result.
        promise: what it says of its result before it runs; None: nothing.
        after: nodes that must end first, without being an input (`after:`, and stages read by `when:`).
        secrets: names of the environment variables that the worker needs for `${env.NAME}`.
        matrix: axis → value of this branch, for `when:`.
        open: it refers to further stages of a stage that has not returned them yet; that one stands in their place.
    """

    name: str
    spec_name: str
    branch: dict[str, str]
    definition: StageDefinition
    parameters: BaseModel
    inputs: dict[str, NodeInput]
    resources: Resources
    retries: int
    timeout: float | None
    when: str | None
    environment: dict[str, str]
    code: Code = field(kw_only=True)
    named_code: Code = field(default=Code({}, {}), kw_only=True)
    reads: dict[str, str] = field(default_factory=dict, kw_only=True)
    read_patterns: tuple[str, ...] = field(default=(), kw_only=True)
    fingerprint: dict[str, str] = field(default_factory=dict)
    promise: Any = field(default=None, kw_only=True)
    after: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    matrix: dict[str, Any] = field(default_factory=dict)
    open: bool = False
    also_retry_bugs: bool = False
    skip_on_failure: bool = False
    when_reads: dict[str, str] = field(default_factory=dict, kw_only=True)

    @functools.cached_property
    def encoded_parameters(self) -> dict[str, Any]:
        """As they stand in the key.

        Raises:
            UserError: a value without a lossless form.
        """
        return encode_fields(self.parameters)

    @property
    def whole_code(self) -> Code:
        """All that belongs to the key."""
        return self.code | self.named_code

    @property
    def input_nodes(self) -> tuple[str, ...]:
        """Names of the nodes whose artifacts this one reads, each once."""
        return tuple(dict.fromkeys(_node_names(self.inputs)))

    @property
    def dependencies(self) -> tuple[str, ...]:
        """Names of all nodes that must end before this one starts."""
        return tuple(dict.fromkeys((*_node_names(self.inputs), *self.after)))


def _node_names(inputs: Mapping[str, NodeInput]) -> list[str]:
    names: list[str] = []
    for value in inputs.values():
        if isinstance(value, str):
            names.append(value)
        elif value:
            names.extend(value.values())
    return names


def resolve_parameters(parameters: BaseModel, environment: Mapping[str, str] | None = None) -> BaseModel:
    """The parameters with every `${env.NAME}` replaced: call it in the worker, just before the stage function.

    Raises:
        UserError: a variable that is not set.
    """
    values = os.environ if environment is None else environment
    try:
        resolved = _resolved(parameters, values)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise UserError(f"the value of an environment variable is not accepted for: {fields}") from None
    assert isinstance(resolved, BaseModel)
    return resolved


def _resolved(value: Any, environment: Mapping[str, str]) -> Any:
    """The value itself where it holds no reference; a model with one is validated anew."""
    if isinstance(value, str):
        return resolve_environment(value, environment) if type(value) is str and "${" in value else value
    if isinstance(value, SecretStr):
        secret = value.get_secret_value()
        return type(value)(resolve_environment(secret, environment)) if "${" in secret else value
    if isinstance(value, BaseModel):
        model = type(value)
        fields = {name: getattr(value, name) for name in model.model_fields} | (value.__pydantic_extra__ or {})
        found = {name: _resolved(item, environment) for name, item in fields.items()}
        if all(found[name] is item for name, item in fields.items()):
            return value
        aliases = {name: info.alias or name for name, info in model.model_fields.items()}
        again = model.model_validate({aliases.get(name, name): item for name, item in found.items()})
        again.model_fields_set.intersection_update(value.model_fields_set)
        return again
    if isinstance(value, PurePath):
        return type(value)(resolve_environment(str(value), environment)) if "${" in str(value) else value
    if is_dataclass(value) and not isinstance(value, type):
        before = {item.name: getattr(value, item.name) for item in dataclass_fields(value) if item.init}
        changed = {name: new for name, item in before.items() if (new := _resolved(item, environment)) is not item}
        return replace(value, **changed) if changed else value
    if type(value) is dict:
        pairs = {name: _resolved(item, environment) for name, item in value.items()}
        return value if all(pairs[name] is item for name, item in value.items()) else pairs
    if type(value) in (list, tuple, set, frozenset):
        items = [_resolved(item, environment) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    return value


def build_graph(
    workflow: Workflow, *, environment: bool = True, known: Mapping[str, StageNode] | None = None
) -> dict[str, StageNode]:
    """All nodes in a stable topological order (that of the file where it is free).

    Args:
        workflow: from `load_workflow`.
        environment: False where the variables named by the file need not be set: it will run elsewhere.
        known: nodes of this workflow before a stage returned further ones; they stay as they are.

    Raises:
        UserError: unknown stage, input or parameter, cycle (with its path), missing environment variable, or
            what a stage's own `check` and `fingerprint` refuse; each with file, line and field.
    """
    if str(workflow.directory) not in sys.path:  # stages of one's own may stand beside the workflow file
        sys.path.append(str(workflow.directory))
    found = {name: branches(workflow, name, spec) for name, spec in workflow.stages.items()}
    names = _Names(
        {name: made for name, (made, _) in found.items()},
        {name: meanings for name, (_, meanings) in found.items()},
        workflow.returned,
    )
    drafts: dict[str, StageNode] = {}
    stages = _Stages(workflow, known or {})
    for spec_name, spec in workflow.stages.items():
        loaded = stages.load(spec_name, spec)
        for branch, matrix in names.branches[spec_name]:
            node = _draft(workflow, spec_name, spec, loaded, branch, matrix, names.seen_by(spec_name), environment)
            drafts[node.name] = node
    ordered = _order(workflow, drafts)
    finished: dict[str, StageNode] = {}
    for name in ordered:
        before = (known or {}).get(name)
        finished[name] = before if before and not before.open else _checked(workflow, drafts[name], finished)
    new = [node for name, node in finished.items() if node is not (known or {}).get(name)]
    for node in new:  # last: it may read all of a corpus
        finished[node.name] = _fingerprinted(workflow, node)
    _check_returned(workflow, new, finished)
    return finished


@dataclass(frozen=True)
class _Names:
    """What the references of a stage may mean.

    Args:
        branches: of every stage.
        meanings: what their labels mean.
        returned: stages whose further stages are among them.
        scope: the stage that returned the one that refers, or "": its siblings are found first.
        reader: the one that refers.
    """

    branches: Mapping[str, list[Branch]]
    meanings: Mapping[str, Meanings]
    returned: frozenset[str]
    scope: str = ""
    reader: str = ""

    def seen_by(self, spec_name: str) -> _Names:
        return replace(self, scope=parent_stage(spec_name), reader=spec_name)

    def find(self, reference: str) -> str | None:
        """The full name of a stage, or of what it returned or may return (`STAGE/NAME`, `STAGE/*`); None: unknown."""
        first, slash, rest = reference.partition("[")[0].partition("/")
        for name in scoped_names(self.scope, first):
            if name in self.branches:
                return name + slash + rest
        return None

    def returning(self, name: str) -> str:
        """The stage that would have to return this one."""
        while name not in self.branches:
            name = parent_stage(name)
        return name

    def is_open(self, reference: str) -> bool:
        name = self.find(reference)
        return name is not None and name not in self.branches and self.returning(name) not in self.returned

    def members(self, parent: str) -> list[str]:
        """The stages that `parent` returned."""
        return [name for name in self.branches if name.startswith(f"{parent}/") and parent_stage(name) == parent]


def parent_stage(spec_name: str) -> str:
    """Of `split/part`, `split`; "" for a stage of the file."""
    return spec_name.rpartition("/")[0]


def scoped_names(scope: str, name: str) -> list[str]:
    """What a name may mean in a stage that `scope` returned, the nearest first: `split/part`, `part`."""
    names = [name]
    while scope:
        names.insert(-1, f"{scope}/{name}")
        scope = parent_stage(scope)
    return names


@dataclass(frozen=True)
class _Loaded:
    """A stage function, its code, and the data files that it declares."""

    definition: StageDefinition
    code: Code
    reads: dict[str, str]


class _Stages:
    """The stage functions of a workflow, each loaded and its code read once: 10,000 stages of one kind are one."""

    def __init__(self, workflow: Workflow, known: Mapping[str, StageNode]) -> None:
        self._workflow = workflow
        self._loaded: dict[str, _Loaded] = {}
        self._known = {node.definition.uses: node for node in known.values()}  # one run, one state of the code

    def load(self, name: str, spec: StageSpec) -> _Loaded:
        if spec.uses not in self._loaded:
            self._loaded[spec.uses] = self._load(name, spec.uses)
        return self._loaded[spec.uses]

    def _load(self, name: str, uses: str) -> _Loaded:
        place = self._workflow.where("stages", name, "uses")
        if "${" in uses:
            raise UserError(f"{place}: only `${{params.x}}` can stand in `uses:`")
        try:
            definition = load_stage(uses)
            before = self._known.get(definition.uses)
            if before is not None:
                return _Loaded(before.definition, before.code, _declared(definition))
            for module in definition.modules:
                if (path := stale_module(module)) is not None:
                    raise UserError(
                        f"{path} was edited after this process had imported it",
                        f"`importlib.reload(sys.modules[{module!r}])`, or start a new session",
                    )
            return _Loaded(definition, read_code(definition.modules), _declared(definition))
        except UserError as error:
            raise UserError(f"{place}: {error.message}", error.hint) from None
        except Exception as error:  # the user's module is run by its import, and may raise anything
            raise UserError(
                f"{place}: importing `{uses}` failed: {_raised(error)}", "mend the module, then run again"
            ) from error


def _declared(definition: StageDefinition) -> dict[str, str]:
    """Data files of `@stage(reads=…)`; their paths start where the stage's module stands."""
    module = definition.function.__module__
    directory = Path(str(sys.modules[module].__file__)).parent
    return read_digests(definition.options.reads, directory, f"{module}:") if definition.options.reads else {}


def declared_reads(definition: StageDefinition, patterns: Iterable[str], directory: Path) -> dict[str, str]:
    """Data files of a stage with their sha256: those of `@stage(reads=…)`, and of `reads:` in the workflow file.

    Args:
        patterns: of the workflow file.
        directory: the workflow file's.
    """
    return {**_declared(definition), **read_digests(patterns, directory)}


def _draft(
    workflow: Workflow,
    spec_name: str,
    spec: StageSpec,
    loaded: _Loaded,
    branch: dict[str, str],
    matrix: dict[str, Any],
    names: _Names,
    environment: bool,
) -> StageNode:
    definition = loaded.definition
    values = _expanded(workflow, spec_name, spec, matrix)
    inputs, after, when_reads = _inputs(workflow, spec_name, spec, values, definition, branch, names)
    secrets = environment_names(values["with"])
    if parent := parent_stage(spec_name):
        after = tuple(dict.fromkeys((parent, *after)))
    node = StageNode(
        name=node_name(spec_name, branch),
        spec_name=spec_name,
        branch=branch,
        definition=definition,
        parameters=_parameters(workflow, spec_name, definition, values["with"]),
        inputs=inputs,
        resources=values["resources"],
        retries=spec.retries,
        also_retry_bugs=spec.also_retry_bugs,
        skip_on_failure=spec.on_failure == "skip",
        timeout=spec.timeout,
        when=values["when"],
        environment=_environment(workflow, spec_name, spec.environment, secrets) if environment else {},
        code=loaded.code,
        reads={**loaded.reads, **_reads(workflow, spec_name, values["reads"])},
        read_patterns=tuple(map(str, values["reads"])),
        after=after,
        secrets=tuple(sorted(secrets)),
        matrix=matrix,
        open=any(map(names.is_open, _references(spec, values))),
        when_reads=when_reads,
    )
    try:
        _ = node.encoded_parameters
    except UserError as error:
        field, _, rest = error.message.partition(": ")
        raise UserError(
            f"{workflow.where('stages', spec_name, 'with', *field.split('.'))}: {rest}", error.hint
        ) from None
    return node


def _reads(workflow: Workflow, name: str, patterns: list[str]) -> dict[str, str]:
    try:
        return read_digests(map(str, patterns), workflow.directory) if patterns else {}
    except UserError as error:
        raise UserError(f"{workflow.where('stages', name)}: {error.message}", error.hint) from None


def _references(spec: StageSpec, values: Mapping[str, Any]) -> Iterator[str]:
    """Everything in a stage that names another one."""
    for value in values["inputs"].values():
        yield from [value] if isinstance(value, str) else value.values() if isinstance(value, dict) else value or ()
    yield from spec.after
    yield from condition_stages(values["when"]) if values["when"] else ()


def readers_of_returned(workflow: Workflow, nodes: Iterable[StageNode], name: str) -> list[str]:
    """Of open nodes, the names of those that refer to stages which `name` has yet to return."""
    beginnings = f"{name}/", f"{name.rpartition('/')[2]}/"
    found = []
    for node in nodes:
        if name in node.dependencies:
            spec = workflow.stages[node.spec_name]
            references = _references(spec, {"inputs": spec.inputs, "when": spec.when})
            if any(reference.startswith(beginnings) for reference in references):
                found.append(node.name)
    return found


def _expanded(workflow: Workflow, name: str, spec: StageSpec, matrix: dict[str, Any]) -> dict[str, Any]:
    """The fields of the spec that may hold `${matrix.x}`, replaced."""
    result: dict[str, Any] = {}
    for key, value in (
        ("with", spec.parameters),
        ("inputs", spec.inputs),
        ("when", spec.when),
        ("reads", spec.reads),
    ):
        if has_reference(value):
            try:
                value = substitute(value, {"matrix": matrix}, keep=("env",), quote=key == "when")
            except UserError as error:
                raise UserError(f"{workflow.where('stages', name, key)}: {error.message}", error.hint) from None
        result[key] = value
    when = result["when"]
    result["when"] = when if when is None or isinstance(when, str) else str(when).lower()
    result["resources"] = spec.resources.resources()
    return result


def _environment(workflow: Workflow, name: str, names: list[str], secrets: set[str]) -> dict[str, str]:
    for variable in (*names, *sorted(secrets)):
        if variable not in os.environ:
            raise UserError(
                f"{workflow.where('stages', name, 'environment')}: the environment variable `{variable}` is not set",
                f"`export {variable}=…` and run again",
            )
    return {variable: os.environ[variable] for variable in names}


def _parameters(workflow: Workflow, name: str, definition: StageDefinition, values: dict[str, Any]) -> BaseModel:
    model = definition.parameters_model
    known = {text for key, info in model.model_fields.items() for text in (key, info.alias) if text}
    if model.model_config.get("extra") != "allow":
        for key in values:
            if key not in known:
                raise UserError(
                    f"{workflow.where('stages', name, 'with', key)}: "
                    f"stage `{definition.uses}` has no parameter `{key}`",
                    f"{suggest(key, known)} (`polytrope stages {definition.uses}` describes them)",
                )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a validator prints is no part of a command's answer
            found = model.model_validate(values)
        refuse_booleans(values, found)
        return found
    except ValidationError as error:

        def where(path: KeyPath) -> str:
            found = workflow.where(*path)
            dotted = ".".join(map(str, path))
            return found.removesuffix(f": {dotted}") if found != dotted else ""

        result = validation_error(error, model, values, ("stages", name, "with"), where)
        hint = result.hint or f"`polytrope stages {definition.uses}` describes the parameters"
        raise UserError(result.message, hint) from None


def _inputs(
    workflow: Workflow,
    name: str,
    spec: StageSpec,
    values: Mapping[str, Any],
    definition: StageDefinition,
    branch: dict[str, str],
    names: _Names,
) -> tuple[dict[str, NodeInput], tuple[str, ...], dict[str, str]]:
    given, when = values["inputs"], values["when"]
    for key in given:
        if key not in definition.inputs:
            raise UserError(
                f"{workflow.where('stages', name, 'inputs', key)}: stage `{definition.uses}` has no input `{key}`",
                suggest(key, definition.inputs) or "this stage takes no inputs",
            )
    inputs: dict[str, NodeInput] = {}
    for key, kind in definition.inputs.items():
        reference = given.get(key)
        place = workflow.where("stages", name, "inputs", key)
        if reference is None or (kind != "many" and reference == {}):
            if kind == "required":
                raise UserError(
                    f"{workflow.where('stages', name)}: the input `{key}` of stage `{definition.uses}` is missing",
                    f"add `inputs: {{{key}: STAGE}}` with the stage that makes it",
                )
            inputs[key] = {} if kind == "many" else None
        elif kind == "many":
            inputs[key] = _many(place, reference, branch, names)
        elif isinstance(reference, str):
            found = _resolve(place, reference, branch, names)
            if len(found) != 1:
                shown = ", ".join(f"`{item}`" for item, _ in found[:5])
                raise UserError(
                    f"{place}: `{reference}` has {len(found)} branches, but this input takes one",
                    f"name one of {shown}, or give this stage the same `matrix:`",
                )
            inputs[key] = found[0][0]
        else:
            raise UserError(f"{place}: this input takes one stage, got {reference!r}", f"for example `{key}: STAGE`")
    after = [
        item
        for reference in spec.after
        for item, _ in _resolve(workflow.where("stages", name, "after"), reference, branch, names)
    ]
    when_reads = _condition_nodes(workflow, name, when, branch, names)
    return inputs, tuple(dict.fromkeys((*after, *when_reads.values()))), when_reads


def _condition_nodes(
    workflow: Workflow, name: str, when: str | None, branch: dict[str, str], names: _Names
) -> dict[str, str]:
    """The nodes whose metrics `when:` reads, by reference: each must mean exactly one."""
    if when is None:
        return {}
    place = workflow.where("stages", name, "when")
    nodes: dict[str, str] = {}
    try:
        references = condition_stages(when)
    except UserError as error:
        raise UserError(f"{place}: {error.message}", error.hint) from None
    for reference in references:
        found = [item for item, _ in _resolve(place, reference, branch, names)]
        if len(found) != 1:
            raise UserError(
                f"{place}: `{reference}` has {len(found)} branches, but a condition reads one",
                f'for example `stages["{found[0]}"].METRIC`',
            )
        nodes[reference] = found[0]
    return nodes


def _many(place: str, reference: Any, branch: Mapping[str, str], names: _Names) -> dict[str, str]:
    """Label → node name. A bare stage: its name, or the branch's value(s); a list: node names; a mapping: its keys.

    Those of `split/*` are the names that `split` gave them.
    """
    result: dict[str, str] = {}
    if isinstance(reference, str):
        entries: list[tuple[str | None, str]] = [(None, reference)]
    elif isinstance(reference, list):
        entries = [("", item) for item in reference]
    else:
        entries = list(reference.items())
    for label, item in entries:
        found = _resolve(place, item, branch, names)
        for name, found_branch in found:
            if names.is_open(item):
                text = item
            elif item.endswith("/*"):
                own = name.removeprefix(f"{parent_stage(name.partition('[')[0])}/")
                text = f"{label}/{own}" if label else own
            elif label is None:
                text = next(iter(found_branch.values())) if len(found_branch) == 1 else name
            elif label == "":
                text = name
            else:
                text = label if len(found) == 1 else node_name(label, found_branch)
            if text in result:
                raise UserError(f"{place}: the label `{text}` stands for two stages", "use `label: stage` lines")
            result[text] = name
    return result


def _resolve(place: str, reference: str, branch: Mapping[str, str], names: _Names) -> list[tuple[str, dict[str, str]]]:
    """(node name, branch) of every node that `reference` means for a stage in `branch`."""
    written, bracket, labelled = reference.partition("[")
    spec_name = names.find(written)
    if spec_name is None:
        near = suggest(written, names.branches)
        of_file = [name for name in names.branches if not parent_stage(name)]
        hint = near if near.startswith("did you mean") else suggest(written, of_file)
        raise UserError(f"{place}: there is no stage `{reference}`", hint)
    if spec_name not in names.branches:
        return _returned(place, spec_name, branch, names)
    candidates = [(node_name(spec_name, labels), labels) for labels, _ in names.branches[spec_name]]
    if bracket:
        found = [item for item in candidates if item[0] == f"{spec_name}[{labelled}"]
        if not found:
            raise UserError(f"{place}: there is no stage `{reference}`", suggest(reference, [n for n, _ in candidates]))
        return found
    if not branch:
        return candidates
    same = [item for item in candidates if item[1] == branch]
    matching = same or [
        item for item in candidates if all(branch.get(axis, label) == label for axis, label in item[1].items())
    ]
    if not matching:
        axes = dict.fromkeys(axis for _, labels in candidates for axis in labels if axis in branch)
        wanted = ", ".join(f"{axis}={branch[axis]}" for axis in axes)
        raise UserError(f"{place}: `{reference}` has no branch with {wanted}", "give both stages the same values")
    _refuse_homonyms(place, reference, spec_name, branch, {axis for _, labels in matching for axis in labels}, names)
    return matching


def _refuse_homonyms(
    place: str, reference: str, spec_name: str, branch: Mapping[str, str], axes: set[str], names: _Names
) -> None:
    """Refuse to connect two branches that are called the same and have other values."""
    for axis, label in branch.items():
        if axis not in axes:
            continue
        wanted, given = (names.meanings[stage][axis][label] for stage in (names.reader, spec_name))
        if not same_value(wanted, given):
            raise UserError(
                f"{place}: `{reference}` has a branch {axis}={label} too, but of another value: {show(given)}, not "
                f"{show(wanted)}",
                "give both stages the same values, or, where they belong together nevertheless, the same `label:`",
            )


def _returned(place: str, name: str, branch: Mapping[str, str], names: _Names) -> list[tuple[str, dict[str, str]]]:
    """The nodes behind `STAGE/*`, or STAGE itself as long as it has not returned any stages."""
    parent = names.returning(name)
    if names.branches[parent] != [({}, {})]:
        raise UserError(f"{place}: `{parent}` has a matrix, so it cannot return stages", "give it no `matrix:`")
    if parent not in names.returned:
        return [(parent, {})]
    members = names.members(parent)
    if name != f"{parent}/*":
        known = suggest(name, members) or "it returns none"
        raise UserError(f"{place}: there is no stage `{name}`: `{parent}` returns none of this name", known)
    return [found for member in members for found in _resolve(place, member, branch, replace(names, scope=""))]


def _order(workflow: Workflow, nodes: Mapping[str, StageNode]) -> list[str]:
    """Kahn's algorithm; among the ready ones, the first in the file goes first."""
    position = {name: index for index, name in enumerate(nodes)}
    names = list(nodes)
    waiting = {name: len(node.dependencies) for name, node in nodes.items()}
    followers: dict[str, list[str]] = {name: [] for name in nodes}
    for name, node in nodes.items():
        for dependency in node.dependencies:
            followers[dependency].append(name)
    ready = [position[name] for name, count in waiting.items() if count == 0]
    heapify(ready)
    ordered: list[str] = []
    while ready:
        name = names[heappop(ready)]
        ordered.append(name)
        for follower in followers[name]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                heappush(ready, position[follower])
    if len(ordered) < len(nodes):
        cycle = _cycle(nodes, {name for name, count in waiting.items() if count})
        place = workflow.where("stages", nodes[cycle[0]].spec_name, "inputs")
        raise UserError(
            f"{place}: these stages need each other in a circle: {' → '.join(cycle)}", "remove one of these inputs"
        )
    return ordered


def _cycle(nodes: Mapping[str, StageNode], stuck: set[str]) -> list[str]:
    """A cycle among `stuck`, in the direction of the data: a → b means that b reads a."""
    current = next(name for name in nodes if name in stuck)
    path: list[str] = []
    while current not in path:
        path.append(current)
        current = next(name for name in nodes[current].dependencies if name in stuck)
    cycle = path[path.index(current) :]
    cycle.reverse()
    first = min(range(len(cycle)), key=lambda index: list(nodes).index(cycle[index]))
    rotated = cycle[first:] + cycle[:first]
    return [*rotated, rotated[0]]


def _checked(workflow: Workflow, node: StageNode, finished: Mapping[str, StageNode]) -> StageNode:
    """Ask the stage itself: `check` of parameters against its upstream, and what its result `promise`s to be."""
    options = node.definition.options
    with _saying_where(workflow, node):
        if options.cpu_only and node.resources.gpus:
            raise UserError(f"resources.gpus: `{node.definition.uses}` computes on the CPU", "leave it out")
        if node.open:  # it is asked when all its inputs are known
            return node
        if options.check is not None:
            options.check(node.parameters, _upstream(node, finished, lambda source: source.parameters))
        upstream = _upstream(node, finished, _promise)
        if options.imports is not None:
            named = options.imports(node.parameters, upstream)
            node = replace(node, named_code=_named_code(named))
        if options.promise is None:
            return node
        return replace(node, promise=options.promise(node.parameters, upstream, node.resources, workflow.directory))


def _named_code(functions: Mapping[str, str]) -> Code:
    """The code of `package.module:function`s, by the field that names each."""
    found = Code({}, {})
    for field_name, function in functions.items():
        try:
            found |= read_named_code(function)
        except UserError as error:
            raise UserError(f"{field_name}: {error.message}", error.hint) from None
    return found


def _promise(source: StageNode) -> Any:
    return UNPROMISED if source.promise is None else source.promise


def _check_returned(workflow: Workflow, nodes: Iterable[StageNode], finished: Mapping[str, StageNode]) -> None:
    """Refuse what is wrong with the stages that these are going to return, and with those that read them.

    All of them at once, as a stage that reads what others return says itself what it returns: a chain of a hundred such
    stages is two graphs, not a hundred.
    """
    grown = workflow
    for node in nodes:
        options = node.definition.options
        returns = options.returns
        unasked = node.open and options.check is not None  # `returns` may count on what `check` refuses
        if returns is None or unasked or node.name in workflow.returned:
            continue
        if node.branch:
            place = workflow.where("stages", node.spec_name, "matrix")
            raise UserError(f"{place}: a stage with a matrix cannot return stages", "give it no `matrix:`")
        _refuse_endless(workflow, node, finished)
        with _saying_where(workflow, node):
            places, stages = returns(node.parameters)
        grown = grown.with_stages(node.name, stages, places)
    if grown is not workflow:
        build_graph(grown, known=finished)


def _refuse_endless(workflow: Workflow, node: StageNode, finished: Mapping[str, StageNode]) -> None:
    """Refuse a stage that one like it returned, or one of `_DEEPEST` returned one by the other: there would be no end.

    Its stages follow from its parameters, so what has the same parameters returns itself again.
    """
    above = [node.spec_name]
    while parent := parent_stage(above[-1]):
        above.append(parent)
    like = [name for name in above[1:] if finished[name].definition.uses == node.definition.uses]
    if len(like) >= _DEEPEST or any(finished[name].parameters == node.parameters for name in like):
        raise UserError(
            f"{workflow.where('stages', node.spec_name)}: `{node.definition.uses}` returns itself without end",
            f"let it return no stages at some depth, at most {_DEEPEST} below the first",
        )


def _fingerprinted(workflow: Workflow, node: StageNode) -> StageNode:
    """With the `fingerprint` of the files that it reads."""
    fingerprint = node.definition.options.fingerprint
    if fingerprint is None:
        return node
    with _saying_where(workflow, node):
        return replace(node, fingerprint=dict(fingerprint(node.parameters, workflow.directory)))


@contextlib.contextmanager
def _saying_where(workflow: Workflow, node: StageNode) -> Iterator[None]:
    """What a stage refuses gets its place; the stage names the field itself.

    What the stage prints is no part of a command's answer.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except UserError as error:
        own = type(node.parameters).model_fields
        path, rest = named_field(error.message, dict.fromkeys([*own, "inputs", "resources"]))
        if path and path[0] in own:
            path = ("with", *path)
        elif path[:1] == ("inputs",):
            source = value_at(node.inputs, path[1:])
            rest = f"`{source}`: {rest}" if isinstance(source, str) and f"`{source}`" not in rest else rest
        raise UserError(f"{workflow.where('stages', node.spec_name, *path)}: {rest}", error.hint) from None
    except Exception as error:  # `check`, `promise`, … may be the user's, and raise anything
        raise UserError(
            f"{workflow.where('stages', node.spec_name)}: what `{node.definition.uses}` says of itself before it runs "
            f"failed: {_raised(error)}",
            "mend the function, then run again",
        ) from error


def _raised(error: Exception) -> str:
    """What the user's code raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    known = frames and not isinstance(error, SyntaxError)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if known else ""
    return f"{type(error).__name__}: {error}{where}"


def _upstream(node: StageNode, finished: Mapping[str, StageNode], known: Callable[[StageNode], Any]) -> dict[str, Any]:
    """What is known of the stage behind each input; of a fan-in by label."""
    return {
        key: {label: known(finished[name]) for label, name in value.items()}
        if isinstance(value, dict)
        else known(finished[value])
        if value
        else None
        for key, value in node.inputs.items()
    }


def condition_holds(node: StageNode, params: Mapping[str, Any], summaries: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether `when:` lets this node run; true without a condition.

    Args:
        node: the stage; all its `dependencies` have ended.
        params: the workflow's parameters.
        summaries: node name → summary metrics of every stage that succeeded or was cached.

    Raises:
        UserError: the condition reads a metric or a parameter that does not exist.
    """
    if node.when is None:
        return True
    stages = {reference: summaries[name] for reference, name in node.when_reads.items() if name in summaries}
    return evaluate_condition(node.when, params=params, matrix=node.matrix, stages=stages)
