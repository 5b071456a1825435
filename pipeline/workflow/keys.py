"""Stage keys: what decides a stage's result, hashed; and the explanation of why two keys differ.

In the key: the code of the stage and of the functions that its parameters name (all first-party files that they reach
by import, see `code`), its parameters (see
`encoding`), the digests of its inputs, its fingerprint, and the files and environment variables that it or the workflow
file names. Not in the key: resources, retries, timeouts, the executor, and the versions of Python, torch and other
packages. Versions are written into each run's environment record, shown by `polytrope diff`, and said at a resume: an
upgrade does not throw away days of finished work unasked; `polytrope run --force STAGE` recomputes on purpose.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from polytrope.pipeline.workflow.encoding import canonical_json, encode_digests, readable
from polytrope.pipeline.workflow.graph import StageNode

_VERSION = 2  # raised when the meaning of a key changes


def key_components(node: StageNode, input_digests: Mapping[str, str | dict[str, str] | None]) -> dict[str, Any]:
    """What decides the result of `node`, as JSON-able data.

    Args:
        node: the stage.
        input_digests: input name → digest of the artifact (label → digest for a fan-in, None for an absent one).
    """
    return {
        "version": _VERSION,
        "uses": node.definition.uses,
        "code": node.whole_code.files,
        "parameters": node.encoded_parameters,
        "inputs": {name: _digests(input_digests[name]) for name in node.inputs},
        "fingerprint": dict(node.fingerprint),
        "reads": node.reads,
        # hashed: a variable that decides the result may be a secret as well
        "environment": {name: _sha256(os.fsencode(value))[:16] for name, value in node.environment.items()},
    }


def _digests(value: str | dict[str, str] | None) -> Any:
    return encode_digests(value) if isinstance(value, dict) else value


def stage_key(components: Mapping[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of the components."""
    return _sha256(canonical_json(components).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def explain(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two sets of key components, a line each: `parameters.degree: 3 → 5`."""
    if old.get("version") != new.get("version"):  # nothing else can be compared
        return ["the meaning of stage keys changed with this version of polytrope"]
    lines: list[str] = []
    if old.get("uses") != new.get("uses"):
        lines.append(f"uses: {old.get('uses')} → {new.get('uses')}")
    for kind, name, before, after in _differences(old, new):
        if kind == "code":
            lines.append(f"code of {name} {_change(before, after, 'changed')}")
        elif kind == "reads":
            lines.append(f"file {name} {_change(before, after, 'changed')}")
        elif kind == "inputs":
            lines.append(f"input {name} {_change(before, after, f'changed ({_short(before)} → {_short(after)})')}")
        elif kind == "environment":
            lines.append(f"environment variable {name} {_change(before, after, 'changed')}")
        elif kind == "fingerprint":
            lines.append(f"{name} {_change(before, after, f'changed ({_short(before)} → {_short(after)})')}")
        else:
            lines.append(f"{kind}.{name}: {_short(before)} → {_short(after)}")
    return lines


class _Absent:
    def __repr__(self) -> str:
        return "(none)"


_ABSENT = _Absent()


def _change(before: Any, after: Any, changed: str) -> str:
    return "is new" if before is _ABSENT else "is gone" if after is _ABSENT else changed


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    for kind in ("parameters", "inputs", "fingerprint", "reads", "code", "environment"):
        before, after = _flat(old.get(kind) or {}), _flat(new.get(kind) or {})
        found = False
        for name in dict.fromkeys((*before, *after)):
            left, right = before.get(name, _ABSENT), after.get(name, _ABSENT)
            if left is _ABSENT or right is _ABSENT or canonical_json(left) != canonical_json(right):
                found = True
                yield kind, name, left, right
        if not found:
            yield from _reordered(kind, old.get(kind) or {}, new.get(kind) or {})


def _reordered(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """Values in which all parts are the same, but stand in another order."""
    for name in old.keys() & new.keys():
        if canonical_json(old[name]) != canonical_json(new[name]):
            yield kind, f"{name} (order)", list(_flat({name: old[name]})), list(_flat({name: new[name]}))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, item in value.items():
        pairs = item.get("$mapping") if isinstance(item, Mapping) else None
        if pairs and all(isinstance(key, str) for key, _ in pairs):
            item = dict(pairs)
        if isinstance(item, Mapping) and item and not (len(item) == 1 and next(iter(item)).startswith("$")):
            result.update(_flat(item, f"{prefix}{name}."))
        else:
            result[prefix + str(name)] = item
    return result


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "(none)"
    plain = readable(value)
    text = plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)
    if isinstance(value, Mapping) and len(value) == 1:
        text += f" ({next(iter(value)).removeprefix('$')})"
    if len(text) == 64 and all(character in "0123456789abcdef" for character in text):
        return text[:12]
    return text if len(text) <= 60 else text[:57] + "…"
