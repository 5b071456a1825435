"""A module of anybody's own with learned activations: its weights, and what puts the activations into a fresh one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from polytrope.models.formats.states import load_safetensors
from polytrope.models.surgery import describe_activations, restore_activations
from polytrope.models.weights import check_dtypes
from polytrope.models.writing import appearing, compare_weights

MODULE_FILE = "module.json"
_FORMAT = 1


def save_module(directory: Path, model: nn.Module) -> None:
    """Write `module.json` and `model.safetensors`; weights that several names share are written once, and compared.

    Raises:
        ValueError: a state that is no tensor, or weights that do not come back as they were.
    """
    odd = [name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise ValueError(f"{directory} is not written: {odd[0]} of {type(model).__name__} is no tensor")
    content = {"format": _FORMAT, "class": type(model).__qualname__, "activations": describe_activations(model)}
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
    tensors = load_safetensors(directory / "model.safetensors")
    own = model.state_dict(keep_vars=True)
    check_dtypes({name: (tensor.dtype, own[name].dtype) for name, tensor in tensors.items() if name in own})
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{directory}: the weights do not fit the model: {error}") from error
    loaded = {own[name].data_ptr() for name in tensors if name in own}
    absent = [name for name in missing if own[name].data_ptr() not in loaded and own[name].numel()]
    for problem, names in (("missing", absent), ("unexpected", list(unexpected))):
        if names:
            raise ValueError(f"{directory}: the weights do not fit the model: {problem} {', '.join(sorted(names)[:8])}")
    return model.eval()
