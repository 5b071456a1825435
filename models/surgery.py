"""Find the activations of any model, and put other modules in their place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

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
    """Put `module` at `name` and wherever else the same module is used, on the model's device.

    Raises:
        ValueError: there is no such module.
    """
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no module `{name}`") from None
    first = next(iter(model.parameters()), None)
    if first is not None:
        module.to(device=first.device)
    for owner in list(model.modules()):
        for child_name, child in list(owner._modules.items()):
            if child is old:
                setattr(owner, child_name, module)


def restore_activations(model: nn.Module, configs: Mapping[str, Any]) -> None:
    """Put activations built from their configurations in their places; their weights come with the model's.

    Raises:
        ValueError: a name the model does not have, a configuration that cannot be built.
    """
    from polytrope.ops import build_activation

    for name, config in configs.items():
        replace_module(model, name, build_activation(config))
