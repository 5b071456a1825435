"""Find the activations of any model, and put other modules in their place."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from types import MethodType
from typing import Any

import torch
from torch import nn

from polytrope.models.rewriting import FunctionalActivation, Site, route, sites_of
from polytrope.ops.channels import slopes_of

# By class name, so that the classes of transformers and timm are known without importing either.
ACTIVATION_CLASSES = frozenset(
    {"GELU", "ReLU", "ReLU6", "SiLU", "Tanh", "Mish", "ELU", "Hardswish", "Softplus", "LeakyReLU", "QuickGELU", "Swish"}
    | {"SELU", "CELU", "PReLU", "Softsign", "Hardtanh", "LogSigmoid", "Tanhshrink", "BloomGelu"}
    | {"GELUActivation", "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "PytorchGELUTanh"}
    | {"GELUTanh", "SiLUActivation", "MishActivation", "ReLUSquaredActivation", "AccurateGELUActivation"}
    | {"HardSwish", "HardMish", "LaplaceActivation", "ClippedGELUActivation", "FunctionalActivation"}
)
# Known, but converted only if asked for by type.
GATE_CLASSES = frozenset({"Sigmoid", "Hardsigmoid", "HardSigmoid", "RReLU", "LearnableActivation"})
GATE_FUNCTIONS = frozenset({"sigmoid", "tanh", "hardsigmoid", "hardtanh", "logsigmoid", "softplus", "tanhshrink"})
_HEADS = re.compile(r"(^|\.)((\w+_)?(pooler|classifier|head|heads)|cls|score|qa_outputs)(\.|$)")


@dataclass(frozen=True)
class Activation:
    """One activation of a model: its name (as in `named_modules`) and module."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Choice:
    """Which activations are meant. Unless `types` or a pattern of `include` names it, a gate stays as it is, and so
    does what belongs to a pooler or a head.

    Args:
        types: class names that count as activations, their subclasses too, or names of functions; `GELU` is both;
            default: `ACTIVATION_CLASSES` and the functions of `calls.FUNCTIONS` that are no gates.
        include, exclude: shell patterns of module names: `encoder.*`, `*.pooler.*`.
        layers: first and last number of a layer, counting from 0; the number is the first one in the module's name.
    """

    types: Sequence[str] = ()
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    layers: tuple[int, int] | None = None

    def reason_to_stay(self, name: str, kinds: Sequence[str], gate: str | None) -> str | None:
        """Why an activation is not converted; None if it is.

        Args:
            kinds: names of its classes, or of its function.
            gate: why it would stay if it is not asked for.
        """
        if any(fnmatch(name, pattern) for pattern in self.exclude):
            return "excluded"
        named = any(fnmatch(name, pattern) for pattern in self.include)
        if self.include and not named:
            return "not among the names to convert"
        if self.layers is not None and not self.layers[0] <= layer_number(name) <= self.layers[1]:
            return "in another layer"
        if self.types:
            wanted = {_plain(kind) for kind in self.types}
            return None if wanted & {_plain(kind) for kind in kinds} else "not of a type to convert"
        if not named and gate is not None:
            return f"{gate}; it stays unless its type or its name is asked for"
        return None


def _plain(kind: str) -> str:
    return kind.lower().replace("_", "")


def is_of_a_head(name: str) -> bool:
    """Whether a module of this name belongs to a pooler or a head."""
    return _HEADS.search(name) is not None


def gate_module(model: nn.Module, name: str) -> str | None:
    """Why a module stays unless it is asked for: a gate, learned already, or of a pooler or a head."""
    module = model.get_submodule(name)
    kinds = class_names(module)
    if "LearnableActivation" in kinds:
        return f"learned already ({learned_name(module)})"
    if is_of_a_head(name):
        return "part of a pooler or a head"
    if GATE_CLASSES & kinds:
        return f"{type(module).__name__} is mostly a gate"
    if "Tanh" in kinds:
        neighbours = model.get_submodule(name.rpartition(".")[0]).children()
        if any("Sigmoid" in class_names(neighbour) for neighbour in neighbours):
            return "a gate beside a sigmoid"
    return None


def gate_call(name: str, kind: str) -> str | None:
    """Why a function that is called stays unless it is asked for."""
    if is_of_a_head(name):
        return "part of a pooler or a head"
    return f"{kind} called as a function is mostly a gate or a soft cap" if kind in GATE_FUNCTIONS else None


def part_reason(*owners: nn.Module) -> str | None:
    """Why what is, or lies in, a part of this package's models stays, whatever is asked for: a model that is read again
    is built by the options of its parts. None where no owner is one.

    Args:
        owners: outermost first.
    """
    for owner in owners:
        if type(owner).__module__.startswith("polytrope.models.parts."):
            return f"it is a part of {type(owner).__name__}, which is described by its own options alone"
    return None


