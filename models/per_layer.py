"""How a setting of a model is read that may differ from block to block."""

from __future__ import annotations

from typing import Any

Entry = str | dict[str, Any]  # a name, or a name with options


def layer_configs(field: str, given: Entry | list[Entry], layers: int) -> list[Entry]:
    """One entry per layer.

    Args:
        field: name of the setting, for messages.
        given: one for all; a list with one per layer; or a list of `{layers: 0-5, name: gelu}` that covers every layer
            once (layers count from 0; `6-` goes to the last one).
        layers: how many there are.

    Raises:
        ValueError: a list of another length, or ranges that leave a layer out or name one twice.
    """
    if isinstance(given, list) and any(isinstance(entry, dict) and "layers" in entry for entry in given):
        return _by_range(field, given, layers)
    if isinstance(given, list):
        if len(given) != layers:
            shown = f"a list of length {len(given)} for {layers} layers, {str(given)[:60]}"
            raise ValueError(f"{field}: {shown}; give one per layer or one")
        return given
    return [given] * layers


def _by_range(field: str, entries: list[Entry], layers: int) -> list[Entry]:
    found: list[Entry | None] = [None] * layers
    for entry in entries:
        if not isinstance(entry, dict) or "layers" not in entry:
            raise ValueError(f"{field}: {entry!r} does not say for which `layers` it is, as others do")
        config = {key: value for key, value in entry.items() if key != "layers"}
        for layer in _range(field, entry["layers"], layers):
            if found[layer] is not None:
                raise ValueError(f"{field}: layer {layer} is in two ranges of `layers`")
            found[layer] = str(config["name"]) if set(config) == {"name"} else config
    missing = [str(layer) for layer, config in enumerate(found) if config is None]
    if missing:
        raise ValueError(f"{field}: no range of `layers` has layer {', '.join(missing)} (of 0-{layers - 1})")
    return [config for config in found if config is not None]


def _range(field: str, text: Any, layers: int) -> range:
    first, dash, last = str(text).partition("-")
    try:
        start, end = int(first), int(last) if last else layers - 1 if dash else int(first)
    except ValueError:
        raise ValueError(f"{field}: `layers: {text}` is no range; write 3, 0-5 or 6-") from None
    if not 0 <= start <= end < layers:
        raise ValueError(f"{field}: `layers: {text}` is outside 0-{layers - 1}")
    return range(start, end + 1)
