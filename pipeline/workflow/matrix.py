"""`matrix:` of a stage: from its axes, and what `exclude` and `include` change, to one branch per combination.

`exclude` and `include` mean what they mean in GitHub Actions: combinations that match an entry of `exclude` go first;
then each entry of `include` is added to all combinations whose axes it does not contradict, or, if there are none,
becomes a combination of its own.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.text import suggest
from polytrope.pipeline.workflow.spec import MATRIX_CHANGES, StageSpec, Workflow

Branch = tuple[dict[str, str], dict[str, Any]]  # axis → label, axis → value
Meanings = dict[str, dict[str, Any]]  # axis → label → the value as it was given, with its own `label:`
_LABEL = "make the values different, or give each mapping its own `label:`"


@dataclass
class _Combination:
    """Axis → (label, value as given). `axes`: those of the matrix itself, which no entry of `include` replaces."""

    axes: dict[str, tuple[str, Any]]
    added: dict[str, tuple[str, Any]] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, tuple[str, Any]]:
        return {**self.axes, **self.added}


def branches(workflow: Workflow, name: str, spec: StageSpec) -> tuple[list[Branch], Meanings]:
    """All branches of a stage, in the order of the file; those that `include` made stand last. And what labels mean.

    Raises:
        UserError: two branches of one name, two values of one label, or an entry of `exclude` that excludes nothing.
    """
    if not spec.matrix:
        return [({}, {})], {}
    axes = {
        axis: _labelled(workflow.where("stages", name, "matrix", axis), values)
        for axis, values in spec.matrix.items()
        if axis not in MATRIX_CHANGES
    }
    products = itertools.product(*axes.values()) if axes else ()
    combinations = [_Combination(dict(zip(axes, found, strict=True))) for found in products]
    for index, entry in enumerate(spec.matrix.get("exclude", [])):
        place = workflow.where("stages", name, "matrix", "exclude", index)
        left = [item for item in combinations if not _matches(entry, item.axes)]
        if len(left) == len(combinations):
            raise UserError(f"{place}: no branch matches {entry!r}", _why_nothing(entry, axes))
        combinations = left
    combinations = _included(combinations, spec.matrix.get("include", []), axes)
    if not combinations:
        raise UserError(
            f"{workflow.where('stages', name, 'matrix')}: no branch is left", "exclude less, or remove the stage"
        )
    found = [
        (
            {axis: label for axis, (label, _) in item.all.items()},
            {axis: _unlabelled(value) for axis, (_, value) in item.all.items()},
        )
        for item in combinations
    ]
    names = Counter(node_name(name, labels) for labels, _ in found)
    for twice in (branch for branch, count in names.items() if count > 1):
        raise UserError(
            f"{workflow.where('stages', name, 'matrix')}: two branches are called `{twice}`",
            "remove one entry of `include`, or make its values different",
        )
    return found, _meanings(workflow.where("stages", name, "matrix"), combinations)


def _meanings(place: str, combinations: Sequence[_Combination]) -> Meanings:
    found: Meanings = {}
    for item in combinations:
        for axis, (label, value) in item.all.items():
            known = found.setdefault(axis, {}).setdefault(label, value)
            if known is not value and not same_value(known, value):
                raise UserError(f"{place}: two values of `{axis}` have the label `{label}`", _LABEL)
    return found


def same_value(one: Any, other: Any) -> bool:
    """Whether two values of one label, as they were given, are the same.

    They are by their content, or as what they are called in words: by their own `label:`, by a plain text or number.
    """
    if isinstance(one, dict | list) and isinstance(other, dict | list):
        own = [isinstance(value, dict) and "label" in value for value in (one, other)]
        return all(own) or bool(_unlabelled(one) == _unlabelled(other))
    return isinstance(one, dict | list) or isinstance(other, dict | list) or _text(one) == _text(other)


def _labelled(place: str, values: Sequence[Any]) -> list[tuple[str, Any]]:
    labels = [_label(value, index) for index, value in enumerate(values)]
    for twice in (label for label, count in Counter(labels).items() if count > 1):
        raise UserError(
            f"{place}: two values have the label `{twice}`",
            _LABEL,
        )
    return list(zip(labels, values, strict=True))


def _included(
    combinations: list[_Combination],
    entries: Sequence[Mapping[str, Any]],
    axes: Mapping[str, Sequence[tuple[str, Any]]],
) -> list[_Combination]:
    own: list[_Combination] = []
    for index, entry in enumerate(entries):
        given = {axis: _meant(value, index, axes.get(axis, ())) for axis, value in entry.items()}
        of_axes = {axis: value for axis, value in entry.items() if axis in axes}
        extended = [item for item in combinations if _matches(of_axes, item.axes)]
        for item in extended:
            item.added.update({axis: pair for axis, pair in given.items() if axis not in axes})
        if not extended:
            own.append(_Combination(given))
    return [*combinations, *own]


def _meant(given: Any, index: int, known: Sequence[tuple[str, Any]]) -> tuple[str, Any]:
    """Label and value: of the axis, if it has this one."""
    return next((pair for pair in known if _same(given, *pair)), (_label(given, index), given))


def _matches(entry: Mapping[str, Any], axes: Mapping[str, tuple[str, Any]]) -> bool:
    return all(axis in axes and _same(given, *axes[axis]) for axis, given in entry.items())


def _same(given: Any, label: str, value: Any) -> bool:
    """A mapping is meant by its content or by its label, everything else as it is called in the branch's name."""
    if isinstance(given, dict):
        return bool(_unlabelled(given) == _unlabelled(value))
    return _label(given, 0) == label


def _why_nothing(entry: Mapping[str, Any], axes: Mapping[str, Sequence[tuple[str, Any]]]) -> str:
    for axis, given in entry.items():
        if axis not in axes:
            return suggest(axis, axes) or f"the axes are: {', '.join(axes)}"
        if not any(_same(given, *pair) for pair in axes[axis]):
            return f"the values of `{axis}` are: {', '.join(label for label, _ in axes[axis])}"
    return "earlier entries exclude the same branches: remove it"


def _unlabelled(value: Any) -> Any:
    """The value without the name of its branch."""
    return {key: item for key, item in value.items() if key != "label"} if isinstance(value, dict) else value


def _label(value: Any, index: int) -> str:
    """What the branch is called: the value, or of a mapping its `label`, else its `name`, else its place."""
    if isinstance(value, dict):
        text = str(value.get("label", value.get("name", index)))
    elif isinstance(value, list):
        text = "-".join(_label(item, position) for position, item in enumerate(value))
    else:
        text = _text(value)
    for character in "[],=":
        text = text.replace(character, "_")
    return text


def _text(value: Any) -> str:
    """A plain value, as a workflow file writes it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def node_name(spec_name: str, branch: Mapping[str, str]) -> str:
    """`train`, or `train[activation=gelu,degree=3]`."""
    if not branch:
        return spec_name
    return f"{spec_name}[{','.join(f'{axis}={label}' for axis, label in branch.items())}]"