def owners_of(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules around one and itself, outermost first."""
    places = name.split(".") if name else []
    return [model.get_submodule(".".join(places[:count])) for count in range(len(places) + 1)]


def class_names(module: nn.Module) -> set[str]:
    """Of its class and all their parents."""
    return {parent.__name__ for parent in type(module).__mro__}


def learned_name(module: nn.Module) -> str:
    """Family and size of a learnable activation: `hermite 8`."""
    config = module.config()  # type: ignore[operator]
    return f"{config['name']} {config.get('degree', '')}".strip()


def takes_class(module: nn.Module, types: Iterable[str]) -> bool:
    """Whether a module is of one of these classes or a subclass; written as anybody would: `gelu`, `quick_gelu`."""
    return bool({_plain(kind) for kind in class_names(module)} & {_plain(kind) for kind in types})


def is_activation(module: nn.Module) -> bool:
    """Whether a module is of a class that is known as an activation, or one of this package's."""
    return bool((ACTIVATION_CLASSES | GATE_CLASSES) & class_names(module))


def find_activations(
    model: nn.Module,
    *,
    types: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: tuple[int, int] | None = None,
) -> list[Activation]:
    """The activation modules that are meant, in the order of `named_modules`; a module used at several places appears
    once. Functions that are called are found by `selection.select_activations`, which runs the model.

    Args:
        types, include, exclude, layers: as of `Choice`.

    Raises:
        ValueError: nothing is left, or a part of the selection takes nothing.
    """
    choice = Choice(types, include, exclude, layers)
    classes = ACTIVATION_CLASSES | GATE_CLASSES | set(types)
    known = [Activation(name, module) for name, module in model.named_modules() if takes_class(module, classes)]
    if not known:
        raise ValueError(
            f"{type(model).__name__} has no activation module to replace; looked for the classes "
            f"{', '.join(sorted(classes))}. Activations called as functions are found by running the model: "
            "polytrope.models.selection.select_activations"
        )
    reasons = {entry.name: stays(model, entry.name, choice) for entry in known}
    chosen = [entry for entry in known if reasons[entry.name] is None]
    if not chosen:
        names = ", ".join(f"{name} ({reason})" for name, reason in list(reasons.items())[:8])
        raise ValueError(f"the selection leaves none of {len(known)} activations: {names}" + ", …" * (len(known) > 8))
    refuse_idle(model, choice, {entry.name: kinds_of(entry.module) for entry in known})
    return chosen


def kinds_of(module: nn.Module) -> list[str]:
    """What `types` may call an activation module, its own class or function first."""
    if isinstance(module, FunctionalActivation):
        return [module.kind]
    own = type(module).__name__
    return [own, *sorted(class_names(module) - {own})]


def refuse_idle(model: nn.Module, choice: Choice, kinds: Mapping[str, Sequence[str]]) -> None:
    """Refuse an entry of a selection that is true of no activation: a slip, whose meaning would be lost without a word.

    Args:
        kinds: of all activations of the model by name, as of `kinds_of`.

    Raises:
        ValueError: the option, the entry, and what there is.
    """
    for option, patterns in (("include", choice.include), ("exclude", choice.exclude)):
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in kinds):
                raise ValueError(f"{option}: `{pattern}` is the name of no activation; there are: {_listed(kinds)}")
    known = {_plain(kind) for each in kinds.values() for kind in each}
    for kind in choice.types:
        if _plain(kind) not in known:
            there = dict.fromkeys(each[0] for each in kinds.values())
            raise ValueError(f"types: `{kind}` is the type of no activation; there are: {_listed(there)}")
    last = max(layer_number(name) for name, _ in model.named_modules())
    for number in choice.layers or ():
        if not 0 <= number <= last and number != sys.maxsize:  # that is how `6-` ends
            raise ValueError(f"layers: {number} is the number of no layer; there are: 0 to {last}")


def _listed(names: Iterable[str]) -> str:
    first = list(itertools.islice(names, 9))
    return ", ".join(first[:8]) + ", …" * (len(first) > 8)


def stays(model: nn.Module, name: str, choice: Choice) -> str | None:
    """Why an activation module is not converted; None if it is."""
    if (part := part_reason(*owners_of(model, name))) is not None:
        return part
    module = model.get_submodule(name)
    slopes = sum(parameter.numel() for parameter in module.parameters()) if "PReLU" in class_names(module) else 1
    if slopes > 1 and slopes_of(module) is None:  # a class of somebody's own, which may do anything with them
        return f"a slope for each of {slopes} channels: no one function can stand for it"
    is_call = isinstance(module, FunctionalActivation)
    gate = gate_call(name, str(module.kind)) if is_call else gate_module(model, name)
    return choice.reason_to_stay(name, kinds_of(module), gate)


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
            leave_fast_path(model, owner)


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


def leave_fast_path(model: nn.Module, owner: nn.Module) -> None:
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


def describe_activations(model: nn.Module) -> dict[str, Any]:
    """Of every learnable activation what `restore_activations` needs; one used at several places appears once.

    That is the module's `config()`, and for one that is called where the source calls a function, the place: `call`.
    """
    from polytrope.ops import is_learnable_activation

    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if is_learnable_activation(module):
            owner, _, child = name.rpartition(".")
            sites = [site.to_dict() for site in sites_of(model.get_submodule(owner)) if site.child == child]
            found[name] = module.config() | ({"call": sites[0]} if sites else {})  # type: ignore[operator]
    return found


def restore_activations(model: nn.Module, configs: Mapping[str, Any]) -> None:
    """Put activations built from their descriptions in their places; their weights come with the model's.

    Raises:
        ValueError: a name the model does not have, a configuration that cannot be built, a source that has changed.
    """
    from polytrope.ops import build_activation

    for name, config in configs.items():
        if not isinstance(config, dict) or "call" not in config:
            replace_module(model, name, build_activation(config))
            continue
        module = build_activation({key: value for key, value in config.items() if key != "call"})
        try:
            owner = model.get_submodule(name.rpartition(".")[0])
            route(owner, Site(**config["call"]), module)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"activation `{name}`: {error}") from error
        leave_fast_path(model, owner)
        replace_module(model, name, module)  # to the device of what is around it
