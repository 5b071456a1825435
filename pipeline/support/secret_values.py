"""Values of `${env.NAME}` never reach a journal, a log, an event or MLflow: they are replaced by their names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

_SHORTEST_LINE = 12  # characters: a line of a longer secret (of a key in PEM form) that is hidden where it stands alone


def hider(secrets: Mapping[str, str]) -> Callable[[str], str]:
    """A function that replaces every secret value in a text by `${env.NAME}`, in whatever form it was written."""
    longest_first = sorted(secret_forms(secrets).items(), key=lambda item: -len(item[0]))

    def hide(text: str) -> str:
        for form, name in longest_first:
            if form in text:
                text = text.replace(form, f"${{env.{name}}}")
        return text

    return hide


def secret_forms(secrets: Mapping[str, str]) -> dict[str, str]:
    """Every form in which a secret may be written → the name of its variable."""
    return {form: name for name, value in secrets.items() for form in _forms(value)}


def printed_forms(secrets: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """For `log_filter.Filter`: every form of every secret as it is printed, and what stands for it."""
    return [
        (form.encode(errors="surrogateescape"), f"${{env.{name}}}".encode())
        for form, name in secret_forms(secrets).items()
    ]


def _forms(value: str) -> set[str]:
    """As it is, as in its `repr`, in JSON (of ASCII or not), in a URL; and each long line of one with several."""
    if not value:
        return set()
    forms = {
        value,
        value.strip(),
        repr(value)[1:-1],
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        quote(value, safe="", errors="surrogateescape"),
        quote(value, errors="surrogateescape"),
        quote_plus(value, errors="surrogateescape"),
    }
    lines = [line.strip() for line in value.splitlines()]
    if len(lines) > 1:
        forms.update(line for line in lines if len(line) >= _SHORTEST_LINE)
    return {form for form in forms if form}


def hide_in(value: Any, hide: Callable[[str], str], plain_keys: int = 0) -> Any:
    """Plain data with every text hidden; keys too, but for those of the outermost `plain_keys` mappings."""
    if isinstance(value, Mapping):
        return {
            key if plain_keys > 0 or not isinstance(key, str) else hide(key): hide_in(item, hide, plain_keys - 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [hide_in(item, hide, plain_keys - 1) for item in value]
    return hide(value) if isinstance(value, str) else value
