"""Reads the settings of other formats: every field is taken over or has the only value that is supported here.

Defaults and second names are the owner's (transformers' configuration classes; tests compare them).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

# transformers' names of the activations that this package has. Its further spellings of GELU are the same function.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
# Of a converted model, whose `model_type` and class transformers must not know: it would leave the activations out.
CONVERSION = "polytrope"  # the field of `config.json` that describes them
MODEL_TYPE_PREFIX = "polytrope_"
CLASS_PREFIX = "Polytrope"
# Behind the names of activations there, so that no class of transformers that was asked for by name builds them.
REPLACED = " (replaced by polytrope: load with trust_remote_code=True)"
_ACTIVATION_FIELD = re.compile(r"(^|_)act(ivation)?(_|$)|^feed_forward_proj$")
# What no model of this package has, whatever its architecture: field of `config.json` and the values without effect.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "pruned_heads": (None, {}),
    "is_encoder_decoder": (None, False),
}


def original_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `config.json` as it was before a conversion; what `save_huggingface` adds to it is undone."""
    if CONVERSION not in content:
        return dict(content)
    kept = {name: value for name, value in content.items() if name not in (CONVERSION, "auto_map")}
    classes = [str(name).removeprefix(CLASS_PREFIX) for name in content.get("architectures") or []]
    return with_activation_names(kept, replaced=False) | {
        "model_type": str(content.get("model_type")).removeprefix(MODEL_TYPE_PREFIX),
        "architectures": classes,
    }


def with_activation_names(content: Mapping[str, Any], *, replaced: bool) -> dict[str, Any]:
    """The settings with `REPLACED` behind the name of each activation, those of a model's parts too, or without it."""

    def changed(name: Any, value: Any) -> Any:
        if isinstance(value, Mapping):
            return with_activation_names(value, replaced=replaced)
        if isinstance(value, str) and _ACTIVATION_FIELD.search(str(name)):
            return value.removesuffix(REPLACED) + (REPLACED if replaced else "")
        return value

    return {name: value if name == CONVERSION else changed(name, value) for name, value in content.items()}


def read_settings(
    content: Mapping[str, Any],
    defaults: Mapping[str, Any],
    aliases: Mapping[str, str],
    supported: Mapping[str, tuple[Any, ...]],
    source: str = "config.json",
) -> dict[str, Any]:
    """The fields of `defaults` with their values in `content`.

    Args:
        content: what the file says.
        defaults: what a field is that the file leaves out; its type is checked (a number, a truth value, a text).
        aliases: second name → name.
        supported: further fields, each with the only values that it may have; the first is its default.
        source: the file, for messages.

    Raises:
        ValueError: a value that is not supported, has another type, or differs from that of its second name.
    """
    found = dict(content)
    for second, name in aliases.items():
        if second in found and found.setdefault(name, found[second]) != found[second]:
            raise ValueError(f"{source}: {second} = {found[second]!r}, but {name} = {found[name]!r}")
    for name, values in {**_WITHOUT, **supported}.items():
        if found.get(name, values[0]) not in values:
            raise ValueError(
                f"{source}: {name} = {_shown(found[name])} is not supported, only "
                f"{' or '.join(_shown(value) for value in values)}"
            )
    code = [key for key in found.get("auto_map") or {} if key.startswith("AutoModel")]
    if code:
        raise ValueError(
            f"{source}: auto_map.{code[0]} = {_shown(found['auto_map'][code[0]])}: the model is code of its own, which "
            "is not run"
        )
    return {name: _checked(name, found.get(name, default), default, source) for name, default in defaults.items()}


def _checked(name: str, value: Any, default: Any, source: str) -> Any:
    kind = type(default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is not type(None) and (type(value) is not kind or (kind is float and not math.isfinite(value))):
        wanted = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text", list: "a list"}
        raise ValueError(f"{source}: {name} = {_shown(value)}: expected {wanted[kind]}")
    return value


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def read_activation_name(name: str, field: str) -> str:
    """This package's name of an activation in `config.json`.

    Raises:
        ValueError: it is not among this package's.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json: {field} = {_shown(name)} is not supported, only {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
