"""A module of anybody's own with learned activations or factored layers: its weights, and what makes a fresh one so."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from polytrope.models.factors import describe_factors, restore_factors
from polytrope.models.formats.states import load_safetensors
from polytrope.models.surgery import describe_activations, restore_activations
from polytrope.models.weights import load_exactly
from polytrope.models.writing import appearing, compare_weights

MODULE_FILE = "module.json"
_FORMAT = 1


@dataclass(frozen=True)
class Factory:
    """What builds a module: `package.module:function`, called with the options as keywords.

    Nothing here imports it: whoever trusts the code calls it, and hands the fresh module to `load_module`.
    """

    function: str
    options: dict[str, Any]


def save_module(directory: Path, model: nn.Module, factory: Factory | None = None) -> None:
    """Write `module.json` and `model.safetensors`; weights that several names share are written once, and compared.

    Args:
        factory: what built the module, before its activations were replaced and its layers factored.

    Raises:
        ValueError: a state that is no tensor, or weights that do not come back as they were.
    """
    odd = [name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise ValueError(f"{directory} is not written: {odd[0]} of {type(model).__name__} is no tensor")
    content: dict[str, Any] = {
        "format": _FORMAT,
        "class": type(model).__qualname__,
        "activations": describe_activations(model),
    }
    if factors := describe_factors(model):
        content["factors"] = factors
    if factory is not None:
        content["factory"] = asdict(factory)
    with appearing(directory, MODULE_FILE) as aside:
        save_model(model, str(aside / "model.safetensors"))
        written, state = load_safetensors(aside / "model.safetensors"), model.state_dict()
        compare_weights(written, {name: state[name] for name in written}, f"{directory} is not written")
        (aside / MODULE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_module(directory: Path) -> dict[str, Any]:
    """The content of `module.json`.

    Raises:
        ValueError: not there, damaged, or of another version.
    """
    path = directory / MODULE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path}: another format; this version reads {_FORMAT}")
    return content


def read_factory(directory: Path) -> Factory | None:
    """What builds the module whose weights lie in `directory`; None: no module lies there, or nothing says what.

    Raises:
        ValueError: `module.json` cannot be read.
    """
    if not (directory / MODULE_FILE).exists():
        return None
    entry = read_module(directory).get("factory")
    try:
        return None if entry is None else Factory(str(entry["function"]), dict(entry["options"]))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{directory / MODULE_FILE}: factory: {error!r}") from error


def load_module(directory: Path, model: nn.Module) -> nn.Module:
    """Put the activations and weights of a directory into `model`, a fresh one of the class that was converted.

    Returns:
        `model`, in evaluation mode.

    Raises:
        ValueError: another class, or weights that do not fit it.
    """
    content = read_module(directory)
    if type(model).__qualname__ != content["class"]:
        raise ValueError(f"{directory} holds a {content['class']}, the model is a {type(model).__qualname__}")
    restore_activations(model, content["activations"])
    restore_factors(model, content.get("factors", {}))
    load_exactly(model, load_safetensors(directory / "model.safetensors"), str(directory))
    return model.eval()
