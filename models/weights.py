"""Names of published weights without what wrappers put before them, and their way into a model, exact or refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

_SHOWN = 8  # problems named in an error
# Modules that wrap others: DDP and DataParallel, torch.compile, FSDP and its checkpointing, Lightning Fabric.
_WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module"}
)
_COUNTERS = frozenset({"n_averaged", "initted", "step", "num_updates", "decay"})  # of weight averages, no weights


def unwrap(state: Mapping[str, Tensor], landmark: str) -> dict[str, Tensor] | None:
    """The same weights without wrappers' names, in whatever order they lie around one another.

    Wrappers' names go wherever they stand; then what stands before the model's own names (`model.` of Lightning,
    `ema_model.` of a weight average, any attribute it was kept under) is told by one name that every model has.

    Args:
        landmark: pattern of that name; its first group is what stands before.

    Returns:
        None: there is no such name.

    Raises:
        ValueError: several models, or two different tensors under one name.
    """
    bare: dict[str, Tensor] = {}
    originals: dict[str, str] = {}
    for name, tensor in state.items():
        shorter = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if shorter in bare and not torch.equal(bare[shorter], tensor):
            raise ValueError(f"{originals[shorter]} and {name} are both {shorter}, and differ; keep one of them")
        bare[shorter] = tensor
        originals[shorter] = name
    prefixes = sorted({match[1] for name in bare if (match := re.fullmatch(landmark, name))})
    if not prefixes:
        return None
    if len(prefixes) > 1:
        raise ValueError(
            f"there are weights of several models, whose names begin with {', '.join(map(repr, prefixes))}; save the "
            "ones you mean in a file of their own"
        )
    found = {}
    for name, tensor in bare.items():
        if name.startswith(prefixes[0]):
            name = name.removeprefix(prefixes[0])
        if not (tensor.numel() == 1 and name.rpartition(".")[2] in _COUNTERS):
            found[name] = tensor
    return found


def load_renamed(model: nn.Module, tensors: Mapping[str, Tensor], *, tied: Collection[str], what: str) -> None:
    """Copy `tensors` into `model`.

    Args:
        model: receives the weights; its own dtypes and devices stay.
        tensors: weights by the model's own names.
        tied: names of the model that share another one's tensor and are not looked for.
        what: for the message: `ConvNeXt`.

    Raises:
        ValueError: names or shapes that do not fit, or numbers that the model's dtypes do not hold, listed; the model
            is unchanged.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {list(tensors[name].shape)}, the model's is {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        raise ValueError(f"not the weights of this {what}: " + "; ".join(problems[:_SHOWN]))
    check_dtypes({name: (tensor.dtype, own[name].dtype) for name, tensor in tensors.items()})
    model.load_state_dict(tensors, strict=False)


def load_exactly(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into `model` by its own names; of weights that several names share, one name is enough.

    Args:
        model: receives the weights; its own dtypes and devices stay.
        source: the file or directory, for messages.

    Raises:
        ValueError: names or shapes that do not fit, or numbers that the model's dtypes do not hold.
    """
    own = model.state_dict(keep_vars=True)
    check_dtypes({name: (tensor.dtype, own[name].dtype) for name, tensor in tensors.items() if name in own})
    loaded = {own[name].data_ptr() for name in tensors if name in own}
    problems = [f"unexpected {name}" for name in sorted(set(tensors) - set(own))]
    problems += [
        f"missing {name}"
        for name, tensor in own.items()
        if name not in tensors and tensor.data_ptr() not in loaded and tensor.numel()
    ]
    problems += [
        f"{name} is {list(tensors[name].shape)}, the model's is {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        raise ValueError(f"{source}: the weights do not fit the model: {'; '.join(problems[:_SHOWN])}")
    model.load_state_dict(tensors, strict=False)


def check_dtypes(dtypes: Mapping[str, tuple[torch.dtype, torch.dtype]]) -> None:
    """Refuse to store numbers where they would be rounded, or mean something else (a quantised weight has a scale).

    Args:
        dtypes: by name, that of the file and that of the model.

    Raises:
        ValueError: the first that does not fit.
    """
    for name, (stored, wanted) in dtypes.items():
        same_kind = stored.is_floating_point == wanted.is_floating_point
        if not same_kind or stored.itemsize < min(2, wanted.itemsize):
            raise ValueError(
                f"{name} is {_name(stored)}, the model's is {_name(wanted)}: quantised weights are not read; give the "
                "original ones"
            )
        if torch.promote_types(stored, wanted) != wanted:
            raise ValueError(
                f"{name} is {_name(stored)}, which {_name(wanted)} would round; save it as {_name(wanted)} if that is "
                "meant"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
