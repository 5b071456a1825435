"""Find the activations of any model, and put other modules in their place."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from types import MethodType
from typing import Any

import torch
from torch import nn

# By class name, so that the classes of transformers and timm are known without importing either.
ACTIVATION_CLASSES = frozenset(
    {"GELU", "ReLU", "ReLU6", "SiLU", "Tanh", "Mish", "ELU", "Hardswish", "Softplus", "LeakyReLU", "QuickGELU", "Swish"}
    | {"GELUActivation", "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "PytorchGELUTanh"}
    | {"GELUTanh", "SiLUActivation", "MishActivation", "ReLUSquaredActivation", "AccurateGELUActivation"}
    | {"HardSwish", "HardMish", "LaplaceActivation", "ClippedGELUActivation"}
)


@dataclass(frozen=True)
class Activation:
    """One activation of a model: its name (as in `named_modules`) and module."""

    name: str
    module: nn.Module


def find_activations(
    model: nn.Module,
    *,
    types: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: tuple[int, int] | None = None,
) -> list[Activation]:
    """Classical activations, in the order of `named_modules`; a module used at several places appears once.

    Args:
        types: class names that count as activations, their subclasses too; default: `ACTIVATION_CLASSES`.
        include, exclude: shell patterns of module names: `encoder.*`, `*.pooler.*`.
        layers: first and last number of a layer, counting from 0; the number is the first one in the module's name.

    Raises:
        ValueError: nothing is left (an activation called as a function cannot be replaced).
    """
    classes = frozenset(types) or ACTIVATION_CLASSES
    known = [
        Activation(name, module)
        for name, module in model.named_modules()
        if any(parent.__name__ in classes for parent in type(module).__mro__)
    ]
    if not known:
        raise ValueError(
            f"{type(model).__name__} has no activation module to replace; looked for the classes "
            f"{', '.join(sorted(classes))}. An activation called as a function is not found"
        )
    chosen = [
        activation
        for activation in known
        if (not include or any(fnmatch(activation.name, pattern) for pattern in include))
        and not any(fnmatch(activation.name, pattern) for pattern in exclude)
        and (layers is None or layers[0] <= layer_number(activation.name) <= layers[1])
    ]
    if not chosen:
        names = ", ".join(activation.name for activation in known[:8])
        raise ValueError(f"the selection leaves none of {len(known)} activations: {names}" + ", …" * (len(known) > 8))
    return chosen


def layer_number(name: str) -> int:
    """The first number in a module's name (`encoder.layer.3.act` → 3), -1 if there is none."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match.group(1)) if match else -1


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at `name` and wherever else the same module is used, on the device of what is around it.

    Owners keep no second record of what was there: references outside the module tree are exchanged, and torch's fused
    encoder layers are told that their activation is no longer the one they know.

    Raises:
        ValueError: there is no such module.
    """
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no module `{name}`") from None
    device = _device_around(model, name)
    if device.type != "meta":  # what was fitted would be lost there
        module.to(device=device)
    for owner in list(model.modules()):
        held = [child_name for child_name, child in owner._modules.items() if child is old]
        for child_name in held:
            setattr(owner, child_name, module)
        if _exchange(vars(owner), old, module) or held:
            _leave_fast_path(model, owner)


def _device_around(model: nn.Module, name: str) -> torch.device:
    """That of the nearest parameter or buffer: a model may lie on several devices."""
    while True:
        owner = model.get_submodule(name)
        tensor = next(itertools.chain(owner.parameters(), owner.buffers()), None)
        if tensor is not None or not name:
            return torch.device("cpu") if tensor is None else tensor.device
        name = name.rpartition(".")[0]


_OWN_RECORDS = frozenset(vars(nn.Module()))  # `_modules`, hooks, …: what torch keeps itself
_DEPTH = 3  # of containers in containers


def _exchange(attributes: dict[str, Any], old: nn.Module, new: nn.Module) -> bool:
    """Let plain attributes that refer to `old` refer to `new`; whether there were any."""
    referring = [name for name in attributes if name not in _OWN_RECORDS and _refers(attributes[name], old)]
    for name in referring:
        attributes[name] = _exchanged(attributes[name], old, new)
    return bool(referring)


def _refers(value: Any, old: nn.Module, depth: int = _DEPTH) -> bool:
    if value is old or (isinstance(value, MethodType) and value.__self__ is old):
        return True
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return depth > 0 and any(_refers(entry, old, depth - 1) for entry in entries)


def _exchanged(value: Any, old: nn.Module, new: nn.Module, depth: int = _DEPTH) -> Any:
    """`value` with `new` for `old`; lists and dicts are changed in place, as others may hold them too."""
    if value is old:
        return new
    if isinstance(value, MethodType):
        return getattr(new, value.__name__)
    if isinstance(value, (list, dict)):
        for key in range(len(value)) if isinstance(value, list) else list(value):
            if _refers(value[key], old, depth - 1):
                value[key] = _exchanged(value[key], old, new, depth - 1)
        return value
    entries = [_exchanged(entry, old, new, depth - 1) if _refers(entry, old, depth - 1) else entry for entry in value]
    return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)


_FAST_PATH = ("activation_relu_or_gelu", "use_nested_tensor")


def _leave_fast_path(model: nn.Module, owner: nn.Module) -> None:
    """`nn.TransformerEncoderLayer` notes which activation it has, and computes that one itself in evaluation mode; the
    encoder around it hands it nested tensors, which only that fused code takes."""
    if getattr(owner, "activation_relu_or_gelu", 0):
        owner.activation_relu_or_gelu = 0  # type: ignore[assignment]
    for encoder in model.modules():
        if getattr(encoder, "use_nested_tensor", False) and any(part is owner for part in encoder.modules()):
            encoder.use_nested_tensor = False  # type: ignore[assignment]


@contextmanager
def replaced(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """`module` at `name` for a while; the model is as it was afterwards."""
    old = model.get_submodule(name)
    notes = [
        (owner, note, vars(owner)[note]) for owner in model.modules() for note in _FAST_PATH if note in vars(owner)
    ]
    replace_module(model, name, module)
    try:
        yield
    finally:
        replace_module(model, name, old)
        for owner, note, value in notes:
            setattr(owner, note, value)


def restore_activations(model: nn.Module, configs: Mapping[str, Any]) -> None:
    """Put activations built from their configurations in their places; their weights come with the model's.

    Raises:
        ValueError: a name the model does not have, a configuration that cannot be built.
    """
    from polytrope.ops import build_activation

    for name, config in configs.items():
        replace_module(model, name, build_activation(config))
