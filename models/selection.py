"""Which activations of a model are converted: its modules, and the functions it calls, made modules; and what stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polytrope.models.calls import Call, is_elementwise, lift, observe_calls, plain_kind
from polytrope.models.changes import Left
from polytrope.models.modes import measuring
from polytrope.models.surgery import (
    ACTIVATION_CLASSES,
    GATE_CLASSES,
    Activation,
    Choice,
    gate_call,
    gate_module,
    kinds_of,
    owners_of,
    part_reason,
    refuse_idle,
    stays,
    takes_class,
)
from polytrope.ops.fitting.targets import resolve_target


@dataclass(frozen=True)
class Selection:
    """What is converted, and what is not.

    Args:
        activations: what is converted, in the order of `named_modules`.
        calls: those of them that were functions; `lift` makes them modules in another copy of the model.
        left: everything else that is an activation.
    """

    activations: list[Activation]
    calls: list[Call]
    left: list[Left]


def select_activations(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any],
    choice: Choice | None = None,
    *,
    walk: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Selection:
    """Run `forward(model, batch)` over the batches, find every activation, module or function, and choose.

    Functions that are chosen are made modules; the model computes what it did. By default stay: sigmoid, tanh,
    softplus, hardtanh, hardsigmoid and logsigmoid called as functions and `nn.Sigmoid` (gates, soft caps), a tanh
    beside a sigmoid, slopes per channel, and whatever belongs to a pooler or a head.

    Args:
        choice: which activations are meant; default: all that are known.
        walk: gives the batches, and may say how far it is.

    Raises:
        ValueError: nothing is left, a part of the selection takes nothing, or the model cannot run on the data; says
            what the model does contain.
    """
    choice = choice or Choice()
    calls, own = observe_calls(model, walk(batches), forward)
    classes = ACTIVATION_CLASSES | GATE_CLASSES | set(choice.types)
    chosen: list[str] = []
    kinds: dict[str, list[str]] = {}
    left: list[Left] = []
    for name, module in model.named_modules():
        reason: str | None
        if isinstance(module, torch.jit.ScriptModule):
            kinds[name] = [type(module).__name__]
            left.append(Left(name, type(module).__name__, "TorchScript", None, "what it calls cannot be seen"))
            continue
        if name in own:
            kind = plain_kind(resolve_target(module))
            gate = gate_module(model, name) if kind is None else gate_call(name, kind)
            kinds[name] = [*kinds_of(module), *([kind] if kind is not None else [])]
            reason = part_reason(*owners_of(model, name)) or choice.reason_to_stay(name, kinds[name], gate)
        elif takes_class(module, classes):
            kinds[name] = kinds_of(module)
            reason = stays(model, name, choice)
        else:
            continue
        if reason is None:
            chosen.append(name)
        else:
            left.append(Left(name, type(module).__name__, type(module).__name__, None, reason))
    lifted: list[Call] = []
    for call in calls:
        reason = call.obstacle or choice.reason_to_stay(call.name, [call.kind], gate_call(call.name, call.kind))
        if reason is None:
            lifted.append(call)
        else:
            left.append(Left(call.name, call.kind, call.place, call.count, reason))
    if not chosen and not lifted:
        raise ValueError(_nothing(model, left, calls, choice.types))
    refuse_idle(model, choice, kinds | {call.name: [call.kind] for call in calls})
    _lift_alike(model, lifted, batches[0], forward)
    names = {*chosen, *(call.name for call in lifted)}
    return Selection(
        [Activation(name, module) for name, module in model.named_modules() if name in names], lifted, left
    )


def _nothing(model: nn.Module, left: Sequence[Left], calls: Sequence[Call], types: Sequence[str]) -> str:
    """What the model has instead, and what would be taken if it were asked for."""
    name = type(model).__name__
    if left and all(entry.reason.startswith("learned already") for entry in left):
        names = ", ".join(entry.name for entry in left[:8]) + ", …" * (len(left) > 8)
        return (
            f"{name} has no classical activation: its {len(left)} are learned already ({names}), by a training or a "
            f"conversion. Convert the model of before, or fit them again by their type: "
            f"types={sorted({entry.kind for entry in left})} (--type)"
        )
    if left:
        lines = [f"{entry.name} ({entry.place}): {entry.reason}" for entry in left[:12]]
        lines += [f"… and {len(left) - 12} more"] * (len(left) > 12)
        stuck = {call.name for call in calls if call.obstacle is not None}
        asked = [entry for entry in left if entry.reason.endswith("is asked for") and entry.name not in stuck]
        if asked:
            kinds = sorted({entry.kind for entry in asked})
            lines.append(f"types={kinds} (--type) takes them, or include={[asked[0].name]} (--include)")
        return f"the selection leaves none of {len(left)} activations:\n" + "\n".join(lines)
    idle = (nn.Identity, nn.modules.dropout._DropoutNd)
    leaves = [module for module in model.modules() if not module._modules and not isinstance(module, idle)]
    counts = Counter(type(module).__name__ for module in leaves)
    shown = ", ".join(f"{kind} × {count}" for kind, count in counts.most_common(12)) + ", …" * (len(counts) > 12)
    candidates = sorted({type(module).__name__ for module in leaves if is_elementwise(module)})
    looked = (
        "no module of a known class, and no call of a known function was seen"
        if not types
        else (f"no module and no function of the types {', '.join(types)}")
    )
    hint = (
        f"Nothing but functions of single numbers are: types={candidates} (--type) takes them"
        if candidates
        else "A class of your own is taken by its name: types=['MyActivation'] (--type MyActivation)"
    )
    return f"{name} has no activation to convert: {looked}. Its modules: {shown}.\n{hint}"


def _lift_alike(model: nn.Module, calls: Sequence[Call], batch: Any, forward: Callable[[nn.Module, Any], Any]) -> None:
    """Lift, and see that the model still says the same."""
    if not calls:
        return
    with measuring(model), torch.random.fork_rng():
        state = torch.get_rng_state()
        before = forward(model, batch)
        lift(model, calls)
        torch.set_rng_state(state)
        after = forward(model, batch)
    if isinstance(before, Tensor) and not torch.allclose(before, after, rtol=1e-5, atol=1e-6, equal_nan=True):
        places = ", ".join(call.place for call in calls[:4])
        raise ValueError(f"calls could not be made modules without changing what the model computes: {places}")
