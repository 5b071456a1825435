"""`${params.x}`, `${matrix.x}` and `${env.NAME}` in workflow files.

A text that is one whole reference takes the value with its type; inside a longer text the value is written out.
`${env.NAME}` is a secret: it stays a reference in the resolved workflow, the journal, the stage keys and all messages,
and only `resolve_environment` (called in the worker, just before the stage function) replaces it. `$${` writes `${`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.text import suggest

_REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)\}")
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
_WHOLE = re.compile(r"\$\{([^}]*)\}")


def has_reference(value: Any) -> bool:
    """Whether any text in nested data contains `${`."""
    if isinstance(value, str):
        return "${" in value
    if isinstance(value, Mapping):
        return any(has_reference(item) for item in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return any(has_reference(item) for item in value)
    return False


def substitute(value: Any, scopes: Mapping[str, Mapping[str, Any]], *, keep: Iterable[str], quote: bool = False) -> Any:
    """Replace references in nested data.

    Args:
        value: dicts, lists, scalars.
        scopes: `{"params": {…}}`: what each name before the dot stands for.
        keep: scopes that stay as they are (`env`, or `matrix` before the expansion); `$${` stays too then.
        quote: the text is a `when:` expression: values are written as JSON literals, and inside quotes as text.

    Raises:
        UserError: unknown scope or name, with the nearest one; a `${` without its `}`; the caller adds file and field.
    """
    kept = frozenset(keep)

    def replace(name: str, whole: str) -> Any:
        scope, dot, key = name.strip().partition(".")
        if scope in kept and dot:
            return whole
        if scope not in scopes or not dot:
            known = [*scopes, *sorted(kept)]
            raise UserError(
                f"unknown reference `{whole}`",
                "references are "
                + ", ".join(f"`${{{item}.NAME}}`" for item in known)
                + "; write `$${` for a plain `${`",
            )
        current: Any = scopes[scope]
        for part in key.split("."):
            if not isinstance(current, Mapping) or part not in current:
                known = list(current) if isinstance(current, Mapping) else []
                raise UserError(f"`{whole}`: no {_singular(scope)} `{key}`", suggest(part, known))
            current = current[part]
        return current

    def visit(item: Any) -> Any:
        if isinstance(item, str):
            if "${" not in item:
                return item
            return _replace_text(item, replace, quote=quote)
        if isinstance(item, dict):
            return {key: visit(entry) for key, entry in item.items()}
        if isinstance(item, list):
            return [visit(entry) for entry in item]
        return item

    return visit(value)


def _singular(scope: str) -> str:
    return {"params": "parameter", "matrix": "matrix axis", "env": "environment variable"}.get(scope, scope)


def _replace_text(text: str, replace: Callable[[str, str], Any], *, quote: bool) -> Any:
    if "${" in _REFERENCE.sub("", text):
        raise UserError(f"`{text}` has a `${{` without its `}}`", "close it, or write `$${` for a plain `${`")
    whole = _WHOLE.fullmatch(text)
    if whole:
        return replace(whole.group(1), text)

    def write(match: re.Match[str], literal: bool) -> str:
        if match.group(1) is None:
            return match.group(0)
        found = match.group(0)
        value = replace(match.group(1), found)
        if value == found:
            return found
        return json.dumps(value) if literal or not isinstance(value, str) else value

    def write_quoted(match: re.Match[str]) -> str:
        inside = match.group(0)[1:-1]
        written = _REFERENCE.sub(lambda found: write(found, False), inside)
        return match.group(0) if written == inside else json.dumps(written, ensure_ascii=False)

    if not quote:
        return _REFERENCE.sub(lambda found: write(found, False), text)
    return _REFERENCE.sub(lambda found: write(found, True), _QUOTED.sub(write_quoted, text))


def environment_names(value: Any) -> set[str]:
    """The NAMEs of all `${env.NAME}` in nested data."""
    if isinstance(value, str):
        found = (match.group(1) for match in _REFERENCE.finditer(value) if match.group(1))
        return {name.strip()[4:] for name in found if name.strip().startswith("env.")}
    if isinstance(value, Mapping):
        return set().union(*map(environment_names, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return set().union(*map(environment_names, value))
    return set()


def resolve_environment(value: Any, environment: Mapping[str, str]) -> Any:
    """Replace `${env.NAME}` by the value and `$${` by `${` in nested data: the last step before a value is used.

    Raises:
        UserError: a variable that is not set (named; no value is ever part of a message).
    """

    def visit(item: Any) -> Any:
        if isinstance(item, str) and "${" in item:

            def write(match: re.Match[str]) -> str:
                name = match.group(1)
                if name is None:
                    return "${"
                if not name.strip().startswith("env."):
                    return match.group(0)
                variable = name.strip()[4:]
                if variable not in environment:
                    raise UserError(
                        f"the environment variable `{variable}` is not set", f"`export {variable}=…` and run again"
                    )
                return environment[variable]

            return _REFERENCE.sub(write, item)
        if isinstance(item, dict):
            return {key: visit(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return [visit(entry) for entry in item]
        return item

    return visit(value)
