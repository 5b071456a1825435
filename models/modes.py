"""A model as it is for a measurement, and as it was afterwards: training flags, gradients, `forward`, compiled code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; every submodule's own flag comes back, such as that of a frozen batch norm."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients, and without code compiled before: that calls no hook added since."""
    with evaluation_mode(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def wrapped_forward(
    modules: Iterable[tuple[str, nn.Module]], wrap: Callable[[str, nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """`wrap(name, module)` runs as each module's `forward`. No hooks: fused code looks for them, and gives way."""
    named = list(modules)
    kept = [vars(module).get("forward") for _, module in named]
    try:
        for name, module in named:
            vars(module)["forward"] = wrap(name, module)
        yield
    finally:
        for (_, module), own in zip(named, kept, strict=True):
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own
