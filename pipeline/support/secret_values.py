"""Values of `${env.NAME}` never reach a journal, a log, an event or MLflow: they are replaced by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def hider(secrets: Mapping[str, str]) -> Callable[[str], str]:
    """A function that replaces every secret value in a text by `${env.NAME}`."""
    values = sorted(((value, name) for name, value in secrets.items() if value), key=lambda item: -len(item[0]))

    def hide(text: str) -> str:
        for value, name in values:
            text = text.replace(value, f"${{env.{name}}}")
        return text

    return hide


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
